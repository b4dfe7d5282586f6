"""Parameters as a tree: their names, and what a model's tree looks like before it has values."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx
from jax.sharding import NamedSharding

from collective_matmul import Layout, nn
from models.vit import ViT
from models.vit_config import Config


def names(params: Any) -> list[str]:
    """The name of every array, `"blocks.up.kernel"`, in the order of `jax.tree.leaves`."""
    paths = jax.tree_util.tree_leaves_with_path(params)
    return [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in paths]


def abstract(config: Config, layout: Layout | None) -> dict[str, Any]:
    """Shapes, dtypes and places of a model's parameters; nothing is allocated.

    Args:
      config: which model.
      layout: where arrays lie, or None for one device.

    Returns:
      Nested dictionaries of `jax.ShapeDtypeStruct`.
    """
    module = nnx.eval_shape(lambda: ViT(config, layout=layout, rngs=nnx.Rngs(0)))
    params: dict[str, Any] = nnx.to_pure_dict(nnx.state(module))
    if layout is None:
        return params
    specs = nnx.to_pure_dict(nn.partition_specs(module))
    return jax.tree.map(
        lambda x, spec: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(layout.mesh, spec)
        ),
        params,
        specs,
    )
