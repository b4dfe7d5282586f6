"""One of the two processes: times products over an axis of two, overlapped and in their parts.

    python -m bench.measured.sockets_worker REQUEST OUT      (as JSON, and a file; see `sockets`)

For each product, schedule and number of chunks there are three programs: the collective product in
so many calls, each of a slice of what travels; the same slices' travel alone; and the same slices'
products alone. They take turns, so that a busy machine slows all three.

    hidden = (travel + products - overlapped) / min(travel, products)

is the share of the shorter that passed under the longer: 0 one after the other, 1 all of it.
"""

from __future__ import annotations

import json
import os
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import collective_matmul as cm
from bench.measured.timing import once
from collective_matmul import algorithms

AXIS = "tensor"
T = 2  # devices: one a process
WARMUP = 2
Schedule = Mapping[str, Any]  # backend and algorithm
Sizes = tuple[int, int, int]


class Program(NamedTuple):
    """What one device does with its arrays, the whole arrays' shapes, and how they are cut."""

    function: Callable[..., jax.Array]
    shapes: tuple[tuple[int, ...], ...]
    places: tuple[P, ...]
    out: P


def gather(sizes: Sizes, chunks: int, schedule: Schedule) -> dict[str, Program]:
    """`y = all_gather(lhs) . rhs`, each of `chunks` slices of a device's rows by its own call.

    Args:
      sizes: m, k, n of the whole product: lhs [m/2, k], rhs [k, n], y [m, n] on a device.
      chunks: slices of lhs.
      schedule: backend and algorithm.

    Returns:
      "overlapped", "travel" and "products": the programs of the module's docstring.
    """
    m, k, n = sizes

    def overlapped(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        slices = jnp.split(lhs, chunks)
        return _in_order([cm.all_gather_matmul(x, rhs, AXIS, **schedule) for x in slices])

    def travel(lhs: jax.Array) -> jax.Array:
        slices = jnp.split(lhs, chunks)
        return _in_order([cm.all_gather(x, AXIS, dim=0, **schedule) for x in slices])

    def products(whole: jax.Array, rhs: jax.Array) -> jax.Array:
        return jnp.concatenate([x @ rhs for x in jnp.split(whole, T * chunks)])

    cut, whole = P(AXIS), P()
    return {
        "overlapped": Program(overlapped, ((m, k), (k, n)), (cut, whole), cut),
        "travel": Program(travel, ((m, k),), (cut,), cut),
        "products": Program(products, ((m, k), (k, n)), (whole, whole), whole),
    }


def scatter(sizes: Sizes, chunks: int, schedule: Schedule) -> dict[str, Program]:
    """`y = reduce_scatter(lhs . rhs)`, each of `chunks` slices of a device's rows by its own call.

    Args:
      sizes: m, k, n of the whole product: lhs [m, k/2], rhs [k/2, n], y [m/2, n] on a device.
      chunks: slices of y.
      schedule: backend and algorithm.

    Returns:
      As `gather`.
    """
    m, k, n = sizes

    def overlapped(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        slices = _of_every_device(lhs, chunks)
        sums = [cm.matmul_reduce_scatter(x, rhs, AXIS, **schedule) for x in slices]
        return jnp.concatenate(sums)

    def travel(addend: jax.Array) -> jax.Array:
        slices = _of_every_device(addend, chunks)
        sums = [cm.reduce_scatter(x, AXIS, dim=0, **schedule) for x in slices]
        return jnp.concatenate(sums)

    def products(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        return jnp.concatenate([x @ rhs for x in jnp.split(lhs, T * chunks)])

    columns, rows = P(None, AXIS), P(AXIS)
    return {
        "overlapped": Program(overlapped, ((m, k), (k, n)), (columns, rows), rows),
        "travel": Program(travel, ((m, T * n),), (columns,), rows),
        "products": Program(products, ((m, k), (k, n)), (columns, rows), columns),
    }


PRODUCTS = {"gather of rows": gather, "scatter of rows": scatter}


def schedules() -> dict[str, Schedule]:
    """The plain collective, and the algorithms: one of each kind that there is on two devices.

    Several algorithms are the same lanes there; they are timed once, under all their names.
    """
    named: dict[Any, list[str]] = {}
    for name in algorithms.names():
        named.setdefault(algorithms.lanes(name, T), []).append(name)
    found: dict[str, Schedule] = {"plain collective": {"backend": "unfused", "algorithm": None}}
    for names in named.values():
        found[", ".join(names)] = {"backend": "xla", "algorithm": names[0]}
    return found


def compiled(program: Program, mesh: Mesh) -> Callable[[], jax.Array]:
    """The program, compiled, on operands of random numbers that lie where they belong."""
    rng = np.random.default_rng(0)
    operands = []
    for shape, place in zip(program.shapes, program.places, strict=True):
        values = rng.normal(size=shape).astype(np.float32)  # the same in both processes
        at = NamedSharding(mesh, place)
        operands.append(jax.make_array_from_callback(shape, at, values.__getitem__))
    function = jax.shard_map(
        program.function, mesh=mesh, in_specs=program.places, out_specs=program.out
    )
    run = jax.jit(function).lower(*operands).compile()
    return lambda: run(*operands)


def time_all(request: Mapping[str, Any], mesh: Mesh) -> list[dict[str, Any]]:
    """Seconds of every program of the request, a list of rounds each.

    Args:
      request: "products": {name: [m, k, n]}, "chunks": numbers, "rounds".
      mesh: two devices on `AXIS`.
    """
    meeting = compiled(Program(lambda x: jax.lax.psum(x, AXIS), ((T,),), (P(AXIS),), P()), mesh)
    rows = []
    for product, sizes in request["products"].items():
        for name, schedule in schedules().items():
            for chunks in request["chunks"]:
                programs = PRODUCTS[product](tuple(sizes), chunks, schedule)
                calls = {key: compiled(x, mesh) for key, x in programs.items()}
                taken: dict[str, list[float]] = {key: [] for key in calls}
                for _ in range(WARMUP + request["rounds"]):
                    for key, call in calls.items():
                        jax.block_until_ready(meeting())
                        taken[key].append(once(call, jax.block_until_ready))
                times = {key: seconds[WARMUP:] for key, seconds in taken.items()}
                rows.append({"product": product, "schedule": name, "chunks": chunks} | times)
    return rows


def _in_order(gathered: list[jax.Array]) -> jax.Array:
    """Slices of every device, one call after the other -> rows in the order of the devices."""
    shape = gathered[0].shape
    parts = [x.reshape(T, shape[0] // T, *shape[1:]) for x in gathered]
    return jnp.concatenate(parts, axis=1).reshape(-1, *shape[1:])


def _of_every_device(lhs: jax.Array, chunks: int) -> list[jax.Array]:
    """[m, k] -> `chunks` arrays [m / chunks, k], each with a slice of every device's rows."""
    m, k = lhs.shape
    parts = lhs.reshape(T, chunks, m // (T * chunks), k)
    return [parts[:, i].reshape(m // chunks, k) for i in range(chunks)]


def main(request: Mapping[str, Any], out: pathlib.Path) -> None:
    """Joins the other process, times everything and writes it to `out`."""
    jax.distributed.initialize(
        request["coordinator"],
        T,
        request["rank"],
        coordinator_bind_address=request["coordinator"],
        initialization_timeout=60,
    )
    out.write_text(json.dumps(time_all(request, Mesh(np.array(jax.devices()), (AXIS,)))))


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    # Before the first computation: XLA counts the cores that it may use when it makes its threads.
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[asked["rank"] % len(cores)]})
    if asked["nice"]:
        os.nice(asked["nice"])
        group = pathlib.Path("/proc/self/autogroup")  # where there are groups, niceness is theirs
        if group.exists():
            group.write_text(str(asked["nice"]))
    main(asked, pathlib.Path(sys.argv[2]))
