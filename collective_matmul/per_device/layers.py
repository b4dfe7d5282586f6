"""Layers of two products each, one after another, weights fetched a layer ahead: see `ahead`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from collective_matmul import ahead, joined, stepwise
from collective_matmul.collectives import Fetch
from collective_matmul.layout import Layout
from collective_matmul.per_device.between import between, gradient
from collective_matmul.per_device.calls import gather, plus, scatter, travelling
from collective_matmul.slab import InPlace, Slab
from collective_matmul.steps import Steps, together
from collective_matmul.varying import varying_axes, varying_over

_WIDE = "collective_matmul.layers.wide"


class Parts(NamedTuple):
    """What a layer does its work with.

    Args:
      kernels_in: [d@fsdp, f@tensor, ...] each, side by side.
      kernels_out: [f@tensor, ..., d@fsdp] each, one upon the other.
      bias: [d], or None.
      before, middle: what the functions of these names take: pytrees of arrays.
    """

    kernels_in: Sequence[jax.Array]
    kernels_out: Sequence[jax.Array]
    bias: jax.Array | None = None
    before: Any = ()
    middle: Any = ()


class _Weights(NamedTuple):
    """The same as shards, as what arrived of the kernels, or whole."""

    w: Any
    v: Any
    bias: jax.Array | None
    before: Any
    middle: Any


def layers(
    layout: Layout | None,
    x: jax.Array,
    parameters: Any,
    *,
    parts: Callable[[Any], Parts],
    before: Callable[[jax.Array, Any], jax.Array],
    middle: InPlace,
) -> jax.Array:
    """`x + S(middle(G(before(x)) . w) . v) + b`, layer by layer."""
    if layout is None or 1 in (layout.size(layout.tensor), layout.size(layout.fsdp)):
        # Nothing has to be fetched, or a kernel's pieces travel inside its product.
        def one(x: jax.Array, parameters: Any) -> tuple[jax.Array, None]:
            of = parts(parameters)
            y = between(
                layout,
                before(x, of.before),
                of.kernels_in,
                of.kernels_out,
                (of.middle,),
                of.bias,
                middle=middle.apart(),
                name=_WIDE,
            )
            return x + y, None

        kept = jax.checkpoint_policies.save_only_these_names(_WIDE)
        return lax.scan(jax.checkpoint(one, policy=kept, prevent_cse=False), x, parameters)[0]
    axes = varying_axes(x)

    def shards(parameters: Any) -> _Weights:
        of = parts(parameters)
        w, v = joined.column_kernel(of.kernels_in), joined.row_kernel(of.kernels_out)
        weights = _Weights(w, v, of.bias, of.before, of.middle)
        return jax.tree.map(lambda p: varying_over(p, axes), weights)

    of_first = jax.eval_shape(lambda p: shards(jax.tree.map(lambda x: x[0], p)), parameters)
    assert layout.fsdp is not None
    fetch_in, fetch_out = (
        Fetch.of(kernel, layout.fsdp, dim=dim, **travelling(layout))
        for dim, kernel in enumerate(of_first[:2])
    )
    layer = _Layer(layout, axes, shards, fetch_in, fetch_out, before, middle)
    return ahead.scan(layer, x, parameters)


@dataclasses.dataclass(frozen=True)
class _Layer:
    """What `ahead.scan` runs.

    Args:
      axes: over which activations vary, and so everything here.
      shards: from a layer's parameters to this device's shards.
      fetch_in, fetch_out: how kernels travel.
    """

    layout: Layout
    axes: frozenset[str]
    shards: Callable[[Any], _Weights]
    fetch_in: Fetch
    fetch_out: Fetch
    before: Callable[[jax.Array, Any], jax.Array]
    middle: InPlace

    def fetch(self, parameters: Any) -> Steps[_Weights]:
        shards = self.shards(parameters)
        journeys = self.fetch_in.arrive(shards.w), self.fetch_out.arrive(shards.v)
        w, v = yield from together(journeys)
        return shards._replace(w=w, v=v)

    def weights(self, arrived: _Weights) -> _Weights:
        w, v = self.fetch_in.whole(arrived.w), self.fetch_out.whole(arrived.v)
        return arrived._replace(w=w, v=v)

    def empty(self, x: jax.Array, arrived: _Weights, depth: int) -> tuple[jax.Array, ...]:
        """Each layer's x and its wide product."""
        normed = jax.eval_shape(self.before, x, arrived.before)
        wide = gather(self.layout, normed, self.fetch_in.result).op.terms[0].out
        return tuple(
            varying_over(lax.empty((depth, *like.shape), like.dtype), self.axes)
            for like in (x, wide)
        )

    def forward(
        self, x: jax.Array, weights: _Weights, kept: Any, i: jax.Array
    ) -> Steps[tuple[jax.Array, Any]]:
        xs, wides = kept
        xs = lax.dynamic_update_index_in_dim(xs, x, i, 0)
        first = gather(self.layout, self.before(x, weights.before), weights.w)
        wide = yield from stepwise.gather_into(first, Slab(wides, i))
        second = scatter(self.layout, self.middle.function(wide, weights.middle), weights.v)
        y = yield from stepwise.scatter(second.op, second.lhs, second.rhs)
        return x + plus(y, weights.bias), (xs, wide.stack)

    def backward(
        self, kept: Any, i: jax.Array, weights: _Weights, dz: jax.Array
    ) -> Steps[tuple[jax.Array, _Weights]]:
        x, wide = Slab(kept[0], i).read(), Slab(kept[1], i)
        normed, back_before = jax.vjp(self.before, x, weights.before)
        dy, dbias = jax.vjp(plus, dz, weights.bias)[1](dz)
        m = self.middle.function(wide, weights.middle)

        def back_middle(dm: jax.Array) -> tuple[Any, ...]:
            # Both before dw: x's last hop, which has no product left, hides under what is summed
            # for the operands (6 ms of ViT-22B's step on v4).
            found: tuple[Any, ...] = lax.optimization_barrier(
                self.middle.gradient(wide, weights.middle, dm)
            )
            return found

        dnormed, dw, dv, (dmiddle,) = yield from gradient(
            self.layout, normed, weights.w, m, weights.v, back_middle, dy
        )
        dx, dbefore = back_before(dnormed)
        # Carried as [f, d], as its sums are made: as [d, f] each would be copied (17 ms).
        return dz + dx, _Weights(jnp.swapaxes(dw, 0, 1), dv, dbias, dbefore, dmiddle)

    def total(self, parameters: Any, dweights: _Weights) -> Steps[Any]:
        dw = jnp.swapaxes(dweights.w, 0, 1)
        journeys = self.fetch_in.total(dw), self.fetch_out.total(dweights.v)
        dw, dv = yield from together(journeys)
        (dparameters,) = jax.vjp(self.shards, parameters)[1](dweights._replace(w=dw, v=dv))
        return dparameters
