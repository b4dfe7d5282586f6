"""The batches of a run: each sample once, wherever it stops, whoever reads and however many."""

import collections
import dataclasses
import itertools
import json
import os
import select
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from models import data
from models.data import Augment, Data

pytestmark = pytest.mark.slow

SMALL = Data("synthetic", samples=40)
SHAPE = {"image_shape": (6, 8), "channels": 3, "classes": 5, "seed": 0}


def taken(config, steps, *, start=0, batch=8, rows=slice(None), seed=0):
    """Some batches of the training images."""
    train, _ = data.splits(config, **SHAPE)
    with data.stream(train, config, batch, seed=seed, rows=rows, start=start) as batches:
        return list(itertools.islice(batches, steps))


def same(found, expected):
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert set(ours) == set(theirs)
        for name in ours:
            np.testing.assert_array_equal(ours[name], theirs[name])


@pytest.fixture(scope="module")
def unbroken():
    return taken(SMALL, 12)


def test_a_batch_is_what_the_step_sees(unbroken):
    assert {name: (x.shape, x.dtype.name) for name, x in unbroken[0].items()} == {
        "image": ((8, 6, 8, 3), "float32"),
        "label": ((8,), "int32"),
        "index": ((8,), "int64"),
    }
    images = np.stack([batch["image"] for batch in unbroken])
    assert images.min() >= -1 and images.max() <= 1 and images.std() > 0.1
    train, _ = data.splits(SMALL, **SHAPE)
    for batch in unbroken:
        labels = [train.read(sample).labels[0] for sample in batch["index"]]
        assert batch["label"].tolist() == labels


@pytest.mark.parametrize("start", [1, 5, 11])
def test_a_run_goes_on_at_any_step(unbroken, start):
    """To the record: also in the middle of an epoch, which has five steps here."""
    same(taken(SMALL, 12 - start, start=start), unbroken[start:])


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_change_nothing(unbroken, threads):
    same(taken(dataclasses.replace(SMALL, threads=threads), 12), unbroken)


def test_worker_processes_change_nothing(unbroken):
    same(taken(dataclasses.replace(SMALL, workers=2), 7, start=3), unbroken[3:10])


def rows_of(process, processes, batch):
    return np.arange(batch).reshape(processes, -1)[process]


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_each_sample_once_per_epoch_on_any_number_of_processes(unbroken, processes):
    """Each process brings its rows, and together they are the batches of one."""
    parts = [taken(SMALL, 10, rows=rows_of(i, processes, 8)) for i in range(processes)]
    whole = [
        {name: np.concatenate([part[name] for part in step]) for name in step[0]}
        for step in zip(*parts, strict=True)
    ]
    same(whole, unbroken[:10])
    seen = collections.Counter(np.concatenate([step["index"] for step in whole]).tolist())
    assert seen == dict.fromkeys(range(40), 2), "two epochs of five steps"


def test_each_sample_once_where_the_number_of_processes_changes():
    """Two processes, then four, then one, and the batch divides no epoch: 42 samples by 8."""
    config = dataclasses.replace(SMALL, samples=42)
    seen, step = collections.Counter(), 0
    for processes, steps in ((2, 4), (4, 9), (1, 8)):
        for process in range(processes):
            rows = rows_of(process, processes, 8)
            for batch in taken(config, steps, start=step, rows=rows):
                seen.update(batch["index"].tolist())
        step += steps
    assert step * 8 == 4 * 42 and seen == dict.fromkeys(range(42), 4)


@pytest.mark.parametrize("per", ["batch", "row"])
def test_mixup_is_the_same_on_any_number_of_processes(per):
    """The partner of a process's first row is another's last, and made by both."""
    config = dataclasses.replace(SMALL, mixup=0.3, mixup_per=per, augment=Augment(1, flip=True))
    whole = taken(config, 4)
    for processes in (2, 4):
        parts = [taken(config, 4, rows=rows_of(i, processes, 8)) for i in range(processes)]
        for step, expected in enumerate(whole):
            found = [part[step] for part in parts]
            same([{n: np.concatenate([x[n] for x in found]) for n in expected}], [expected])
    same(taken(config, 2, start=2), whole[2:])
    assert not np.array_equal(whole[0]["label"], taken(config, 1, seed=1)[0]["label"])


@pytest.mark.parametrize("per, weights", [("batch", 1), ("row", 8)])
def test_mixup_blends_images_as_labels(unbroken, per, weights):
    config = dataclasses.replace(SMALL, mixup=1.0, mixup_per=per)
    for mixed, plain in zip(taken(config, 3), unbroken, strict=False):
        np.testing.assert_array_equal(mixed["index"], plain["index"])
        hot, before = np.eye(5)[plain["label"]], np.roll(plain["image"], 1, axis=0)
        other = np.roll(hot, 1, axis=0)
        differ = (hot != other).any(axis=1)
        assert mixed["label"].dtype == np.float32
        np.testing.assert_allclose(mixed["label"].sum(axis=1), 1, rtol=1e-6)
        # A row whose neighbour has its label is all of that label, whatever the weight.
        weight = np.where(differ, (mixed["label"] * hot).sum(axis=1), np.nan)
        assert np.nanmin(weight) >= 0.5
        assert len(np.unique(weight[differ].round(6))) == min(weights, differ.sum())
        shares = weight[differ, None, None, None]
        expected = shares * plain["image"][differ] + (1 - shares) * before[differ]
        np.testing.assert_allclose(mixed["image"][differ], expected, atol=1e-6)


def test_images_with_several_labels_have_a_column_for_each_class():
    config = dataclasses.replace(SMALL, targets=2)
    train, test = data.splits(config, **SHAPE)
    assert train.multilabel and (train.classes, train.columns) == (5, 5)
    (batch,) = taken(config, 1)
    assert batch["label"].shape == (8, 5) and batch["label"].dtype == np.float32
    assert set(np.unique(batch["label"])) == {0, 1} and (batch["label"].sum(axis=1) == 2).all()
    *_, last = data.eval_batches(test, config, 4)
    assert last["index"].tolist() == [4, -1, -1, -1]
    assert (last["label"][1:] == data.PADDING).all() and last["label"][0].sum() == 2


def test_evaluation_in_parts_is_the_whole():
    _, test = data.splits(SMALL, **SHAPE)
    whole = list(data.eval_batches(test, SMALL, 4))
    assert np.concatenate([x["index"] for x in whole]).tolist() == [0, 1, 2, 3, 4, -1, -1, -1]
    parts = [list(data.eval_batches(test, SMALL, 4, rows=rows_of(i, 2, 4))) for i in range(2)]
    for expected, *found in zip(whole, *parts, strict=True):
        same([{n: np.concatenate([x[n] for x in found]) for n in expected}], [expected])


@pytest.mark.parametrize("start", [1, 2])
def test_an_evaluation_goes_on_at_any_batch(start):
    _, test = data.splits(SMALL, **SHAPE)
    whole = list(data.eval_batches(test, SMALL, 4))
    same(list(data.eval_batches(test, SMALL, 4, start=start)), whole[start:])


def test_the_digits_of_a_stream_are_those_of_a_step():
    config = Data(augment=Augment(1, 0.5))
    train, _ = data.splits(config, image_shape=(8, 8), channels=1, classes=10, seed=0)
    with data.stream(train, config, 120, seed=3, start=11) as batches:
        for step, batch in zip(range(11, 14), batches, strict=False):
            index = batch.pop("index")
            np.testing.assert_array_equal(index, data.order(1437, 120, seed=3, step=step))
            plain = data.train_batch(train, 120, config.augment, seed=3, step=step)
            same([batch], [plain])


def test_the_state_is_json_and_knows_other_data():
    train, _ = data.splits(SMALL, **SHAPE)
    with data.stream(train, SMALL, 8, seed=0) as batches:
        next(batches)
        state = json.loads(json.dumps(batches.state()))
        assert state["step"] == batches.step == 1
        assert batches.waited > 0
    with data.stream(train, SMALL, 8, seed=0, start=state["step"]) as batches:
        batches.check(state)
    with (
        data.stream(train, SMALL, 16, seed=2) as batches,
        pytest.raises(ValueError, match="batch was 8, is 16; seed was 0, is 2"),
    ):
        batches.check(state)
    other, _ = data.splits(SMALL, **SHAPE | {"seed": 1})
    with (
        data.stream(other, SMALL, 8, seed=0) as batches,
        pytest.raises(ValueError, match="fingerprint was"),
    ):
        batches.check(state)


def test_synthetic_images_can_be_learned_and_are_not_all_alike():
    """By the mean spectrum of each class, which moving an image does not change."""
    config = Data("synthetic", samples=400)
    splits = data.splits(config, image_shape=(16, 16), channels=3, classes=5, seed=0)

    def spectra(split):
        read = [split.read(sample) for sample in range(len(split))]
        images = np.stack([sample.picture for sample in read])
        found = np.abs(np.fft.fft2(images, axes=(1, 2))).reshape(len(read), -1)
        return found, np.array([sample.labels[0] for sample in read])

    (train, labels), (test, answers) = map(spectra, splits)
    means = np.stack([train[labels == c].mean(axis=0) for c in range(5)])
    guesses = np.argmin(((test[:, None] - means) ** 2).sum(axis=-1), axis=1)
    assert np.mean(guesses == answers) > 0.9
    assert len({picture.tobytes() for picture in np.concatenate([train, test])}) == 450


# Streams by two workers, says where they are, and then what it is told to.
SCRIPT = """
    import sys
    from multiprocessing import active_children
    from models import data

    def main():
        config = data.Data("synthetic", samples=40, workers=2)
        train, _ = data.splits(config, image_shape=(6, 8), channels=3, classes=5, seed=0)
        batches = data.stream(train, config, 8, seed=0)
        for _ in range(4):
            next(batches)
        print(*(child.pid for child in active_children()), flush=True)
        if input() == "go on":
            for _ in range(20):
                next(batches)
            print("went on", flush=True)

    if __name__ == "__main__":
        main()
"""


@pytest.fixture
def streaming(tmp_path):
    """A process that streams, and its workers as files that are readable when they have ended."""
    if not hasattr(os, "pidfd_open"):
        pytest.skip("no file tells that a process has ended: os.pidfd_open needs Linux")
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    with subprocess.Popen(
        [sys.executable, str(script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    ) as process:
        workers = [int(pid) for pid in process.stdout.readline().split()]
        assert len(workers) == 2, process.communicate()
        files = {pid: os.pidfd_open(pid) for pid in workers}
        yield process, files
        process.kill()
        for file in files.values():
            os.close(file)


def ended(files, seconds=60):
    """Whether all of these processes end."""
    return all(select.select([file], [], [], seconds)[0] for file in files.values())


def test_workers_end_with_the_process_that_was_killed(streaming):
    process, files = streaming
    process.kill()
    assert ended(files)


def test_workers_leave_a_signal_to_their_parent(streaming):
    """The batches up to the step at which all processes leave are still made; and a process that
    ends without closing its stream does end, and its workers do."""
    process, files = streaming
    for pid in files:
        os.kill(pid, signal.SIGTERM)
    told, errors = process.communicate("go on\n", timeout=120)
    assert "went on" in told, errors
    assert process.returncode == 0 and ended(files)


def test_a_worker_that_was_killed_is_an_error_and_no_hang(streaming):
    process, files = streaming
    os.kill(next(iter(files)), signal.SIGKILL)
    told, errors = process.communicate("go on\n", timeout=120)
    assert process.returncode != 0 and "went on" not in told
    assert "Worker process was terminated unexpectedly" in errors
    assert ended(files)
