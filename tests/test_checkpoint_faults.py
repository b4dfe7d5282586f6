"""Whatever happens to a folder of checkpoints, what is restored is bit for bit what was saved."""

import contextlib
import json
import os
import pathlib
import re
import resource
import shutil
import subprocess

import jax
import numpy as np
import pytest

from models.checkpoint import Damaged, arrays, files, manifest, retention

from .checkpointing import (
    differences,
    like,
    mesh_of,
    numbers,
    open_folder,
    process,
    saved,
    state_of,
)

# Where a write fails, orbax ends its event loop; other writes that then end find it closed.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(
        "ignore:(?s)Exception ignored in. None.*Event loop is closed"
        ":pytest.PytestUnraisableExceptionWarning"
    ),
]
ROUNDS = 20


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A folder with three checkpoints, for tests to copy."""
    path = tmp_path_factory.mktemp("good") / "run"
    saved(path, 10, 20, 30, mesh=mesh_of(1, 2, 4))
    return path


@pytest.fixture
def run(good, tmp_path):
    """A copy to damage."""
    return pathlib.Path(shutil.copytree(good, tmp_path / "run"))


def restored(path, **changes):
    """What is restored, checked bit by bit, and what was said."""
    said = []
    with open_folder(path, say=said.append, **changes) as folder:
        found = folder.restore(like(mesh_of(1, 2, 4)))
    assert differences(found.state, numbers(found.step)) == []
    assert found.extra == {"seen": found.step}
    return found, said


def flip(path, at=None):
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if at is None else at] ^= 0x10
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def empty(path):
    path.write_bytes(b"")


FAULTS = {"flipped": flip, "truncated": truncate, "emptied": empty, "deleted": pathlib.Path.unlink}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_any_file_is_found_named_and_walked_back_over(good, tmp_path, fault):
    names = files.below(good / "00000030")
    assert len(names) > 8
    large = [name for name in names if (good / "00000030" / name).stat().st_size > files.SMALL]
    assert large, "no file is large enough to be judged by its values alone"
    about = manifest.read(good / "00000030")
    for number, name in enumerate(names):
        run = pathlib.Path(shutil.copytree(good, tmp_path / str(number)))
        FAULTS[fault](run / "00000030" / name)
        found, said = restored(run)
        assert found.step == 20, f"{name} {fault} went unnoticed"
        assert {damage.file for damage in found.skipped} == {name}
        held = about.files[name].holds if name in about.files else ()
        named = {name for damage in found.skipped for name in damage.parameters}
        assert named <= set(held) and bool(named) == bool(held)
        assert "step 30" in said[0] and name in said[0]
        assert "10 steps are lost" in said[-1]
        assert all(len(line) < 500 and "\n" not in line for line in said), "a raw dump"


def test_a_flipped_bit_of_a_value_names_its_array_though_orbax_reads_it_well(run):
    piece = numbers(30).params["head"]["kernel"][:, :32, :48].tobytes()  # what one device has
    name, at = next(
        (name, (run / "00000030" / name).read_bytes().find(piece))
        for name in files.below(run / "00000030", "ocdbt.process_0")
        if piece in (run / "00000030" / name).read_bytes()
    )
    flip(run / "00000030" / name, at + 1234)
    wanted = arrays.named(like(None))
    read = arrays.read(run / "00000030", wanted)  # no error: this is why there are sums
    assert differences(read, arrays.named(numbers(30))) == ["['params.head.kernel']"]
    found, _ = restored(run)
    (damage,) = found.skipped
    assert (damage.file, damage.parameters) == (name, ("params.head.kernel",))
    assert damage.what == "was changed after it was written"


def test_values_that_were_read_wrongly_are_refused_though_all_files_are_right(run, monkeypatch):
    def wrong(path, wanted):
        values = right(path, wanted)
        if path.name == "00000030":
            bits = np.array(values["moments.0.bias"]).view(np.uint32)
            bits[3] ^= 1
            values["moments.0.bias"] = jax.device_put(
                bits.view(np.float32), values["moments.0.bias"].sharding
            )
        return values

    right = arrays.read
    monkeypatch.setattr(arrays, "read", wrong)
    found, _ = restored(run)
    (damage,) = found.skipped
    assert damage.file is None and damage.parameters == ("moments.0.bias",)
    assert "no file has changed" in damage.what


def test_any_change_of_the_manifest_is_found(good):
    text = (good / "00000030" / manifest.NAME).read_bytes()
    random = np.random.default_rng(0)
    for at in random.integers(len(text.rstrip()), size=100).tolist():
        content = bytearray(text)
        content[at] ^= 1 << int(random.integers(7))
        folder = good.parent / "manifest"
        folder.mkdir(exist_ok=True)
        (folder / manifest.NAME).write_bytes(content)
        with contextlib.suppress(manifest.Unreadable):
            # Between values, JSON has spaces that mean nothing.
            assert manifest.read(folder) == manifest.read(good / "00000030")


def test_a_folder_without_its_marker_is_no_checkpoint(run):
    (run / "00000030" / manifest.NAME).unlink()
    found, said = restored(run)
    assert found.step == 20
    assert "manifest.json: is missing: the checkpoint was never complete" in said[0]


def test_the_newest_two_are_bad_and_the_third_is_restored(run):
    large = next(
        name
        for name in files.below(run / "00000020")
        if (run / "00000020" / name).stat().st_size > files.SMALL
    )
    flip(run / "00000020" / large)
    (run / "00000030" / "manifest.ocdbt").unlink()
    found, said = restored(run)
    assert found.step == 10
    assert [damage.step for damage in found.skipped] == [30, 20]
    assert "20 steps are lost" in said[-1]


def test_damaged_ones_are_kept_aside_and_their_steps_are_saved_anew(run):
    (run / "00000030" / "manifest.ocdbt").unlink()
    restored(run)
    assert (run / "00000030.damaged").is_dir() and retention.steps(run) == [10, 20]
    with open_folder(run) as folder:
        folder.save(30, state_of(None, 30), {"seen": 30}, wait=True)
    found, said = restored(run)
    assert (found.step, found.skipped, said) == (30, [], [])
    with open_folder(run, keep=1) as folder:
        folder.save(40, state_of(None, 40), {"seen": 40}, wait=True)
    assert not (run / "00000030.damaged").exists(), "older than all that are kept"


def test_where_all_are_bad_nothing_is_restored_and_nothing_touched(run):
    for step in retention.steps(run):
        (run / f"{step:08d}" / "_METADATA").unlink()
    with (
        open_folder(run) as folder,
        pytest.raises(Damaged, match="none of the 3 checkpoints") as raised,
    ):
        folder.restore(like(None))
    assert [damage.step for damage in raised.value.damages] == [30, 20, 10]
    assert all(damage.file == "_METADATA" for damage in raised.value.damages)
    assert retention.steps(run) == [10, 20, 30]


@pytest.mark.parametrize("how", ["strict", "named"])
def test_who_insists_on_the_newest_gets_an_error(run, how):
    (run / "00000030" / "_METADATA").unlink()
    with (
        open_folder(run, strict=how == "strict") as folder,
        pytest.raises(Damaged, match=r"step 30: _METADATA: is missing"),
    ):
        folder.restore(like(None), step=30 if how == "named" else None)
    assert retention.steps(run) == [10, 20, 30]


def test_kill_9_at_any_moment_of_a_save_loses_no_checkpoint(tmp_path):
    """20 kills: what was committed at each is what the next job restores, bit for bit."""
    with process("kill_often", tmp_path, ROUNDS, stdout=subprocess.PIPE) as nursery:
        told = json.loads(nursery.communicate(timeout=300)[0])
    assert nursery.returncode == 0 and len(told) == ROUNDS
    newest, debris, drafts = 0, 0, {0}
    for found in told:
        # The newest that was committed, or one that lacked nothing but its name when it was killed.
        assert found["step"] == newest or (found["step"] in drafts and found["step"] == newest + 1)
        assert found["wrong"] == [] and found["skipped"] == [] and found["begun"] is None
        whole = [int(name) for name in found["left"] if name.isdigit()]
        debris += len(found["left"]) > len(whole)
        assert len(whole) <= 4, "three, and the one that took the place of the oldest"
        newest = max(whole, default=newest)
        drafts = {int(name[:8]) for name in found["left"] if name.endswith("saving")}
    assert newest > ROUNDS / 2, "hardly anything was saved"
    assert debris > ROUNDS / 4, "hardly any kill met a save"
    with open_folder(tmp_path) as folder:
        assert {entry.name for entry in folder.path.iterdir()} == {
            "lock",
            *(f"{step:08d}" for step in folder.steps()),
        }


@contextlib.contextmanager
def no_file_larger_than(size):
    """Writing fails in the kernel, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_save_that_cannot_write_warns_keeps_the_others_and_is_tried_again(tmp_path):
    said = []
    with open_folder(tmp_path, retry=2, say=said.append) as folder:
        folder.save(10, state_of(None, 10), {"seen": 10}, wait=True)
        with no_file_larger_than(20_000):
            folder.save(20, state_of(None, 20), {"seen": 20})
            folder.wait()
        assert (
            "step 20 was not saved" in folder.last_error and "File too large" in folder.last_error
        )
        assert said[-1].startswith("WARNING: ") and "the newest is of step 10" in said[-1]
        assert "\n" not in said[-1] and len(said[-1]) < 500
        assert [entry.name for entry in tmp_path.glob("*.saving")] == [], "it takes room"
        assert [step for step in range(20, 27) if folder.due(step)] == [20, 22, 24, 26]
        folder.save(22, state_of(None, 22), {"seen": 22}, wait=True)
        assert folder.last_error is None and not folder.due(24)
    found, _ = restored(tmp_path)
    assert found.step == 22
    shutil.rmtree(tmp_path / "00000022")
    assert restored(tmp_path)[0].step == 10


def test_what_cannot_fit_is_not_begun(tmp_path, monkeypatch):
    saved(tmp_path, 10)
    free = shutil.disk_usage(tmp_path)._replace(free=1_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with open_folder(tmp_path) as folder:
        folder.save(20, state_of(None, 20), {"seen": 20}, wait=True)
        assert re.search(r"step 20 .* MB do not fit: the disk has 0 MB", folder.last_error)
    assert restored(tmp_path)[0].step == 10


@pytest.fixture
def mounted(tmp_path):
    """A disk of its own, of 2 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    options = ["-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if not mount or subprocess.run([mount, *options], capture_output=True).returncode:
        pytest.skip("only root can mount a disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_costs_one_checkpoint_and_no_training(mounted, monkeypatch):
    """The disk says that there is room, as one with quotas does, and there is none."""
    roomy = shutil.disk_usage("/")._replace(free=10**12)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: roomy)
    ballast = mounted / "ballast"
    with open_folder(mounted / "run", keep=2) as folder:
        folder.save(10, state_of(None, 10), {"seen": 10}, wait=True)
        assert folder.last_error is None
        with contextlib.suppress(OSError):
            ballast.write_bytes(bytes(2**21))
        folder.save(20, state_of(None, 20), {"seen": 20}, wait=True)
        assert "No space left on device" in folder.last_error
        ballast.unlink()
        folder.save(30, state_of(None, 30), {"seen": 30}, wait=True)
        assert folder.last_error is None and folder.steps() == [10, 30]
        ballast.write_bytes(b"")
    with contextlib.suppress(OSError):
        ballast.write_bytes(bytes(2**21))
    assert restored(mounted / "run")[0].step == 30, "restored on a full disk"


def test_a_disk_that_becomes_read_only_costs_no_training(mounted):
    with open_folder(mounted / "run") as folder:
        folder.save(10, state_of(None, 10), {"seen": 10}, wait=True)
        # The disk itself cannot change while the lock is open; a second view of it can.
        subprocess.run(["mount", "--bind", str(mounted), str(mounted)], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", str(mounted)], check=True)
        try:
            folder.save(20, state_of(None, 20), {"seen": 20}, wait=True)
            assert "Read-only file system" in folder.last_error
            with pytest.raises(OSError, match=r"cannot be written to .*Choose another folder"):
                open_folder(mounted / "other")
            with open_folder(mounted / "run", writable=False) as reader:
                assert reader.restore(like(None)).step == 10
        finally:
            subprocess.run(["umount", str(mounted)], check=True)


def test_a_folder_that_vanishes_costs_no_training(tmp_path):
    with open_folder(tmp_path / "run") as folder:
        folder.save(10, state_of(None, 10), {"seen": 10}, wait=True)
        shutil.rmtree(tmp_path / "run")
        (tmp_path / "run").write_text("a file")
        folder.save(20, state_of(None, 20), {"seen": 20}, wait=True)
        assert "step 20 was not saved" in folder.last_error
    with pytest.raises(OSError, match=r"cannot be written to .*Choose another folder"):
        open_folder(tmp_path / "run")
    os.unlink(tmp_path / "run")
