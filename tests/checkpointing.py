"""What the tests of checkpoints share: states whose every bit follows from their step.

Run as a module, this file is one of the processes that those tests start and kill.
"""

import dataclasses
import errno
import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from typing import Any, TextIO

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from collective_matmul import make_mesh
from models.checkpoint import Checkpoints, Folder, Held, arrays, files

ROOT = pathlib.Path(__file__).parents[1]
IDENTITY = {"model": {"width": 64, "depth": 2}, "optim": {"name": "adam"}}
# Names, dtypes, shapes and places. One array is larger than `files.SMALL`, others are in the tree
# of the database itself.
ARRAYS: dict[str, tuple[Any, tuple[int, ...], P]] = {
    "kernel": (np.float32, (2, 64, 192), P(None, "fsdp", "tensor")),
    "embed": (ml_dtypes.bfloat16, (64, 16), P("tensor", "fsdp")),
    "bias": (np.float32, (24,), P("tensor")),
    "scale": (np.float32, (), P()),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """As the trainer's: a counter, parameters, the optimiser's state, perhaps an average."""

    step: Any
    params: Any
    moments: Any
    ema: Any = None


def mesh_of(data: int, fsdp: int, tensor: int) -> jax.sharding.Mesh:
    """A mesh of the first devices."""
    return make_mesh(data, fsdp, tensor, devices=jax.devices()[: data * fsdp * tensor])


def numbers(step: int, *, ema: bool = False) -> State:
    """The values at a step, as numpy: random bits, among them infinities, nans and -0."""
    random = np.random.default_rng(step)

    def array(dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return np.frombuffer(random.bytes(size), dtype).reshape(shape)

    def tree() -> dict[str, Any]:
        return {name: array(dtype, shape) for name, (dtype, shape, _) in ARRAYS.items()}

    params, moments = {"head": tree()}, (tree(), np.int32(-1))
    return State(np.int32(step), params, moments, {"head": tree()} if ema else None)


def places(mesh: jax.sharding.Mesh, *, ema: bool = False) -> State:
    """Where the values lie."""
    tree = {name: NamedSharding(mesh, spec) for name, (_, _, spec) in ARRAYS.items()}
    whole = NamedSharding(mesh, P())
    return State(whole, {"head": tree}, (tree, whole), {"head": tree} if ema else None)


def state_of(mesh: jax.sharding.Mesh | None, step: int, *, ema: bool = False) -> State:
    """The state at a step, on a mesh or on one device."""
    values = numbers(step, ema=ema)
    if mesh is None:
        return jax.tree.map(jnp.asarray, values)

    def put(x: Any, place: NamedSharding) -> jax.Array:
        return jax.make_array_from_callback(np.shape(x), place, lambda index: np.asarray(x)[index])

    return jax.tree.map(put, values, places(mesh, ema=ema))


def like(mesh: jax.sharding.Mesh | None, *, ema: bool = False) -> State:
    """What to restore."""
    values = numbers(0, ema=ema)
    if mesh is None:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype), values)
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=place),
        values,
        places(mesh, ema=ema),
    )


def differences(state: Any, expected: Any) -> list[str]:
    """The names of arrays of which this process holds other bits than expected."""
    found = []
    pairs = zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(expected), strict=True)
    for (path, x), wanted in pairs:
        for piece in x.addressable_shards:
            part = np.ascontiguousarray(np.asarray(wanted)[piece.index])
            if np.asarray(piece.data).tobytes() != part.tobytes() or x.dtype != wanted.dtype:
                found.append(jax.tree_util.keystr(path))
    return found


def open_folder(path: pathlib.Path, **changes: Any) -> Folder:
    """The folder of a run that saves every 10 steps."""
    said = changes.pop("say", lambda message: None)
    identity = changes.pop("identity", IDENTITY)
    writable = changes.pop("writable", True)
    config = Checkpoints(**{"every": 10, "keep": 3} | changes)
    return Folder(path, config, identity=identity, say=said, writable=writable)


def saved(path: pathlib.Path, *steps: int, mesh: jax.sharding.Mesh | None = None) -> None:
    """Checkpoints of these steps."""
    with open_folder(path, keep=len(steps)) as folder:
        for step in steps:
            folder.save(step, state_of(mesh, step), {"seen": step}, wait=True)
            assert folder.last_error is None


def process(*arguments: object, **options: Any) -> subprocess.Popen[str]:
    """This file as a process: one of the functions below, by name."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.checkpointing", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        text=True,
        **options,
    )


def hold(path: str) -> None:
    """Holds a folder until it is killed."""
    with open_folder(pathlib.Path(path)):
        print("held", flush=True)
        signal.pause()


def save_until_killed(path: str, told: TextIO) -> None:
    """Restores the newest checkpoint, checks it, says which, and saves without end."""
    with open_folder(pathlib.Path(path)) as folder:
        found = folder.restore(like(None))
        step = found.step if found else 0
        wrong = differences(found.state, numbers(step)) if found else []
        skipped = [str(damage) for damage in found.skipped] if found else []
        told.write(json.dumps({"step": step, "wrong": wrong, "skipped": skipped}) + "\n")
        step += 1
        folder.save(step, state_of(None, step), {"seen": step}, wait=True)
        told.write(json.dumps({"begun": folder.last_error}) + "\n")
        while True:
            step += 1
            folder.save(step, state_of(None, step), {"seen": step})


def kill_often(path: str, rounds: str) -> None:
    """Starts `save_until_killed` again and again, and ends it with SIGKILL at random moments.

    Processes are forked from this one, which has imported everything and runs no threads. Prints a
    list of rounds: what was found at the start, and what was there after the kill.
    """
    random = np.random.default_rng(0)
    folder, told = pathlib.Path(path), []
    for _ in range(int(rounds)):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            save_until_killed(path, os.fdopen(writer, "w", buffering=1))
        os.close(writer)
        with os.fdopen(reader) as pipe:
            found = json.loads(pipe.readline()) | json.loads(pipe.readline())
            time.sleep(random.uniform(0, 0.2))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
        told.append(found | {"left": names})
    print(json.dumps(told))


def one_of_two(number: str, port: str, path: str) -> None:
    """Joins another process of two devices, and goes through all that two may meet together.

    Prints in its last line a dictionary of what happened, which the test judges.
    """
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(f"localhost:{port}", 2, int(number), initialization_timeout=120)
    leader = int(number) == 0
    root, mesh, other = pathlib.Path(path), mesh_of(1, 2, 2), mesh_of(1, 1, 4)
    seen: dict[str, Any] = {}

    # Saved on one mesh and restored on another, while a third job is kept out.
    with open_folder(root / "run", every=10**6, retry=2, timeout=60) as folder:
        for step in (10, 20):
            folder.save(step, state_of(mesh, step), {"seen": step})
        folder.wait()
        seen["saved"] = [folder.last_error, folder.steps()]
        found = folder.restore(like(other))
        assert found is not None
        seen["restored"] = [found.step, found.extra, differences(found.state, numbers(20))]
        try:
            open_folder(root / "run")
        except Held as error:
            seen["held"] = str(error)

        # The second process alone cannot write. It is `due` on both at the same step.
        described = files.described
        if not leader:
            files.described = fail
        folder.save(30, state_of(mesh, 30), {"seen": 30})
        seen["due"] = next(step for step in itertools.count(31) if folder.due(step))
        seen["failed"] = folder.last_error
        files.described = described
        folder.save(32, state_of(mesh, 32), {"seen": 32}, wait=True)
        seen["again"] = [folder.last_error, folder.steps()]

    # Only the second process finds what is wrong with the newest.
    with open_folder(root / "run", timeout=60) as folder:
        read = arrays.read
        if not leader:
            arrays.read = fail_at_32
        found = folder.restore(like(mesh))
        arrays.read = read
        assert found is not None
        seen["walked"] = [found.step, [str(damage) for damage in found.skipped], folder.steps()]
        seen["walked"].append(differences(found.state, numbers(20)))
        seen["discarded"] = [folder.discard_after(10), folder.steps()]
        folder.save(40, state_of(other, 40), {"seen": 40}, wait=True)
    print(json.dumps(seen), flush=True)


def fail(*arguments: Any) -> Any:
    """As on a full disk."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fail_at_32(path: pathlib.Path, wanted: Any) -> Any:
    """As where one host cannot read what others can."""
    if path.name == "00000032":
        raise ValueError("pages of text")
    return read_arrays(path, wanted)


read_arrays = arrays.read

if __name__ == "__main__":
    {"hold": hold, "kill_often": kill_often, "one_of_two": one_of_two}[sys.argv[1]](*sys.argv[2:])
