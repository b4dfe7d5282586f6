"""Packed images: the same samples as the folder's, and damage that is named or done without."""

import itertools
import json
import os
import pathlib
import shutil
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest
from PIL import Image

from models import data
from models.data import Data, manifest, pack, verify

pytestmark = pytest.mark.slow

SHARD = "images-00001-of-00003.array_record"  # holds samples 8 to 15


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """20 JPEG and PNG images in two class folders, none like another."""
    root = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for number in range(20):
        folder = root / "ab"[number // 10]
        folder.mkdir(exist_ok=True)
        pixels = random.integers(0, 255, (40, 60, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02}.{('jpg', 'png')[number % 2]}")
    return root


@pytest.fixture(scope="module")
def written(images, tmp_path_factory):
    out = tmp_path_factory.mktemp("packed") / "out"
    assert pack.main([str(images), str(out), "--shard-size", "8", "--threads", "2"]) == 0
    return out


@pytest.fixture
def packed(written, tmp_path):
    """A copy to damage."""
    return shutil.copytree(written, tmp_path / "packed")


def splits(config):
    return data.splits(config, image_shape=(12, 16), channels=3, classes=None, seed=0)


def all_of(config, *, batch=4, rows=slice(None)):
    """Every batch of the training images, in order."""
    train, _ = splits(config)
    return list(data.eval_batches(train, config, batch, rows=rows))


def flip(path, place):
    damaged = bytearray(path.read_bytes())
    damaged[place] ^= 1
    path.write_bytes(damaged)


def test_records_are_the_images_of_the_folder(images, written):
    """In the same order with the same labels, so that a run may go on from its packed images."""
    folder, records = Data("folder", images), Data("records", written)
    for ours, theirs in zip(splits(records), splits(folder), strict=True):
        assert (len(ours), ours.classes, ours.fingerprint) == (
            len(theirs),
            theirs.classes,
            theirs.fingerprint,
        )
        assert not ours.multilabel
    for ours, theirs in zip(all_of(records), all_of(folder), strict=True):
        for name in theirs:
            np.testing.assert_array_equal(ours[name], theirs[name])


def test_the_manifest_says_what_was_packed(images, written):
    told = manifest.load(written)
    assert (told.classes, told.samples, told.left_out) == (("a", "b"), 20, {})
    assert [shard.records for shard in told.shards] == [8, 8, 4]
    for shard in told.shards:
        assert manifest.sha256(written / shard.file) == shard.sha256
    names = {path.name for path in written.iterdir()}
    assert names == {"manifest.json", *(shard.file for shard in told.shards)}
    assert list(verify.damages(written)) == []


def test_threads_read_records_at_the_same_time(images, written):
    train, _ = splits(Data("records", written))
    expected = [train.read(sample) for sample in range(len(train))]
    found = [[] for _ in range(4)]

    def work(mine):
        mine += [[train.read(sample) for sample in range(len(train))] for _ in range(5)]

    threads = [threading.Thread(target=work, args=(mine,)) for mine in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(each == expected for mine in found for each in mine)
    assert [len(mine) for mine in found] == [5] * 4


def test_a_shard_is_closed_when_others_are_needed(written, monkeypatch):
    monkeypatch.setattr("models.data.sources.records.OPEN", 1)
    config = Data("records", written)
    train, _ = splits(config)
    names = [train.read(sample).name for sample in (0, 17, 1, 16, 2)]
    assert [name.partition(" of")[0] for name in names] == [
        "record 1",
        "record 3",
        "record 2",
        "record 2",
        "record 3",
    ]
    assert len(train.whole._readers) == 1


def test_packing_goes_on_where_it_was_interrupted(images, written, tmp_path, monkeypatch, capsys):
    """After two of three shards; what comes out is what an unbroken packing gives."""
    out, arguments = tmp_path / "out", [str(images), str(tmp_path / "out"), "--shard-size", "8"]
    write, made = pack._written, []

    def interrupted(path, records):
        if len(made) == 2:
            (out / ".images-00002-of-00003.1.array_record").write_bytes(b"half of it")
            raise KeyboardInterrupt
        made.append(path)
        return write(path, records)

    monkeypatch.setattr(pack, "_written", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pack.main(arguments)
    assert not (out / manifest.NAME).exists() and len(made) == 2
    with pytest.raises(ValueError, match=r"holds no manifest\.json: pack a folder"):
        splits(Data("records", out))
    assert pack.main([*arguments[:-1], "7"]) == 1
    assert "holds shards of other images, labels or sizes" in capsys.readouterr().err
    monkeypatch.setattr(
        pack, "_written", lambda path, records: made.append(path) or write(path, records)
    )
    assert pack.main(arguments) == 0
    assert len(made) == 3, "whole shards are written once"
    assert {x.name: x.read_bytes() for x in out.iterdir()} == {
        x.name: x.read_bytes() for x in written.iterdir()
    }
    assert pack.main(arguments) == 0
    assert len(made) == 3 and "20 images of 2 classes in 3 shards" in capsys.readouterr().out


def test_packing_refuses_what_it_would_spoil(images, tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("all of it")
    assert pack.main([str(images), str(tmp_path)]) == 1
    assert "is not empty, and no packing was interrupted" in capsys.readouterr().err
    assert pack.main([str(images), str(tmp_path / "out"), "--shard-size", "0"]) == 1
    assert "shard_size=0" in capsys.readouterr().err


def test_a_disk_that_is_full_leaves_no_half_of_a_shard(images, tmp_path):
    """Here a limit on the size of a file, which one shard of 20 images is over."""
    script = f"""
        import resource, sys
        from models.data import pack
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        sys.exit(pack.main([{str(images)!r}, {str(tmp_path / "out")!r}]))
    """
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 1 and "cannot be written" in ran.stderr, ran.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == [pack.DRAFT]
    assert pack.main([str(images), str(tmp_path / "out")]) == 0, "with room, it goes on"


def test_unreadable_images_are_refused_or_left_out(images, tmp_path, capsys):
    root, out = shutil.copytree(images, tmp_path / "images"), tmp_path / "out"
    (root / "a" / "03.png").write_bytes(b"no image")
    assert pack.main([str(root), str(out)]) == 1
    assert "a/03.png is not a readable image" in capsys.readouterr().err
    assert pack.main([str(root), str(tmp_path / "other"), "--leave-out", "True"]) == 0
    told = manifest.load(tmp_path / "other")
    assert list(told.left_out) == ["a/03.png"] and told.samples == 19
    whole = splits(Data("records", tmp_path / "other"))[0].whole
    assert [whole.read(i).labels[0] for i in range(19)] == [0] * 9 + [1] * 10
    assert whole.fingerprint != splits(Data("folder", images))[0].whole.fingerprint


def test_labels_of_a_file_are_packed_with_their_ancestors(images, tmp_path):
    names = [path.relative_to(images).as_posix() for path in sorted(images.glob("*/*"))]
    labels, parents = tmp_path / "labels.json", tmp_path / "parents.json"
    labels.write_text(json.dumps({name: ["cat"] if i % 2 else [] for i, name in enumerate(names)}))
    parents.write_text('{"cat": ["animal"]}')
    arguments = ["--labels", str(labels), "--hierarchy", str(parents), "--shard-size", "64"]
    assert pack.main([str(images), str(tmp_path / "out"), *arguments]) == 0
    whole = splits(Data("records", tmp_path / "out"))[0].whole
    assert whole.multilabel and whole.manifest.classes == ("animal", "cat")
    assert [whole.read(i).labels for i in range(20)] == [(), (0, 1)] * 10


def test_test_shards_have_the_classes_of_the_training_shards(images, written, tmp_path):
    """By their names: the shards number the classes that they hold."""
    only = shutil.copytree(images / "b", tmp_path / "test" / "b").parent
    assert pack.main([str(only), str(tmp_path / "out")]) == 0
    _, test = splits(Data("records", written, test_path=tmp_path / "out"))
    assert test.read(0).labels == (1,) and test.classes == 2
    with pytest.raises(ValueError, match="has the class 'a' and 0 more that"):
        splits(Data("records", tmp_path / "out", test_path=written))


def test_labels_beside_packed_ones_are_refused(written):
    with pytest.raises(ValueError, match=r"labels=x\.csv means nothing to the source 'records'"):
        splits(Data("records", written, labels=pathlib.Path("x.csv")))


def middle(packed):
    """A place within the picture of a record of the second shard, and which record it is."""
    whole, place = (packed / SHARD).read_bytes(), 0
    train = splits(Data("records", packed))[0].whole
    place = whole.index(train.read(11).picture) + 100
    return place, 3


@pytest.mark.parametrize("workers", [0, 1])
def test_a_flipped_bit_is_named_with_shard_and_record(packed, workers):
    place, record = middle(packed)
    flip(packed / SHARD, place)
    config = Data("records", packed, workers=workers)
    message = rf"record {record} of the shard .*{SHARD} is damaged: .*hash mismatch"
    with pytest.raises(data.Unreadable, match=message):
        all_of(config)


def test_verify_names_what_is_damaged(packed, capsys):
    assert verify.main([str(packed)]) == 0
    place, record = middle(packed)
    flip(packed / SHARD, place)
    (packed / "images-00002-of-00003.array_record").unlink()
    assert verify.main([str(packed)]) == 1
    changed, damaged, missing = capsys.readouterr().out.splitlines()[-3:]
    assert changed.endswith(f"{SHARD} is not the one that was written")
    assert f"record {record} of the shard" in damaged
    assert "images-00002-of-00003.array_record is missing: its 4 records are" in missing
    (packed / manifest.NAME).write_text("{")
    assert verify.main([str(packed)]) == 1
    assert "manifest.json is damaged" in capsys.readouterr().out


@pytest.mark.parametrize("place", range(24))
def test_no_flipped_bit_is_silent(packed, written, place):
    """Anywhere in a shard: an error names the shard, or the samples are what they were."""
    path = packed / SHARD
    flip(path, place * (path.stat().st_size - 1) // 23)
    try:
        found = all_of(Data("records", packed))
    except data.Unreadable as error:
        assert SHARD in str(error)
        return
    for ours, theirs in zip(found, all_of(Data("records", written)), strict=True):
        np.testing.assert_array_equal(ours["image"], theirs["image"])
        np.testing.assert_array_equal(ours["label"], theirs["label"])


@pytest.mark.parametrize("damage", ["missing", "truncated", "empty"])
def test_a_shard_that_is_not_whole_is_refused_before_the_first_step(packed, damage):
    path = packed / SHARD
    if damage == "missing":
        path.unlink()
    else:
        os.truncate(path, 0 if damage == "empty" else path.stat().st_size // 2)
    with pytest.raises(ValueError, match=f"{SHARD} (is missing|has .* bytes and not)"):
        splits(Data("records", packed))


def test_a_shard_whose_size_alone_is_right_is_named(packed):
    path = packed / SHARD
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(
        data.Unreadable, match=f"{SHARD} has 0 records that can be found, and not 8"
    ):
        all_of(Data("records", packed))


def test_a_shard_with_the_name_of_another_is_named(packed):
    """Or else samples would be seen twice, and others never."""
    shutil.copyfile(packed / "images-00000-of-00003.array_record", packed / SHARD)
    size = (packed / SHARD).stat().st_size
    assert size == manifest.load(packed).shards[1].bytes, "sizes tell nothing, as blocks are filled"
    message = f"record 1 of .*{SHARD} is damaged: it was written as record 1 of images-00000"
    with pytest.raises(data.Unreadable, match=message):
        splits(Data("records", packed))[0].read(8)


@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing"])
def test_quarantine_is_the_same_whoever_reads(packed, written, damage, caplog):
    """The damaged samples alone are missing, from every process and worker, and are logged."""
    if damage == "flipped":
        flip(packed / SHARD, middle(packed)[0])
        bad = {11}
    else:
        bad = set(range(8, 16))
        os.truncate(packed / SHARD, 70_000)
        if damage == "missing":
            (packed / SHARD).unlink()
    config = Data("records", packed, held_out=20, skip_bad_records=True)
    whole = Data("records", written, held_out=20)

    def stepped(config, rows=slice(None)):
        split, _ = splits(config)
        with data.stream(split, config, 6, seed=0, rows=rows) as batches:
            return list(itertools.islice(batches, 6)), batches.skipped

    found, skipped = stepped(config)
    assert set(skipped) == {sample - 1 for sample in bad}, "sample 0 is held out"
    for sample, reason in skipped.items():
        assert f"sample {sample}: {reason}" in caplog.text
        assert SHARD in reason
    expected, _ = stepped(whole)
    count = 0
    for ours, theirs in zip(found, expected, strict=True):
        gone = np.isin(theirs["index"], list(skipped))
        count += gone.sum()
        assert (ours["index"][gone] == -1).all() and (ours["label"][gone] == data.PADDING).all()
        for name in ours:
            np.testing.assert_array_equal(ours[name][~gone], theirs[name][~gone])
    assert count >= len(bad)
    for rows in (np.arange(3), np.arange(3, 6)):
        part, _ = stepped(config, rows)
        for ours, theirs in zip(part, found, strict=True):
            for name in ours:
                np.testing.assert_array_equal(ours[name], theirs[name][rows])
