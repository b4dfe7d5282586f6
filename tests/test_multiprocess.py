"""The primitive over the devices of two processes gives the numbers of one process, and numpy's.

Run as a script, this file is one of the processes: it runs every scenario and leaves, for each
array, the shards that it can see. A scenario is a function of nothing that gives global arrays.

Nothing here is compared with `lax.psum_scatter`: between processes the CPU's gives wrong numbers.
"""

import functools
import os
import pathlib
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import collective_matmul as cm
from collective_matmul import algorithms

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[1]
PATIENCE = 240  # seconds until processes that hang are ended
B, S, D, F = 2, 16, 6, 16

# Eight devices, the first four of the first process: the ring crosses from one to the other twice,
# or each process has a ring of its own and they share the weights, or every hop crosses.
MESHES = {
    "ring over both": ((1, 8), ("d", "t"), "in order"),
    "ring in each": ((2, 4), ("d", "t"), "in order"),
    "every hop crosses": ((1, 8), ("d", "t"), "by turns"),
}


def operands():
    rng = np.random.default_rng(0)
    shapes = ((B, S, D), (D, F), (F, D))
    return [(rng.normal(size=shape) / shape[-1] ** 0.5).astype(np.float32) for shape in shapes]


def layer(x, w, v, **options):
    hidden = cm.collective_einsum("bsd,df->bsf", x, w, "t", gather_lhs="s", **options)
    return x + cm.collective_einsum("bsf,fd->bsd", jnp.tanh(hidden), v, "t", scatter="s", **options)


def primitive():
    """A layer of a gather and a scatter, and its gradients, by every algorithm on every mesh."""
    specs = (P("d", "t"), P(None, "t"), P("t"))
    results = {}
    for name, (shape, names, order) in MESHES.items():
        devices = np.array(jax.devices()[:8])
        if order == "by turns":
            devices = devices.reshape(2, 4).T
        mesh = Mesh(devices.reshape(shape), names, axis_types=(AxisType.Auto,) * 2)
        shardings = [NamedSharding(mesh, spec) for spec in specs]
        placed = [
            jax.make_array_from_callback(x.shape, at, lambda index, x=x: x[index])
            for x, at in zip(operands(), shardings, strict=True)
        ]
        for algorithm in algorithms.names():
            run = jax.shard_map(
                functools.partial(layer, backend="xla", algorithm=algorithm),
                mesh=mesh, in_specs=specs, out_specs=specs[0],
            )  # fmt: skip

            @jax.jit
            def both(x, w, v, run=run):
                y, pull = jax.vjp(run, x, w, v)
                return y, *pull(y)

            arrays = jax.block_until_ready(both(*placed))  # gloo runs one program at a time
            for key, y in zip(("y", "dx", "dw", "dv"), arrays, strict=True):
                results[f"{name}, {algorithm}: {key}"] = y
    return results


SCENARIOS = [primitive]


def one_of_two(number, port, out):
    """Joins the other process and runs the scenarios."""
    jax.config.update("jax_num_cpu_devices", 4)
    jax.distributed.initialize(
        f"localhost:{port}", 2, int(number), initialization_timeout=120,
        coordinator_bind_address=f"localhost:{port}",
    )  # fmt: skip
    assert jax.process_count() == 2
    assert len(jax.devices()) == 8
    shards = {}
    for scenario in SCENARIOS:
        for name, array in scenario().items():
            whole = np.full(array.shape, np.nan, array.dtype)  # what the other process holds
            for shard in array.addressable_shards:
                whole[shard.index] = shard.data
            shards[name] = whole
    np.savez(out, **shards)


def in_two_processes(folder):
    """What each of two processes saw of the arrays of all scenarios."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    outs = [folder / f"{number}.npz" for number in range(2)]
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(number), str(port), str(out)],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number, out in enumerate(outs)
    ]
    try:
        output = [process.communicate(timeout=PATIENCE)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for process, text in zip(processes, output, strict=True):
        assert process.returncode == 0, text
    return [dict(np.load(out)) for out in outs]


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    return in_two_processes(tmp_path_factory.mktemp("two"))


def wanted():
    """The layer and its gradients, with itself as the cotangent, by numpy in float64."""
    x, w, v = (a.astype(np.float64) for a in operands())
    hidden = np.tanh(x @ w)
    y = x + hidden @ v
    d_hidden = (y @ v.T) * (1 - hidden**2)
    return dict(
        y=y,
        dx=y + d_hidden @ w.T,
        dw=np.einsum("bsd,bsf->df", x, d_hidden),
        dv=np.einsum("bsf,bsd->fd", hidden, y),
    )


def test_what_the_processes_hold_is_the_whole_and_agrees(seen):
    first, second = seen
    assert first.keys() == second.keys()
    assert len(first) == len(MESHES) * len(algorithms.names()) * 4
    for name in first:
        held = [~np.isnan(x[name]) for x in seen]
        assert (held[0] | held[1]).all(), name
        both = held[0] & held[1]  # weights of "ring in each"
        np.testing.assert_array_equal(first[name][both], second[name][both], err_msg=name)


def whole(seen, name):
    first, second = (x[name] for x in seen)
    return np.where(np.isnan(first), second, first)


def test_the_numbers_are_those_of_numpy(seen):
    want = wanted()
    for name in seen[0]:
        exact = want[name.split(": ")[1]]
        np.testing.assert_allclose(whole(seen, name), exact, rtol=1e-5, atol=1e-5, err_msg=name)


def test_the_numbers_are_those_of_one_process(seen):
    for name, array in primitive().items():
        np.testing.assert_allclose(whole(seen, name), array, rtol=1e-6, atol=1e-6, err_msg=name)


if __name__ == "__main__":
    one_of_two(*sys.argv[1:])
