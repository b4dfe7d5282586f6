"""The programs of published measurements, rebuilt: `name(devices, **arguments) -> (mesh, lowered)`.

Each is written from what its source describes, and says where it differs. Arrays are abstract: the
programs are lowered for devices that need not exist.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.stages import Lowered

from bench.predicted.programs import training_step
from collective_matmul import Layout, make_mesh
from models import vit
from models.config import Config
from models.optim import Optim

Devices = Sequence[Any]
Program = tuple[Mesh, Lowered]


def product(devices: Devices, *, n: int) -> Program:
    """`a @ b` of `[n, n]` bfloat16 on one device."""
    mesh = _mesh(np.array(devices[:1]), "one")
    x = _spread(mesh, (n, n), jnp.bfloat16, P())
    return mesh, jax.jit(lambda a, b: a @ b).lower(x, x)


def copy(devices: Devices, *, elements: int) -> Program:
    """A copy of `elements` bfloat16 from HBM to HBM on one device."""
    mesh = _mesh(np.array(devices[:1]), "one")
    return mesh, jax.jit(lambda x: x.copy()).lower(_spread(mesh, (elements,), jnp.bfloat16, P()))


def gather_over_chips(devices: Devices, *, rows: int) -> Program:
    """All-gather of float32 `[rows, 8, 128]` over the chips, for each device of a chip apart."""
    chips, cores = [], sorted({device.core_on_chip for device in devices})
    for core in cores:
        chips.append([device for device in devices if device.core_on_chip == core])
    mesh = _mesh(np.array(chips).T, "chip", "core")
    gather = functools.partial(lax.all_gather, axis_name="chip", tiled=True)
    mapped = jax.shard_map(
        gather, mesh=mesh, in_specs=P("chip"), out_specs=P(None), check_vma=False
    )
    x = _spread(mesh, (rows * mesh.shape["chip"], 8, 128), jnp.float32, P("chip"))
    return mesh, jax.jit(mapped).lower(x)


def permutes(devices: Devices, *, kib: int, repeats: int) -> Program:
    """Every device sends `kib` KiB of bfloat16 to the next of a ring of neighbours, repeatedly.
    (The published program is a loop, whose times are slopes over its length.)"""
    mesh = make_mesh(tensor=len(devices), devices=devices)
    t = len(devices)
    ring = [(i, (i + 1) % t) for i in range(t)]

    def chain(x: jax.Array) -> jax.Array:
        for _ in range(repeats):
            x = lax.optimization_barrier(lax.ppermute(x, "tensor", ring))
        return x

    x = _spread(mesh, (t * kib * 1024 // (2 * 128), 128), jnp.bfloat16, P("tensor"))
    mapped = jax.shard_map(chain, mesh=mesh, in_specs=P("tensor"), out_specs=P("tensor"))
    return mesh, jax.jit(mapped).lower(x)


def book_local(devices: Devices) -> Program:
    """`A[1024@X, 2048] . W[2048, 8192@Y]`: the scaling book's product with nothing to gather."""
    mesh = _book_mesh(devices)
    return _book(mesh, P("X", None))


def book_plain(devices: Devices) -> Program:
    """`A[1024@X, 2048@Y] . W[2048, 8192@Y]`, which the compiler gathers first."""
    mesh = _book_mesh(devices)
    return _book(mesh, P("X", "Y"))


def book_collective(devices: Devices) -> Program:
    """The same product, one chunk of A at a time while the next one travels, in unrolled steps."""
    mesh = _book_mesh(devices)

    def chunks(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        t, size, here = 4, lhs.shape[1], lax.axis_index("Y")
        total = jnp.zeros((lhs.shape[0], rhs.shape[1]), lhs.dtype)
        for i in range(t):
            rows = lax.dynamic_slice_in_dim(rhs, (here + i) % t * size, size)
            total = total + lhs @ rows
            if i < t - 1:
                lhs = lax.ppermute(lhs, "Y", [(j, (j - 1) % t) for j in range(t)])
        return total

    a = _spread(mesh, (1024, 2048), jnp.int32, P("X", "Y"))
    w = _spread(mesh, (2048, 8192), jnp.int32, P(None, "Y"))
    specs: dict[str, Any] = {"in_specs": (P("X", "Y"), P(None, "Y")), "out_specs": P("X", "Y")}
    mapped = jax.shard_map(chunks, mesh=mesh, check_vma=False, **specs)
    return mesh, jax.jit(mapped).lower(a, w)


def maxtext_naive(devices: Devices) -> Program:
    """`[2, 8192@tp, 16384] . [16384, 128@tp, 128]`, partitioned by the compiler."""
    mesh = _maxtext_mesh(devices)
    out = NamedSharding(mesh, P(None, None, "tp", None))
    return mesh, jax.jit(_heads, out_shardings=out).lower(*_maxtext_operands(mesh))


def maxtext_collective(devices: Devices) -> Program:
    """The same, by half shards in both directions round the ring, in a loop of 3 steps."""
    mesh = _maxtext_mesh(devices)
    t = 4

    def chunks(x: jax.Array, kernel: jax.Array) -> jax.Array:
        here, size = lax.axis_index("tp"), x.shape[1]
        total = jnp.zeros((x.shape[0], size * t, *kernel.shape[1:]), x.dtype)
        total = lax.dynamic_update_slice(total, _heads(x, kernel), (0, here * size, 0, 0))
        up = [(j, (j + 1) % t) for j in range(t)]
        down = [(j, (j - 1) % t) for j in range(t)]
        first, second = jnp.split(x, 2, axis=1)

        def step(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            total, first, second = carry
            products = _heads(first, kernel), _heads(second, kernel)
            first, second = lax.ppermute(first, "tp", up), lax.ppermute(second, "tp", down)
            places = (here - i - 1) % t * size, (here + i + 1) % t * size + size // 2
            for product, place in zip(products, places, strict=True):
                total = lax.dynamic_update_slice(total, product, (0, place, 0, 0))
            return total, first, second

        carry = total, lax.ppermute(first, "tp", up), lax.ppermute(second, "tp", down)
        return lax.fori_loop(0, t - 1, step, carry)[0]

    specs: dict[str, Any] = {
        "in_specs": (P(None, "tp", None), P(None, "tp", None)),
        "out_specs": P(None, None, "tp", None),
    }
    mapped = jax.shard_map(chunks, mesh=mesh, check_vma=False, **specs)
    return mesh, jax.jit(mapped).lower(*_maxtext_operands(mesh))


def train_step(
    devices: Devices,
    *,
    mesh: tuple[int, int, int],
    images: int,
    remat: Literal["full", "dots", "products"],
    **layout: Any,
) -> Program:
    """A training step of ViT-22B over (data, fsdp, tensor) with `images` of 256 tokens a chip."""
    config = Config(
        model=vit.variant("22B/14", remat=remat),
        optim=Optim(),
        steps=1000,
        batch=images * len(devices),
        mesh=mesh,
    )
    program = training_step(config, Layout(make_mesh(*mesh, devices=devices), **layout))
    return program.mesh, program.traced.lower()


def _heads(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jnp.einsum("bsE,Ehd->bshd", x, kernel)


def _maxtext_mesh(devices: Devices) -> Mesh:
    return _mesh(np.array([devices[i] for i in (0, 1, 3, 2)]), "tp")


def _maxtext_operands(mesh: Mesh) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    x = _spread(mesh, (2, 8192, 16384), jnp.bfloat16, P(None, "tp", None))
    return x, _spread(mesh, (16384, 128, 128), jnp.bfloat16, P(None, "tp", None))


def _book_mesh(devices: Devices) -> Mesh:
    return _mesh(mesh_utils.create_device_mesh((2, 4), list(devices)), "X", "Y")


def _book(mesh: Mesh, lhs: P) -> Program:
    a = _spread(mesh, (1024, 2048), jnp.int32, lhs)
    w = _spread(mesh, (2048, 8192), jnp.int32, P(None, "Y"))
    out = NamedSharding(mesh, P("X", "Y"))
    return mesh, jax.jit(lambda a, w: a @ w, out_shardings=out).lower(a, w)


def _mesh(devices: np.ndarray, *names: str) -> Mesh:
    return Mesh(devices, names, axis_types=(AxisType.Auto,) * len(names))


def _spread(mesh: Mesh, shape: tuple[int, ...], dtype: Any, spec: P) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
