"""Checkpoints: sums of values, what is kept, who may save, and what a checkpoint is refused for."""

import asyncio
import contextlib
import errno
import fcntl
import itertools
import json
import os
import pathlib
import signal
import subprocess
import threading

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from collective_matmul import make_mesh
from models.checkpoint import Checkpoints, Held, Lock, Mismatch, files, manifest, retention, sums

from .checkpointing import (
    IDENTITY,
    State,
    differences,
    like,
    mesh_of,
    numbers,
    open_folder,
    process,
    saved,
    state_of,
)

U32 = 0xFFFFFFFF


def mixed(x):
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & U32
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & U32
    return x ^ (x >> 16)


def oracle(x):
    """The sums by their definition, in Python's integers."""
    x = np.asarray(x)
    wide = {1: np.uint8, 2: np.uint16}.get(x.dtype.itemsize, np.uint32)
    words = np.frombuffer(x.tobytes(), wide)
    shape = x.shape if x.dtype.itemsize <= 4 else (*x.shape, x.dtype.itemsize // 4)
    found = []
    for lane in (0x9E3779B9, 0x85EBCA77):
        total = 0
        for word, position in zip(words.tolist(), np.ndindex(shape), strict=True):
            key = lane
            for number in position:
                key = ((key ^ number) * lane) & U32
                key ^= key >> 15
            total += mixed(word ^ key)
        found.append(total & U32)
    return found


def sum_of(x):
    return np.asarray(sums.of_array(x)).tolist()


DTYPES = [np.float32, ml_dtypes.bfloat16, np.float16, np.int8, np.int32, np.uint32, np.bool_]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (2, 3, 4)])
def test_the_sums_are_those_of_their_definition(dtype, shape):
    x = np.random.default_rng(0).integers(0, 2, size=shape).astype(dtype)
    assert sum_of(x) == oracle(x)


def test_the_sums_of_wide_numbers(x64):
    x = np.random.default_rng(0).normal(size=(3, 4))
    assert jnp.asarray(x).dtype == np.float64
    assert sum_of(x) == oracle(x)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.int8])
def test_any_flipped_bit_changes_both_sums(dtype):
    x = np.random.default_rng(1).normal(size=(4, 6)).astype(dtype)
    expected = sum_of(x)
    for at, bit in itertools.product(range(x.nbytes), range(8)):
        content = bytearray(x.tobytes())
        content[at] ^= 1 << bit
        found = sum_of(np.frombuffer(bytes(content), dtype).reshape(x.shape))
        assert found[0] != expected[0] and found[1] != expected[1]


def test_any_two_elements_that_swap_places_change_the_sums():
    """Also those that fool sums of positions times values: few bits set, far apart."""
    x = np.zeros((64, 32), np.float32)
    x[::2] = 1
    x[5] = np.arange(32).astype(ml_dtypes.bfloat16)
    expected = sum_of(x)
    random = np.random.default_rng(2)
    for a, b in random.integers(x.size, size=(500, 2)).tolist():
        other = x.copy()
        other.flat[[a, b]] = other.flat[[b, a]]
        assert (sum_of(other) == expected) == (x.flat[a] == x.flat[b])


def test_the_same_values_in_another_shape_or_a_row_further_have_other_sums():
    x = np.arange(24, dtype=np.float32).reshape(4, 6)
    found = [sum_of(y) for y in (x, x.reshape(6, 4), np.roll(x, 1, 0), x[::-1])]
    assert len({tuple(pair) for pair in found}) == 4


MESHES = [(1, 2, 4), (1, 4, 2), (2, 1, 4), (1, 1, 8), (1, 8, 1), (1, 1, 4), (1, 2, 1), (1, 1, 1)]


def test_the_sums_are_the_same_on_every_mesh():
    expected = [oracle(x) for x in jax.tree.leaves(numbers(3).params) if np.size(x) < 2000]
    for sizes in MESHES:
        leaves = jax.tree.leaves(state_of(mesh_of(*sizes), 3).params)
        assert [sum_of(x) for x in leaves if x.size < 2000] == expected, sizes


def test_nothing_but_sums_travels():
    x = jax.ShapeDtypeStruct(
        (64, 512), np.float32, sharding=NamedSharding(mesh_of(1, 2, 4), P("fsdp", "tensor"))
    )
    text = sums.of_array.lower(x).compile().as_text()
    assert "all-reduce" in text and "all-gather" not in text and "all-to-all" not in text


def test_on_a_tpu_nothing_is_copied_to_be_summed():
    """An MLP's kernels of ViT-22B in 48 blocks, of which each of 16 chips has 1.8 GB."""
    pytest.importorskip("libtpu")
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4").devices
    place = NamedSharding(make_mesh(1, 4, 4, devices=devices), P(None, "fsdp", "tensor"))
    x = jax.ShapeDtypeStruct((48, 6144, 24576), np.float32, sharding=place)
    compiled = sums.of_array.lower(x).compile()
    assert "all-gather" not in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes < 1e6


@pytest.mark.parametrize("x", [np.zeros(3, np.complex64), jax.random.key(0)])
def test_what_has_no_bits_to_sum_is_refused(x):
    with pytest.raises(TypeError, match="has no bits to sum"):
        sums.of_array(x)


def test_a_state_comes_back_bit_for_bit_with_what_was_saved_beside_it(tmp_path):
    mesh = mesh_of(1, 2, 4)
    extra = {"data": {"epoch": 3, "order": [1, 2]}, "chain": "9f"}
    with open_folder(tmp_path) as folder:
        assert folder.restore(like(mesh)) is None
        folder.save(10, state_of(mesh, 10), extra)
        folder.save(20, state_of(mesh, 20), extra | {"chain": "a0"})
        folder.wait()
        assert folder.last_error is None and folder.steps() == [10, 20]
        found = folder.restore(like(mesh))
    assert (found.step, found.extra, found.skipped) == (20, extra | {"chain": "a0"}, [])
    assert differences(found.state, numbers(20)) == []
    assert jax.tree.map(lambda x: x.sharding, found.state) == jax.tree.map(
        lambda x: x.sharding, like(mesh)
    )
    assert isinstance(found.state, State)


def test_the_arrays_may_be_given_away_as_soon_as_save_returns(tmp_path):
    mesh = mesh_of(1, 2, 4)
    spoil = jax.jit(lambda state: jax.tree.map(lambda x: -x, state), donate_argnums=0)
    with open_folder(tmp_path, keep=5) as folder:
        for step in range(1, 6):
            state = state_of(mesh, step)
            folder.save(step, state, {})
            jax.block_until_ready(spoil(state))
        for step in range(1, 6):
            found = folder.restore(like(mesh), step=step)
            assert differences(found.state, numbers(step)) == []


def test_a_save_does_not_wait_for_the_disk(tmp_path, monkeypatch):
    slow = threading.Event()
    described = files.described
    monkeypatch.setattr(files, "described", lambda *a: slow.wait(60) and described(*a))
    with open_folder(tmp_path) as folder:
        folder.save(10, state_of(None, 10), {})
        assert folder.steps() == [] and not slow.is_set()
        slow.set()
        folder.wait()
        assert folder.steps() == [10]


def test_hidden_transfers_may_be_forbidden_everywhere(tmp_path):
    state = state_of(None, 10)
    with jax.transfer_guard("disallow"), open_folder(tmp_path) as folder:
        folder.save(10, state, {}, wait=True)
        assert folder.last_error is None
        assert folder.restore(like(None)).step == 10


def test_a_notebook_with_a_running_loop_saves_and_restores(tmp_path, monkeypatch):
    async def cell():
        with open_folder(pathlib.Path("run")) as folder:
            folder.save(10, state_of(None, 10), {}, wait=True)
            return folder.last_error, folder.restore(like(None))

    monkeypatch.chdir(tmp_path)  # and its paths are relative
    error, found = asyncio.run(cell())
    assert error is None and differences(found.state, numbers(10)) == []


def test_what_json_cannot_say_is_refused_at_once(tmp_path):
    with open_folder(tmp_path) as folder:
        with pytest.raises(TypeError, match="not JSON serializable"):
            folder.save(10, state_of(None, 10), {"key": jax.random.key(0)})
        assert folder.steps() == []


@pytest.mark.parametrize(
    "steps, keep, keep_every, gone",
    [
        ([10], 1, None, []),
        ([10, 20, 30], 1, None, [10, 20]),
        ([10, 20, 30], 3, None, []),
        ([30, 10, 20, 40], 2, None, [10, 20]),
        ([10, 20, 30, 40, 50], 1, 20, [10, 30]),
        ([0, 10], 1, 20, []),
    ],
)
def test_the_newest_and_every_nth_are_kept(steps, keep, keep_every, gone):
    assert retention.old(steps, keep, keep_every) == gone


def test_older_checkpoints_go_when_a_newer_one_is_there(tmp_path):
    with open_folder(tmp_path, keep=2, keep_every=20) as folder:
        for step in (10, 20, 30, 40, 50):
            folder.save(step, state_of(None, step), {}, wait=True)
        assert folder.steps() == [20, 40, 50]
        assert folder.restore(like(None), before=49).step == 40


@pytest.mark.parametrize(
    "changes, steps",
    [({"every": None}, []), ({}, [10, 20]), ({"every": 7}, [7, 14, 21])],
)
def test_checkpoints_are_due_at_multiples(tmp_path, changes, steps):
    with open_folder(tmp_path, **changes) as folder:
        assert [step for step in range(1, 22) if folder.due(step)] == steps


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"keep": 0}, "checkpoint.keep=0 must be at least 1"),
        ({"every": 0}, "checkpoint.every=0 must be at least 1"),
        ({"timeout": 0}, "checkpoint.timeout=0 seconds must be positive"),
    ],
)
def test_numbers_that_make_no_sense(changes, message):
    with pytest.raises(ValueError, match=message):
        Checkpoints(**changes)


def test_a_step_is_saved_once(tmp_path):
    """As when a signal comes at a step that was just saved, or while it is being saved."""
    with open_folder(tmp_path) as folder:
        folder.save(10, state_of(None, 10), {"seen": 1})
        folder.save(10, state_of(None, 10), {"seen": 2}, wait=True)
        assert folder.restore(like(None)).extra == {"seen": 1}


def test_a_run_that_went_back_replaces_what_it_left(tmp_path):
    saved(tmp_path, 10, 20, 30)
    with open_folder(tmp_path) as folder:
        folder.save(20, state_of(None, 21), {}, wait=True)  # over that of the job before
        assert differences(folder.restore(like(None), step=20).state, numbers(21)) == []
        assert folder.discard_after(10) == [20, 30] and folder.steps() == [10]
        folder.save(20, state_of(None, 22), {}, wait=True)
        found = folder.restore(like(None))
    assert found.step == 20 and differences(found.state, numbers(22)) == []


def test_what_killed_jobs_left_is_removed_and_said(tmp_path):
    saved(tmp_path, 10)
    for name in ("00000020.0123abcd.saving", "00000005.removed"):
        (tmp_path / name / "d").mkdir(parents=True)
    (tmp_path / "notes.saving").mkdir()
    said = []
    with open_folder(tmp_path, say=said.append):
        left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["00000010", "lock", "notes.saving"], "what is not ours is not touched"
    assert "removed 00000005.removed, 00000020.0123abcd.saving" in said[0]


def test_a_save_that_lacked_nothing_but_its_name_is_a_checkpoint(tmp_path):
    """As when a job is killed while it replaces a checkpoint of the same step."""
    saved(tmp_path, 10)
    (tmp_path / "00000010").rename(tmp_path / "00000010.0123abcd.saving")
    (tmp_path / "00000010.removed").mkdir()
    with open_folder(tmp_path) as folder:
        assert folder.steps() == [10]
        assert differences(folder.restore(like(None)).state, numbers(10)) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000010"]


def test_who_only_reads_needs_no_lock_and_changes_nothing(tmp_path):
    saved(tmp_path, 10, 20)
    (tmp_path / "00000020" / "_METADATA").unlink()
    before = sorted(tmp_path.rglob("*"))
    with open_folder(tmp_path / "none", writable=False) as reader:
        assert reader.restore(like(None)) is None
    with open_folder(tmp_path) as _, open_folder(tmp_path, writable=False) as reader:
        assert reader.restore(like(None)).step == 10
        with pytest.raises(ValueError, match="opened to restore only"):
            reader.save(30, state_of(None, 30), {})
    assert sorted(tmp_path.rglob("*")) == before


# What a checkpoint is refused for.


def refused(path, wanted, identity=IDENTITY, **options):
    with open_folder(path, identity=identity) as folder, pytest.raises(Mismatch) as raised:
        folder.restore(wanted, **options)
    assert retention.steps(path) == [10], "it is not damaged"
    return raised.value


def changed(name, **changes):
    """What to restore, with one array of another shape or dtype."""
    state = like(None)
    x = state.params["head"][name]
    described = {"shape": x.shape, "dtype": x.dtype} | changes
    state.params["head"][name] = jax.ShapeDtypeStruct(**described)
    return state


@pytest.mark.parametrize(
    "make, line",
    [
        (
            lambda: changed("kernel", shape=(2, 64, 96)),
            "params.head.kernel: float32[2, 64, 192] in the checkpoint, float32[2, 64, 96] here",
        ),
        (
            lambda: changed("embed", dtype=np.float32),
            "params.head.embed: bfloat16[64, 16] in the checkpoint, float32[64, 16] here",
        ),
        (
            lambda: State(like(None).step, like(None).params, ()),
            "moments.0.bias: float32[24] in the checkpoint, nothing here",
        ),
        (
            lambda: like(None, ema=True),
            "ema.head.bias: nothing in the checkpoint, float32[24] here",
        ),
    ],
)
def test_another_size_dtype_optimiser_or_average_is_refused(tmp_path, make, line):
    saved(tmp_path, 10)
    error = refused(tmp_path, make())
    assert line in error.differences
    assert str(tmp_path / "00000010") in str(error) and "\n  " + line in str(error)


def test_another_config_is_refused_and_its_fields_are_named(tmp_path):
    saved(tmp_path, 10)
    error = refused(tmp_path, like(None), {"model": {"width": 96}, "optim": {"name": "adam"}})
    assert error.differences == [
        "model.width: 64 in the checkpoint, 96 here",
        "model.depth: 2 in the checkpoint, nothing here",
    ]


def test_five_differences_are_shown_and_the_others_counted(tmp_path):
    saved(tmp_path, 10)
    error = refused(tmp_path, State(like(None).step, {}, ()))
    assert len(error.differences) == 9
    assert str(error).count(" in the checkpoint, ") == 5 and "\n  and 4 more\n" in str(error)


def test_an_average_switched_on_begins_as_the_parameters(tmp_path):
    mesh = mesh_of(1, 2, 4)
    saved(tmp_path, 10, mesh=mesh)
    with open_folder(tmp_path) as folder:
        found = folder.restore(like(mesh, ema=True), optional={"ema": "params"})
    assert (found.filled, found.dropped) == (("ema",), ())
    assert differences(found.state.ema, numbers(10).params) == []
    jax.block_until_ready(jax.jit(lambda x: x, donate_argnums=0)(found.state.params))
    assert differences(found.state.ema, numbers(10).params) == [], "it has arrays of its own"


def test_an_average_switched_on_begins_as_it_is_told(tmp_path):
    saved(tmp_path, 10)
    mesh = mesh_of(1, 1, 2)
    begun = state_of(mesh, 7, ema=True).ema
    wanted = like(mesh, ema=True)
    with open_folder(tmp_path) as folder:
        found = folder.restore(wanted, optional={"ema": begun})
        assert differences(found.state.ema, jax.tree.map(np.asarray, begun)) == []
        assert differences(found.state.params, numbers(10).params) == []
        with pytest.raises(ValueError, match=r"ema cannot be filled: .* ema.head.bias "):
            folder.restore(wanted, optional={"ema": {"tail": begun["head"]}})


def test_an_average_switched_off_is_not_read(tmp_path):
    with open_folder(tmp_path) as folder:
        folder.save(10, state_of(None, 10, ema=True), {}, wait=True)
        found = folder.restore(like(None), optional={"ema": None})
    assert (found.filled, found.dropped) == ((), ("ema",))
    assert found.state.ema is None and differences(found.state, numbers(10)) == []


def test_another_schema_is_refused_or_migrated(tmp_path, monkeypatch):
    saved(tmp_path, 10)
    monkeypatch.setattr(manifest, "SCHEMA", 3)
    assert refused(tmp_path, like(None)).differences == ["schema: 1 in the checkpoint, 3 here"]

    def renamed(content):
        return content | {"extra": {"data": content["extra"]}}

    monkeypatch.setattr(manifest, "MIGRATIONS", {1: renamed, 2: dict})
    with open_folder(tmp_path) as folder:
        assert folder.restore(like(None)).extra == {"data": {"seen": 10}}


# One job at a time.


@contextlib.contextmanager
def another(path):
    """Another process that holds the folder."""
    with process("hold", path, stdout=subprocess.PIPE) as holder:
        try:
            assert holder.stdout.readline() == "held\n"
            yield holder
        finally:
            holder.kill()


def test_a_second_job_is_refused_and_told_whose_the_folder_is(tmp_path):
    with another(tmp_path) as holder:
        pattern = rf"is in use by process {holder.pid} on .*, since 20.*choose another folder"
        with pytest.raises(Held, match=pattern):
            open_folder(tmp_path)
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        saved(tmp_path, 10)  # what the dead one held is taken over
    assert not (tmp_path / "lock").exists()


def test_a_second_folder_in_the_same_process_is_refused(tmp_path):
    with open_folder(tmp_path), pytest.raises(Held, match=f"process {os.getpid()} on"):
        open_folder(tmp_path)
    open_folder(tmp_path).close()


def far(**owner):
    """What a job of another host writes into a lock's file."""
    return json.dumps({"pid": 1, "host": "far", "started": "then"} | owner)


def left_by(path, **owner):
    """A lock's file, as a job left it."""
    (path / "lock").write_text(far(**owner))


def test_a_job_on_another_host_that_counts_is_alive(tmp_path):
    """Where the file system carries no locks from host to host."""
    stop = threading.Event()
    left_by(tmp_path, count=0)
    size = (tmp_path / "lock").stat().st_size

    def count():
        # In place, as a holder does: the file is never empty, and never another one.
        with open(tmp_path / "lock", "r+b", buffering=0) as file:
            for number in itertools.count(1):
                os.pwrite(file.fileno(), far(count=number).ljust(size).encode(), 0)
                if stop.wait(0.01):
                    return

    counting = threading.Thread(target=count)
    counting.start()
    try:
        with pytest.raises(Held, match="process 1 on far, since then"):
            Lock(tmp_path, beat=0.1, patience=10)
    finally:
        stop.set()
        counting.join()


def test_a_job_on_another_host_that_counts_no_more_is_dead(tmp_path, caplog):
    left_by(tmp_path, count=3)
    with Lock(tmp_path, beat=0.1, patience=0.2):
        assert "was left by process 1 on far, since then, which is gone" in caplog.text
        owner = json.loads((tmp_path / "lock").read_text())
        assert owner["pid"] == os.getpid()


def test_the_holder_counts(tmp_path):
    with Lock(tmp_path, beat=0.01):
        while json.loads((tmp_path / "lock").read_text())["count"] < 3:
            pass


def test_without_locks_the_process_is_asked_whether_it_lives(tmp_path, monkeypatch):
    def none(file, how):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with Lock(tmp_path):
        with pytest.raises(Held, match=f"process {os.getpid()} on"):
            Lock(tmp_path)
        # A process of the same number that was born later is another one.
        owner = json.loads((tmp_path / "lock").read_text())
        if owner["born"] is not None:
            (tmp_path / "lock").write_text(json.dumps(owner | {"born": "1"}))
            Lock(tmp_path).close()
    dead = subprocess.Popen(["true"])
    dead.wait()
    left_by(tmp_path, pid=dead.pid, host=os.uname().nodename)
    Lock(tmp_path).close()


def test_a_lock_that_only_a_child_of_the_dead_has_is_taken_over(tmp_path):
    """As the processes that decode images, when what started them was killed."""
    with another(tmp_path) as holder:
        file = os.open(tmp_path / "lock", os.O_RDWR)  # the test plays the child
        holder.kill()
        holder.wait()
        fcntl.flock(file, fcntl.LOCK_EX)
        with Lock(tmp_path) as lock, pytest.raises(Held):
            Lock(lock.path.parent)
        os.close(file)


def test_on_a_full_disk_the_lock_still_holds(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, "pwrite", full)
    with Lock(tmp_path), pytest.raises(Held, match="a job that left no name"):
        Lock(tmp_path)
