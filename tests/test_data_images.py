"""Image files: which part of them a step sees, in which size, and under which labels."""

import dataclasses
import io
import itertools
import json

import numpy as np
import pytest
from PIL import Image

from models import data
from models.data import Augment, Data
from models.data.augment import central_box, inception_box
from models.data.batches import training_batch
from models.data.catalogue import catalogue, flattened
from models.data.images import Sample
from models.data.pictures import image, resized

pytestmark = pytest.mark.slow


def encoded(pixels, kind="PNG", **options):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def seen(picture, shape, *, box=None, central=1.0):
    box_of = None if box is None else lambda width, height: box
    return image(Sample(picture, (), "a picture"), shape, box_of, central)


def ramp(height, width):
    """Pixels that say where they are: red to the right, green downwards."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x, y, np.zeros_like(x)], axis=-1).astype(np.uint8)


def save(root, name, pixels=None, **options):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(ramp(12, 16) if pixels is None else pixels).save(path, **options)


def splits(config, shape=(8, 8), channels=3, classes=None):
    return data.splits(config, image_shape=shape, channels=channels, classes=classes, seed=0)


@pytest.mark.parametrize("size", [(100, 60), (60, 100), (7, 300), (1, 1)])
def test_an_inception_crop_is_a_part_of_the_picture_with_area_and_aspect_in_range(size):
    width, height = size
    random = np.random.default_rng(0)
    boxes = [
        inception_box(width, height, random, area=(0.05, 1.0), aspect=(3 / 4, 4 / 3))
        for _ in range(400)
    ]
    left, top, right, bottom = np.array(boxes, float).T
    wide, high = right - left, bottom - top
    assert min(left.min(), top.min()) >= 0 and right.max() <= width and bottom.max() <= height
    whole = (wide == width) & (high == height)  # where nothing else fits
    ratio, share = (wide / high)[~whole], (wide * high / (width * height))[~whole]
    # Sides are whole pixels, so a ratio is off by as much as one of them is of the height.
    assert np.all(np.abs(np.clip(ratio, 3 / 4, 4 / 3) - ratio) <= 1 / high[~whole])
    assert np.all((share >= 0.05) & (share <= 1))
    if size == (100, 60):
        assert not whole.any()
        assert share.min() < 0.1 and share.max() > 0.65 and len(set(boxes)) > 350
        assert left.min() == 0 and right.max() == 100 and bottom.max() == 60


def test_a_picture_of_an_impossible_form_is_seen_whole():
    assert inception_box(3, 1000, np.random.default_rng(0), area=(0.5, 1.0), aspect=(1.0, 1.0)) == (
        0,
        0,
        3,
        1000,
    )


def test_an_evaluation_sees_the_middle():
    assert central_box(100, 50, aspect=1.0, share=1.0) == (25, 0, 75, 50)
    assert central_box(100, 50, aspect=2.0, share=0.5) == (25, 12.5, 75, 37.5)
    found = seen(encoded(ramp(40, 80)), (20, 20, 3), central=0.5)  # pixels 30 to 50, 10 to 30
    expected = ramp(40, 80)[10:30, 30:50] / 127.5 - 1
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert found.dtype == np.float32


def test_resizing_is_bilinear_with_antialiasing():
    """A pixel of the result is the mean of those below it, weighted as a tent."""
    stripes = np.zeros((8, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    found = seen(encoded(stripes), (4, 8, 3))
    np.testing.assert_allclose(found[:, 1:-1], 0, atol=0.02)  # grey, and not one of the stripes
    grown = seen(encoded(ramp(4, 4) * 16), (4, 8, 3))[0, :, 0]
    np.testing.assert_allclose(
        np.diff(grown)[1:-1], 8 / 127.5, atol=1 / 127.5, err_msg="no straight line"
    )


def test_a_large_jpeg_is_decoded_small_and_looks_the_same():
    random = np.random.default_rng(0)
    smooth = Image.fromarray(random.integers(0, 255, (12, 16, 3), np.uint8)).resize((640, 480))
    pixels = np.asarray(smooth)
    jpeg, png = encoded(pixels, "JPEG", quality=95), encoded(pixels)
    for box in ((0, 0, 640, 480), (100, 50, 500, 450)):
        difference = np.abs(seen(jpeg, (24, 32, 3), box=box) - seen(png, (24, 32, 3), box=box))
        assert difference.mean() < 0.01 and difference.max() < 0.06


@pytest.mark.parametrize(
    "box, wanted, decoded",
    [
        ((0, 0, 640, 480), (24, 32), (80, 60)),
        ((0, 0, 640, 480), (75, 100), (320, 240)),
        ((160, 120, 480, 360), (24, 32), (160, 120)),
        ((160, 120, 480, 360), (75, 100), (640, 480)),
        ((0, 0, 640, 480), (480, 640), (640, 480)),
    ],
)
def test_a_jpeg_is_decoded_at_twice_the_size_or_more(box, wanted, decoded):
    """Twice what is asked for of the part that is seen, in halves of the whole picture."""
    with Image.open(io.BytesIO(encoded(np.zeros((480, 640, 3), np.uint8), "JPEG"))) as picture:
        assert resized(picture, box, (*wanted, 3)).shape == (*wanted, 3)
        assert picture.size == decoded


def test_pictures_of_every_mode_are_read():
    grey = np.arange(0, 240, 10, np.uint8).reshape(4, 6)
    expected = grey / 127.5 - 1
    deep = encoded(grey.astype(np.uint16) << 8)
    rgba = encoded(np.dstack([grey, grey, grey, np.full_like(grey, 9)]))
    for picture in (encoded(grey), deep, rgba, encoded(np.dstack([grey] * 3))):
        found = seen(picture, (4, 6, 1))
        np.testing.assert_allclose(found[..., 0], expected, atol=0.01)
        np.testing.assert_allclose(seen(picture, (4, 6, 3)), np.dstack([found] * 3), atol=0.01)


def test_what_is_no_image_is_refused_whatever_its_name():
    """Bytes that are none, half of an image, and a kind that Pillow needs another program for."""
    png = encoded(ramp(30, 40))
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EOF\n"
    for picture in (b"", b"no image", png[: len(png) // 2], postscript):
        with pytest.raises(data.Unreadable, match="a picture is not a readable image"):
            seen(picture, (8, 8, 3))


def test_crops_and_flips_are_a_function_of_seed_step_and_row(tmp_path):
    for number in range(12):
        save(tmp_path, "ab"[number % 2] + f"/{number}.png")
    config = Data("folder", tmp_path, held_out=12, augment=Augment(crop=True, flip=True))
    train, _ = splits(config)

    def made(seed=0, step=0, rows=slice(None), config=config):
        return training_batch(train, config, 11, seed=seed, step=step, rows=rows)[0]["image"]

    whole = made()
    np.testing.assert_array_equal(whole, made())
    np.testing.assert_array_equal(whole[[2, 7]], made(rows=np.array([2, 7])))
    assert not np.array_equal(whole, made(seed=1)) and not np.array_equal(whole, made(step=1))
    # Red grows to the right, or to the left where an image was flipped; green grows downwards.
    slopes = [np.sign(x[:, -1, 0] - x[:, 0, 0]).mean() for s in range(20) for x in made(step=s)]
    assert set(slopes) == {-1.0, 1.0} and 0.35 < np.mean(np.array(slopes) < 0) < 0.65
    never = dataclasses.replace(config, augment=Augment(crop=True))
    assert all((x[:, -1, 0] > x[:, 0, 0]).all() for x in made(config=never))


def test_pictures_in_memory_are_cropped_too():
    config = Data("synthetic", samples=8, augment=Augment(crop=True, area=(0.2, 0.5)))
    train, _ = splits(config, shape=(12, 10), classes=4)
    cropped, _ = training_batch(train, config, 8, seed=0, step=0)
    plain, _ = training_batch(train, Data("synthetic"), 8, seed=0, step=0)
    assert cropped["image"].shape == plain["image"].shape == (8, 12, 10, 3)
    assert not np.isclose(cropped["image"], plain["image"]).all(axis=(1, 2, 3)).any()
    assert np.abs(cropped["image"]).max() <= 1


def test_class_folders_are_labels(tmp_path):
    for name in ("dog/1.png", "cat/b/2.JPEG", "cat/1.jpg", "dog/.hidden.png", "cat/notes.txt"):
        if name.endswith("txt"):
            (tmp_path / name).write_text("no image")
        else:
            save(tmp_path, name)
    found = catalogue(tmp_path)
    assert found.names == ("cat/1.jpg", "cat/b/2.JPEG", "dog/1.png")
    assert (found.classes, found.labels) == (("cat", "dog"), ((0,), (0,), (1,)))
    assert not found.multilabel


def test_a_folder_without_class_folders_has_no_labels(tmp_path):
    for number in range(4):
        save(tmp_path, f"{number}.png")
    config = Data("folder", tmp_path, held_out=2)
    train, test = splits(config)
    assert (train.classes, len(train), len(test)) == (None, 2, 2)
    (batch,) = data.eval_batches(train, config, 2)
    assert batch["label"].tolist() == [-1, -1] and batch["index"].tolist() == [0, 1]
    mixed = dataclasses.replace(config, mixup=0.2)
    with pytest.raises(ValueError, match=r"mixup=0\.2 .* no labels"):
        data.stream(train, mixed, 2, seed=0)


@pytest.mark.parametrize("kind", ["json", "csv"])
def test_labels_from_a_file_with_their_ancestors(tmp_path, kind):
    """As JFT's: every assigned label and every label above it, all in one row."""
    for name in ("a.png", "b.png", "c/d.png", "e.png"):
        save(tmp_path / "images", name)
    labels = {"a.png": ["cat"], "b.png": ["dog", "cat"], "c/d.png": ["rock"], "e.png": []}
    parents = {"cat": ["mammal"], "dog": ["mammal", "pet"], "mammal": ["animal"]}
    files = []
    for name, told in {"labels": labels, "parents": parents}.items():
        files.append(tmp_path / f"{name}.{kind}")
        lines = "".join(",".join((key, *values)) + "\n" for key, values in told.items())
        files[-1].write_text(json.dumps(told) if kind == "json" else lines)
    config = Data("folder", tmp_path / "images", labels=files[0], hierarchy=files[1])
    train, _ = splits(config, classes=8)
    whole = train.whole
    assert whole.catalogue.classes == ("animal", "cat", "dog", "mammal", "pet", "rock")
    assert train.multilabel and (train.classes, train.columns) == (6, 8)
    (batch,) = data.eval_batches(whole, config, 4)
    assert batch["label"].astype(int).tolist() == [
        [1, 1, 0, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 0, 0, 0],
        [0, 0, 0, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 0, 0, 0, 0],
    ]


def test_a_hierarchy_that_turns_round_is_refused():
    assert flattened(["a"], {"a": ("b", "c"), "b": ("d",), "c": ("d",)}) == ("a", "b", "c", "d")
    with pytest.raises(ValueError, match="turns round: a < b < a"):
        flattened(["a"], {"a": ("b",), "b": ("a",)})


def test_what_is_not_clear_about_a_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is no folder"):
        catalogue(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"holds no images: no file ends in \.jpg"):
        catalogue(tmp_path)
    save(tmp_path, "a.png")
    with pytest.raises(ValueError, match="1 image is not enough to hold out"):
        splits(Data("folder", tmp_path))
    save(tmp_path, "cat/b.png")
    with pytest.raises(ValueError, match=r"images beside them, such as a\.png"):
        catalogue(tmp_path)
    file = tmp_path / "labels.json"
    for told, message in (
        ({"a.png": ["x"]}, "has no labels of cat/b.png, nor of 0 more"),
        ({"a.png": ["x"], "cat/b.png": ["y"], "c.png": ["z"]}, "has labels of c.png, which"),
        (["a.png"], "must be an object of lists"),
    ):
        file.write_text(json.dumps(told))
        with pytest.raises(ValueError, match=message):
            catalogue(tmp_path, labels=file)
    with pytest.raises(ValueError, match=r"labels\.txt is neither \.json nor \.csv"):
        catalogue(tmp_path, labels=tmp_path / "labels.txt")
    with pytest.raises(ValueError, match="needs a path"):
        splits(Data("folder"))


def test_test_images_of_their_own_have_the_classes_of_the_training_images(tmp_path):
    for name in ("train/a/1.png", "train/b/1.png", "train/c/1.png", "test/c/1.png"):
        save(tmp_path, name)
    config = Data("folder", tmp_path / "train", test_path=tmp_path / "test")
    train, test = splits(config)
    assert (len(train), len(test), test.classes) == (3, 1, 3)
    (batch,) = data.eval_batches(test, config, 1)
    assert batch["label"].tolist() == [2]
    save(tmp_path, "test/d/1.png")
    with pytest.raises(ValueError, match=r"d/1.png has the label 'd', which none of the 3 classes"):
        splits(config)
    with pytest.raises(ValueError, match="num_classes=2 are too few: the images have 3 classes"):
        splits(dataclasses.replace(config, test_path=None), classes=2)


def test_held_out_images_are_every_kth_and_no_others(tmp_path):
    for number in range(13):
        save(tmp_path, f"{'abc'[number // 5]}/{number:02}.png")
    train, test = splits(Data("folder", tmp_path, held_out=5))
    names = [[part.read(i).name[-9:] for i in range(len(part))] for part in (train, test)]
    assert names[1] == ["/a/00.png"[-9:], "/b/05.png"[-9:], "/c/10.png"[-9:]]
    assert len(names[0]) == 10 and len({*names[0], *names[1]}) == 13
    assert train.fingerprint != test.fingerprint


def test_an_unreadable_image_is_named_or_left_out_of_every_step(tmp_path, caplog):
    for number in range(6):
        save(tmp_path, f"a/{number}.png", np.full((9, 9, 3), number * 40, np.uint8))
    config = Data("folder", tmp_path, held_out=6)
    train, _ = splits(config)
    whole = [training_batch(train, config, 5, seed=0, step=step)[0] for step in range(2)]
    path = tmp_path / "a" / "3.png"
    path.write_bytes(path.read_bytes()[:45])
    with (
        data.stream(train, config, 5, seed=0) as batches,
        pytest.raises(data.Unreadable, match=r"a/3.png is not a readable image: "),
    ):
        next(batches)
    with pytest.raises(ValueError, match="closed"):
        next(batches)
    skipping = dataclasses.replace(config, skip_bad_records=True)
    with data.stream(train, skipping, 5, seed=0) as batches:
        found = list(itertools.islice(batches, 2))
        assert list(batches.skipped) == [2]
    assert caplog.text.count("a/3.png is not a readable image") == 1, "it is logged once"
    for ours, theirs in zip(found, whole, strict=True):
        bad = theirs["index"] == 2
        assert bad.sum() == 1
        assert (ours["index"][bad], ours["label"][bad]) == (-1, data.PADDING)
        assert (ours["image"][bad] == -1).all()
        for name in ours:
            np.testing.assert_array_equal(ours[name][~bad], theirs[name][~bad])
    mixed, _ = training_batch(train, dataclasses.replace(skipping, mixup=0.5), 5, seed=0, step=0)
    row = int(np.flatnonzero(found[0]["index"] < 0)[0])
    assert (mixed["label"][row] == data.PADDING).all(), "it is mixed with nothing"
    after = (row + 1) % 5
    np.testing.assert_array_equal(mixed["image"][after], found[0]["image"][after])
    path.unlink()
    with pytest.raises(data.Unreadable, match=r"a/3.png cannot be read: No such file"):
        train.read(2)
