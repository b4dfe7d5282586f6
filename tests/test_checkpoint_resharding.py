"""A checkpoint belongs to no mesh: saved on any, it is restored on any other, bit for bit."""

import itertools
import json
import socket
import subprocess

import pytest

from models.checkpoint import manifest

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

MESHES = [(1, 2, 4), (1, 4, 2), (1, 8, 1), (1, 1, 8), (2, 2, 2), (1, 2, 2), (1, 1, 4), (1, 2, 1)]


def mesh(sizes):
    return mesh_of(*sizes) if sizes else None


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{mesh: folder with a checkpoint from it}."""
    root = tmp_path_factory.mktemp("meshes")
    for number, sizes in enumerate([*MESHES, None]):
        saved(root / str(number), 10, mesh=mesh(sizes))
    return {sizes: root / str(number) for number, sizes in enumerate([*MESHES, None])}


CHAINS = [
    [(1, 2, 4), (1, 1, 4), (1, 2, 1), None, (1, 2, 1), (1, 1, 4), (1, 2, 4)],  # 8, 4, 2, 1 and back
    [(1, 2, 4), (1, 4, 2), (1, 8, 1), (1, 1, 8), (2, 2, 2)],  # the same devices in other meshes
]


@pytest.mark.parametrize("chain", CHAINS, ids=["fewer", "transposed"])
def test_from_mesh_to_mesh(folders, chain):
    for before, after in itertools.pairwise(chain):
        with open_folder(folders[before]) as folder:
            found = folder.restore(like(mesh(after)))
        assert differences(found.state, numbers(10)) == [], f"{before} to {after}"
        assert found.skipped == []


def test_the_manifest_is_the_same_from_every_mesh(folders):
    one, *others = (manifest.read(path / "00000010").arrays for path in folders.values())
    assert set(one) >= {"step", "params.head.kernel", "moments.0.embed", "moments.1"}
    assert all(other == one for other in others)


def test_each_device_gets_its_piece_alone(folders):
    with open_folder(folders[None]) as folder:
        found = folder.restore(like(mesh_of(1, 2, 4)))
    kernel = found.state.params["head"]["kernel"]
    assert {piece.data.shape for piece in kernel.addressable_shards} == {(2, 32, 48)}


def test_what_was_restored_is_saved_from_where_it_is_now(tmp_path):
    state = state_of(mesh_of(1, 2, 4), 1)
    for number, sizes in enumerate([(1, 4, 2), (1, 1, 4), None, (1, 8, 1)], start=1):
        with open_folder(tmp_path) as folder:
            folder.save(number, state, {"seen": sizes}, wait=True)
            found = folder.restore(like(mesh(sizes)))
        assert found.step == number and differences(found.state, numbers(1)) == [], sizes
        state = found.state


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two processes said, and the folder that they left."""
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    logs = [(folder / f"{number}.log").open("w+") for number in range(2)]
    processes = [
        process("one_of_two", number, port, folder, stdout=subprocess.PIPE, stderr=log)
        for number, log in enumerate(logs)
    ]
    try:
        said = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process_, log in zip(processes, logs, strict=True):
            process_.kill()
            process_.wait()
            log.seek(0)
            print(log.read())  # shown if the test fails
            log.close()
    assert [process.returncode for process in processes] == [0, 0]
    return [json.loads(text.splitlines()[-1]) for text in said], folder / "run"


def test_two_processes_save_and_restore_together(two):
    for seen in two[0]:
        assert seen["saved"] == [None, [10, 20]]
        assert seen["restored"] == [20, {"seen": 20}, []]
        assert "is in use by process" in seen["held"], "both are refused"


def test_one_of_two_cannot_write_and_both_know(two):
    for seen in two[0]:
        assert "process 1 could not write its part" in seen["failed"]
        assert seen["again"] == [None, [10, 20, 32]]
    assert two[0][0]["due"] == two[0][1]["due"], "or one would wait for the other for ever"
    assert two[0][0]["due"] % 2 == 0, "tried again two steps later, or four"


def test_one_of_two_cannot_read_and_both_walk_back(two):
    for seen in two[0]:
        step, skipped, steps, wrong = seen["walked"]
        assert (step, wrong) == (20, [])
        assert len(skipped) == 1 and "cannot be read (ValueError)" in skipped[0]
        assert 32 not in steps
        assert seen["discarded"] == [[20], [10]]


def test_each_process_writes_its_own_pieces(two):
    about = manifest.read(two[1] / "00000040")
    kernels = {"params.head.kernel", "moments.0.kernel"}
    written = {
        number: sum(
            file.size
            for name, file in about.files.items()
            if name.startswith(f"ocdbt.process_{number}/") and kernels & set(file.holds)
        )
        for number in range(2)
    }
    size = 2 * 2 * 64 * 192 * 4
    assert all(0.45 * size < half < 0.65 * size for half in written.values()), written


@pytest.mark.parametrize("sizes", [(1, 1, 4), (1, 2, 4), None])
def test_one_process_restores_what_two_saved(two, sizes):
    with open_folder(two[1]) as folder:
        found = folder.restore(like(mesh(sizes)))
    assert found.step == 40 and found.skipped == []
    assert differences(found.state, numbers(40)) == []
