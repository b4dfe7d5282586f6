"""What a training step sees: which samples, moved how far, and the same whoever asks."""

import collections
import hashlib
import pathlib

import numpy as np
import pytest

from models import data
from models.data import epochs


@pytest.fixture(scope="module")
def digits():
    return data.digits()


def test_digits_are_split_once_and_for_all(digits):
    train, test = digits
    assert (train.images.shape, test.images.shape) == ((1437, 8, 8, 1), (360, 8, 8, 1))
    assert train.images.dtype == np.float32 and train.labels.dtype == np.int32
    assert (train.images.min(), train.images.max()) == (-1.0, 1.0)
    again = data.digits()[0]
    np.testing.assert_array_equal(train.images, again.images)
    np.testing.assert_array_equal(train.labels, again.labels)


def test_each_class_is_split_in_the_same_proportion(digits):
    for label in range(10):
        kept, held_out = (int((part.labels == label).sum()) for part in digits)
        assert held_out / (kept + held_out) == pytest.approx(360 / 1797, abs=0.004)


def test_no_image_is_on_both_sides(digits):
    train, test = ({image.tobytes() for image in part.images} for part in digits)
    assert not train & test


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("samples, batch", [(10, 5), (10, 4), (7, 16), (1437, 240)])
def test_each_sample_once_per_epoch(monkeypatch, samples, batch, in_memory):
    """Also where the batch does not divide the samples, or is larger than an epoch."""
    if not in_memory:
        monkeypatch.setattr(epochs, "IN_MEMORY", 0)
    count = 4
    steps = -(-count * samples // batch)
    stream = np.concatenate([data.order(samples, batch, seed=3, step=i) for i in range(steps)])
    parts = stream[: count * samples].reshape(count, samples)
    for part in parts:
        assert sorted(part) == list(range(samples))
    assert len({part.tobytes() for part in parts}) == count, "two epochs have the same order"


def test_more_samples_than_fit_into_memory_have_an_order_too():
    """As many as JFT-4B has, of which a step asks for a few."""
    found = data.order(4_000_000_000, 8, seed=0, step=10**8)
    assert found.shape == (8,) and len(set(found.tolist())) == 8
    assert (found >= 0).all() and (found < 4_000_000_000).all()
    np.testing.assert_array_equal(found[3:], data.order(4_000_000_000, 8, seed=0, step=10**8)[3:])
    with pytest.raises(ValueError, match="5000000000 samples cannot be ordered"):
        data.order(5_000_000_000, 8, seed=0, step=0)


def test_the_digits_stay_what_they_were(digits):
    """Their order, shifts and pixels: curves of earlier runs can be compared with later ones."""

    def short(array):
        return hashlib.sha256(array.tobytes()).hexdigest()[:8]

    found = data.order(1437, 120, seed=0, step=13)
    assert (found[:6].tolist(), short(found)) == ([1194, 1290, 794, 934, 27, 26], "cbdbfafc")
    batch = data.train_batch(digits[0], 120, data.Augment(1, 0.5), seed=3, step=13)
    assert short(batch["image"]) == "7e50c052"


def test_a_batch_is_a_function_of_seed_and_step(digits):
    def batch(pixels=1, **changes):
        augment = data.Augment(pixels)
        return data.train_batch(digits[0], 32, augment, **{"seed": 1, "step": 5} | changes)

    for name, rows in batch().items():
        np.testing.assert_array_equal(rows, batch()[name])
    assert not np.array_equal(batch()["label"], batch(step=6)["label"])
    assert not np.array_equal(batch()["label"], batch(seed=2)["label"])
    np.testing.assert_array_equal(batch()["label"], batch(pixels=0)["label"])
    assert not np.array_equal(batch()["image"], batch(pixels=0)["image"])


@pytest.mark.parametrize("rows", [slice(8, 16), np.array([0, 1, 30, 31])])
def test_a_part_of_a_batch_is_that_part_of_the_whole(digits, rows):
    """So that it does not matter how many processes read it."""
    whole = data.train_batch(digits[0], 32, data.Augment(2, 0.7), seed=1, step=5)
    part = data.train_batch(digits[0], 32, data.Augment(2, 0.7), seed=1, step=5, rows=rows)
    for name in whole:
        np.testing.assert_array_equal(part[name], whole[name][rows])


def test_shift_moves_down_and_right_over_blank_ground():
    image = np.arange(1.0, 10.0, dtype=np.float32).reshape(1, 3, 3, 1)
    moved = data.shift(np.repeat(image, 3, axis=0), np.array([[0, 0], [1, 0], [-1, 2]]))
    expected = [
        [[1, 2, 3], [4, 5, 6], [7, 8, 9]],
        [[-1, -1, -1], [1, 2, 3], [4, 5, 6]],
        [[-1, -1, 4], [-1, -1, 7], [-1, -1, -1]],
    ]
    np.testing.assert_array_equal(moved[..., 0], expected)
    assert moved.dtype == np.float32


def test_images_move_by_every_offset_there_is(digits):
    """Nine offsets of at most one pixel, none of them much rarer than the others."""
    one = data.Images(digits[0].images[:1], digits[0].labels[:1], 10)
    moved = data.train_batch(one, 900, data.Augment(1), seed=0, step=0)["image"]
    counts = collections.Counter(image.tobytes() for image in moved)
    assert len(counts) == 9 and min(counts.values()) > 60


def test_the_share_of_images_that_move(digits):
    """A quarter of them draws an offset, of which one in nine is no move."""
    still = data.train_batch(digits[0], 1437, data.Augment(0), seed=0, step=0)["image"]
    moved = data.train_batch(digits[0], 1437, data.Augment(1, 0.25), seed=0, step=0)["image"]
    share = np.mean(np.any(still != moved, axis=(1, 2, 3)))
    assert share == pytest.approx(0.25 * 8 / 9, abs=0.03)


@pytest.mark.parametrize(
    "changes", [{"pixels": -1}, {"share": 1.5}, {"area": (0.5, 0.1)}, {"aspect": (0.0, 1.0)}]
)
def test_no_such_augmentation(changes):
    with pytest.raises(ValueError, match=f"{next(iter(changes))}="):
        data.Augment(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"held_out": 1},
        {"samples": 0},
        {"targets": 0},
        {"threads": 0},
        {"workers": -1},
        {"mixup": -0.1},
        {"central": 0.0},
    ],
)
def test_no_such_data(changes):
    with pytest.raises(ValueError, match=f"{next(iter(changes))}="):
        data.Data(**changes)


def test_evaluation_sees_each_image_once(digits):
    """The rows that fill up the last batch are labelled as no class."""
    batches = list(data.eval_batches(digits[1], data.Data(), 112))
    assert {batch["image"].shape for batch in batches} == {(112, 8, 8, 1)}
    labels = np.concatenate([batch["label"] for batch in batches])
    images = np.concatenate([batch["image"] for batch in batches])
    np.testing.assert_array_equal(labels[:360], digits[1].labels)
    np.testing.assert_array_equal(images[:360], digits[1].images)
    assert set(labels[360:]) == {data.PADDING} and len(labels) == 448
    index = np.concatenate([batch["index"] for batch in batches])
    assert index.tolist() == list(range(360)) + [data.PADDING] * 88


@pytest.mark.parametrize("source", ["digits", "synthetic"])
def test_a_path_that_the_source_does_not_read_is_refused(source):
    """Or else a run would train on other images than it was given."""
    config = data.Data(source, path=pathlib.Path("photographs"))
    with pytest.raises(
        ValueError, match=f"path=photographs means nothing to the source '{source}'"
    ):
        data.splits(config, image_shape=(8, 8), channels=1, classes=10, seed=0)


def test_digits_are_refused_to_a_model_of_other_images():
    with pytest.raises(ValueError, match="images of 8 x 8 x 1, and the model takes 16 x 16 x 3"):
        data.splits(data.Data(), image_shape=(16, 16), channels=3, classes=10, seed=0)
    with pytest.raises(ValueError, match="num_classes=9 are too few: the images have 10 classes"):
        data.splits(data.Data(), image_shape=(8, 8), channels=1, classes=9, seed=0)
    with pytest.raises(ValueError, match=r"no source 'digit'.*did you mean 'digits'"):
        data.splits(data.Data("digit"), image_shape=(8, 8), channels=1, classes=9, seed=0)
