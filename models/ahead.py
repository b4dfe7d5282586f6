"""Parallel blocks by `dense.layers`: each one's weights are fetched while the one before works."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from collective_matmul import dense, nn
from collective_matmul.nn.linear import compute_dtype
from models.attend.beside import middle
from models.block import ParallelBlock, StandardBlock
from models.capture import Capture


def blocks(stacked: ParallelBlock | StandardBlock, x: jax.Array, capture: Capture) -> Any:
    """x through all blocks, or None where they cannot run so.

    They can if attention has a kernel that works beside the MLP, nothing of any block is to be
    captured, and activations are cut by tokens.

    Args:
      stacked: a block whose parameters have the layers as their first dimension.
      x: [b@data, s@tensor, d].
      capture: of what is wanted of any block.
    """
    if isinstance(stacked, StandardBlock) or capture.wanted("output"):
        return None
    layout = stacked.mlp.up.layout
    kernel = stacked.kernel_for(x, capture)
    if kernel is None or (layout is not None and layout.activations == "features"):
        return None
    graph, parameters = nnx.split(stacked)
    norm = nnx.graphdef(stacked.norm)
    like = jax.ShapeDtypeStruct(x.shape, x.dtype)
    dtype = compute_dtype(like, stacked.mlp.up)

    def before(x: jax.Array, parameters: Any) -> jax.Array:
        y: jax.Array = nnx.merge(norm, parameters)(x)
        return y.astype(dtype)

    y = dense.layers(
        x,
        nnx.to_pure_dict(parameters),
        parts=lambda parameters: nnx.merge(graph, parameters).parts(like),
        before=before,
        middle=middle(kernel, stacked.mlp.activation),
        specs=nnx.to_pure_dict(nn.partition_specs(stacked)),
        layout=layout,
        check_vma=not kernel.interpret,
    )
    return capture("output", y)
