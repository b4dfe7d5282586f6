"""Self-attention in one Pallas kernel for TPU, its gradient in one more: no logit ever reaches HBM.

    y_i = softmax_j(N(q_i) . N(k_j) / sqrt(d)) . v_j        N: the norm of queries and keys, or none

A grid step is one head of one image. It reads its columns of [b, s, h * d], as the projections'
products leave them and the next product wants them, so nothing is transposed; the norms are in the
kernel; and s^2 logits in float32 fit on chip, so the softmax needs no second pass. The gradient
computes the weights again instead of reading them.

At 256 tokens and heads of 128 the compiler's own schedule of a grid step is 1,248 cycles on v4, and
2,266 for the gradient: 0.46 and 0.83 ms of ViT-22B's layer on 1,024 chips (mesh 16 x 16 x 4, 16
images a chip), where the compiler's own attention, a fusion to an operation, takes some 11 ms with
its gradient (`python -m bench kernels`).

Reference: Dao et al. 2022 (arXiv 2205.14135), for computing the weights again.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from collective_matmul.dense import Slab

LANES = 128
MOST_BYTES = 384 * 1024
"""Of a head's queries, [s, d]: 1,536 tokens of 128 features in bfloat16, half as many in float32.
The gradient of more does not fit into the 16 MiB on chip that v4, v5e and v5p give a kernel."""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What is known of an attention when it is traced.

    Args:
      heads: h, of this device.
      head_dim: d.
      centred: whether the norms subtract the mean; None for no norms.
      epsilon: what the norms add to the variance.
      interpret: run the kernel's operations one by one, on any machine: slow, for tests.
    """

    heads: int
    head_dim: int
    centred: bool | None
    epsilon: float
    interpret: bool


class Scales(NamedTuple):
    """Of the norms: [1, d] float32 each."""

    query: jax.Array
    key: jax.Array


def refusal(query: Any, key: Any) -> str | None:
    """Why the kernel cannot run, or None.

    Args:
      query: [b, q, h, d]: anything with a shape and a dtype.
      key: [b, s, h, d].
    """
    s, d = key.shape[1], key.shape[-1]
    if query.shape != key.shape:
        return f"it is self-attention; there are {query.shape[1]} queries of {s} tokens"
    if d % LANES:
        return f"head_dim={d} is not a multiple of {LANES}, the lanes of a register"
    if s % LANES:
        return f"{s} tokens are not a multiple of {LANES}"
    if query.dtype not in (jnp.bfloat16, jnp.float32):
        return f"the activations are {query.dtype}, neither bfloat16 nor float32"
    size = query.dtype.itemsize
    if s * d * size > MOST_BYTES:
        most = MOST_BYTES // (d * size) // LANES * LANES
        return f"{s} tokens of {d} features in {query.dtype} do not fit on chip; {most} do"
    return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(
    kernel: Kernel, query: jax.Array, key: jax.Array, value: jax.Array, scales: Scales | None
) -> jax.Array:
    """The attention of one device's heads; [b, s, h * d], like `query`, `key` and `value`."""
    return _forward(kernel, query, key, value, scales)[0]


def _forward(
    kernel: Kernel, query: jax.Array, key: jax.Array, value: jax.Array, scales: Scales | None
) -> tuple[jax.Array, Any]:
    y = _attend(kernel, _apart(query, key, value), scales, query.shape[-1])
    return y, (query, key, value, scales)


def _backward(kernel: Kernel, saved: Any, dy: jax.Array) -> tuple[Any, ...]:
    *arrays, scales = saved
    (dq, dk, dv), dscales = _differentiate(kernel, _apart(*arrays), scales, dy)
    return dq, dk, dv, dscales


attend.defvjp(_forward, _backward)


def attend_within(kernel: Kernel, wide: Slab, scales: Scales | None, width: int) -> jax.Array:
    """The attention of heads whose queries, keys and values lie side by side, in a wider array.

    Args:
      kernel: as above.
      wide: [b, s, ...]; of each head query, key and value, then whatever else.
      scales: of the norms.
      width: columns of the result.

    Returns:
      [b, s, width]: what the heads found, and then columns for the caller to fill: nothing is
      written there.
    """
    return _attend(kernel, _within(wide), scales, width)


def gradient_within(
    kernel: Kernel, wide: Slab, scales: Scales | None, dy: jax.Array
) -> tuple[jax.Array, Scales | None]:
    """The gradient of `attend_within`.

    Args:
      kernel, wide, scales: its arguments.
      dy: [b, s, width], the cotangent of its result.

    Returns:
      The cotangents of `wide`, where again nothing is written behind the heads', and of `scales`.
    """
    (dwide,), dscales = _differentiate(kernel, _within(wide), scales, dy)
    return dwide, dscales


class _Heads(NamedTuple):
    """Where a grid step finds its head's query, key and value: in three arrays, or in one."""

    arrays: list[Slab]  # without repetition
    blocks: list[tuple[int, int]]  # of each of the three: (stride, offset) in heads' columns
    written: int  # heads' columns side by side in one array of the gradient

    @property
    def operands(self) -> list[jax.Array]:
        # Images of all slabs in one dimension: of four, 7x's compiler would tile them otherwise
        # than the kernel does, and copy the whole stack, 17 GB for ViT-22B, in each layer.
        found = [x.stack.reshape(-1, *x.shape[1:]) for x in self.arrays]
        return found * (3 // len(found))


def _apart(query: jax.Array, key: jax.Array, value: jax.Array) -> _Heads:
    return _Heads([Slab.of(x) for x in (query, key, value)], [(1, 0)] * 3, 1)


def _within(wide: Slab) -> _Heads:
    return _Heads([wide], [(3, 0), (3, 1), (3, 2)], 3)


def _attend(kernel: Kernel, heads: _Heads, scales: Scales | None, width: int) -> jax.Array:
    x = heads.arrays[0]
    out = _like(x, (*x.shape[:2], width), x.dtype)
    (y,) = _call(kernel, _attention, "attention", heads, [], scales, [out], 1, products=2)
    return y


def _differentiate(
    kernel: Kernel, heads: _Heads, scales: Scales | None, dy: jax.Array
) -> tuple[list[jax.Array], Scales | None]:
    x = heads.arrays[0]
    outs = [_like(x, array.shape, x.dtype) for array in heads.arrays]
    # Each grid step sums its own rows; the sum over images and heads is left to the compiler.
    part = _like(x, (x.shape[0], kernel.heads, 1, kernel.head_dim), jnp.float32)
    parts = [part] * len(scales or ())
    found = _call(
        kernel,
        _gradient,
        "attention_gradient",
        heads,
        [dy],
        scales,
        [*outs, *parts],
        heads.written,
        products=5,
    )
    cotangents, sums = found[: len(outs)], found[len(outs) :]
    dscales = Scales(*(jnp.sum(x, axis=(0, 1)) for x in sums)) if scales else None
    return list(cotangents), dscales


def _call(
    kernel: Kernel,
    body: Any,
    name: str,
    heads: _Heads,
    others: list[jax.Array],
    scales: Scales | None,
    outs: list[jax.ShapeDtypeStruct],
    written: int,
    products: int,
) -> Any:
    """The kernel over images and heads; its FLOPs and bytes are declared for the schedulers."""
    b, s, _ = heads.arrays[0].shape
    d = kernel.head_dim

    def of_slab(stride: int, offset: int) -> pl.BlockSpec:
        return pl.BlockSpec(
            (1, s, d), lambda image, head, i: (i[0] * b + image, 0, stride * head + offset)
        )

    def columns(count: int = 1) -> pl.BlockSpec:
        return pl.BlockSpec((1, s, count * d), lambda image, head, _: (image, 0, head))

    whole = pl.BlockSpec((1, d), lambda *_: (0, 0))
    part = pl.BlockSpec((1, 1, 1, d), lambda image, head, _: (image, head, 0, 0))
    size = b * s * kernel.heads * d * heads.arrays[0].dtype.itemsize
    return pl.pallas_call(
        lambda _, *refs: body(kernel, *refs),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(b, kernel.heads),
            in_specs=[
                *(of_slab(*block) for block in heads.blocks),
                *(columns() for _ in others),
                *(whole for _ in scales or ()),
            ],
            out_specs=[columns(written) if len(out.shape) == 3 else part for out in outs],
        ),
        out_shape=outs,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        cost_estimate=pl.CostEstimate(
            flops=products * 2 * b * kernel.heads * s * s * d,
            transcendentals=b * kernel.heads * s * s,
            bytes_accessed=size * (3 + len(others) + (3 if others else 1)),
        ),
        interpret=kernel.interpret,
        name=name,
    )(heads.arrays[0].i[None], *heads.operands, *others, *(scales or ()))


def _like(x: Slab, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """Varies over the devices as x does."""
    kind = jax.typeof(x.stack).manual_axis_type
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=kind)


def _attention(kernel: Kernel, *refs: Any) -> None:
    (query, key, value), scales, (y,) = refs[:3], refs[3:-1], refs[-1:]
    k = _normalised(kernel, key[0], scales[1:])[0]
    v, dtype = value[0], y.dtype
    for rows in _blocks(query.shape[1]):
        q = _normalised(kernel, query[0, rows], scales[:1])[0]
        weights, total = _weights(q, k)
        y[0, rows] = (_dot(weights.astype(dtype), v, 1, 0) * (1 / total)).astype(dtype)


def _gradient(kernel: Kernel, *refs: Any) -> None:
    query, key, value, cotangent = refs[:4]
    normed = kernel.centred is not None
    scales, outs = (refs[4:6], refs[6:]) if normed else ((), refs[4:])
    outs, sums = (outs[:-2], outs[-2:]) if normed else (outs, ())
    d, dtype, v = kernel.head_dim, query.dtype, value[0]
    # Three arrays of the gradient, or one with the three side by side.
    dq, dk, dv = outs if len(outs) == 3 else (outs[0].at[..., pl.ds(i * d, d)] for i in range(3))
    scale = d**-0.5
    k, back_k = _normalised(kernel, key[0], scales[1:])
    gk: Any
    gv: Any
    gs: Any
    gk, gv, gs = 0.0, 0.0, 0.0
    for rows in _blocks(query.shape[1]):
        q, back_q = _normalised(kernel, query[0, rows], scales[:1])
        dy = cotangent[0, rows]
        weights, total = _weights(q, k)
        weights = weights * (1 / total)
        gv = gv + _dot(weights.astype(dtype), dy, 0, 0)
        gw = _dot(dy, v, 1, 1)
        logits = weights * (gw - jnp.sum(gw * weights, axis=-1, keepdims=True))
        logits = logits.astype(dtype)
        gk = gk + _dot(logits, q, 0, 0)
        gq, of_scale = back_q(_dot(logits, k, 1, 0) * scale)
        gs = gs + of_scale
        dq[0, rows] = gq.astype(dtype)
    gk, of_scale = back_k(gk * scale)
    dk[0], dv[0] = gk.astype(dtype), gv.astype(dtype)
    if sums:
        sums[0][0, 0], sums[1][0, 0] = gs, of_scale


def _blocks(s: int) -> list[Any]:
    """Rows of queries that are worked on together: few enough that their logits fit on chip."""
    rows = 2 * LANES if s % (2 * LANES) == 0 else LANES
    return [pl.ds(i, rows) for i in range(0, s, rows)]


def _weights(q: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Numerators [rows, s] and denominators [rows, 1] of the softmax, float32.

    As a power of two, which is what the chip has: the factor that makes it one holds 1 / sqrt(d).
    """
    logits = _dot(q, k, 1, 1)
    power = (logits - jnp.max(logits, axis=-1, keepdims=True)) * (
        math.log2(math.e) * q.shape[-1] ** -0.5
    )
    weights = jnp.exp2(power)
    return weights, jnp.sum(weights, axis=-1, keepdims=True)


def _normalised(kernel: Kernel, x: jax.Array, scale: tuple[Any, ...]) -> tuple[jax.Array, Any]:
    """N(x), and the function from its cotangent to x's and the scale's, both float32."""
    if kernel.centred is None:
        return x, lambda g: (g, 0.0)
    y = x.astype(jnp.float32)
    if kernel.centred:
        y = y - jnp.mean(y, axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + kernel.epsilon)
    y = y * inverse
    factor = scale[0][...]

    def backward(g: jax.Array) -> tuple[jax.Array, jax.Array]:
        of_scale = jnp.sum(g * y, axis=0, keepdims=True)
        g = g * factor
        g = g - y * jnp.mean(g * y, axis=-1, keepdims=True)
        if kernel.centred:
            g = g - jnp.mean(g, axis=-1, keepdims=True)
        return g * inverse, of_scale

    return (y * factor).astype(x.dtype), backward


def _dot(x: jax.Array, y: jax.Array, of_x: int, of_y: int) -> jax.Array:
    """The product that contracts dimension `of_x` of x with `of_y` of y, summed in float32.

    bfloat16 operands are multiplied as they are; float32 ones in full.
    """
    full = x.dtype == jnp.float32
    return jax.lax.dot_general(
        x,
        y,
        (((of_x,), (of_y,)), ((), ())),
        preferred_element_type=jnp.float32,
        precision=jax.lax.Precision.HIGHEST if full else None,
    )
