"""The stack of blocks: parameters stacked along a first dimension, run by a scan over layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from collective_matmul import Layout
from models import ahead
from models.attention import PRODUCT
from models.block import ParallelBlock, StandardBlock, make_norm
from models.capture import Capture
from models.vit_config import Config

REMAT: dict[str, Callable[..., Any]] = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "products": jax.checkpoint_policies.save_only_these_names(PRODUCT),
}
"""What the backward pass finds saved of a block, beside its input: nothing, so that the block runs
again; the results of all matrix multiplies; or the results of the collective ones, so that nothing
travels twice for it, and only norms, attention and activation are computed again. Parallel blocks
whose attention has a kernel then also fetch their weights a block ahead, see `models.ahead`."""


class Encoder(nnx.Module):
    """`N(block_depth(... block_1(x)))`.

    `blocks` is one block whose parameters have the layers as their first dimension.

    Args:
      config: sizes and style; `remat` and `unroll` say how the layers run.
      layout: where arrays lie, or None for one device.
      rngs: keys of the initialisers.

    Raises:
      ValueError: if there is no such remat policy.
    """

    def __init__(self, config: Config, *, layout: Layout | None, rngs: nnx.Rngs) -> None:
        if config.remat is not None and config.remat not in REMAT:
            raise ValueError(f"remat={config.remat!r} is none of {(None, *REMAT)}")
        block = ParallelBlock if config.parallel else StandardBlock
        keys = jax.random.split(rngs.params(), config.depth)
        self.blocks = nnx.vmap(lambda key: block(config, layout=layout, rngs=nnx.Rngs(key)))(keys)
        self.norm = make_norm(config)
        self.depth = config.depth
        self.remat = config.remat
        self.unroll = config.unroll

    def __call__(self, x: jax.Array, capture: Capture) -> jax.Array:
        """From and to `[b@data, s@tensor, d]` or `[b@data, s, d@tensor]`.

        What is captured of any layer, the scan keeps of all layers.
        """

        def wanted(name: str) -> bool:
            return any(capture.wanted(f"block_{i}/{name}") for i in range(self.depth))

        of_layer = Capture(wanted)
        y = ahead.blocks(self.blocks, x, of_layer) if self.remat == "products" else None
        if y is None:
            y, of_layer = self._scanned(x, wanted)
        for i in range(self.depth):
            for name in of_layer.names:
                full = f"block_{i}/{name}"
                if capture.wanted(full):
                    capture.found[full] = of_layer.found[name][i]
                capture.names.append(full)
        return capture("encoded", self.norm(y))

    def _scanned(self, x: jax.Array, wanted: Callable[[str], bool]) -> tuple[jax.Array, Capture]:
        """x through all blocks, and what was captured of them, stacked."""
        graph, parameters = nnx.split(self.blocks)
        of_all = Capture(wanted)

        def body(x: jax.Array, parameters: nnx.State) -> tuple[jax.Array, dict[str, jax.Array]]:
            of_layer = Capture(wanted)
            x = nnx.merge(graph, parameters)(x, of_layer)
            of_all.names[:] = of_layer.names
            return x, of_layer.found

        if self.remat is not None:
            body = jax.checkpoint(body, policy=REMAT[self.remat], prevent_cse=self.unroll > 1)
        x, of_all.found = jax.lax.scan(body, x, parameters, unroll=self.unroll)
        return x, of_all
