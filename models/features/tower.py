"""A frozen model that returns activations by name, each computed where the model's arrays lie."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from collective_matmul import Layout
from models.vit import ViT
from models.vit_config import Config

OTHER_NAMES = {"tokens": "encoded"}
"""`tokens`: all tokens after the last norm, a class token first; big_vision's name is `encoded`."""


class Tower:
    """`{name: [b@data, ...]} = tower(images)`, compiled once for a size of batch.

    Args:
      params: nested dictionaries of arrays, such as `formats.load` gives; they are not changed.
      config: the model. A classifier is needed for `logits` alone, see `without_classifier`.
      layers: which activations: `pooled`, `tokens`, `logits`, or names and patterns as
        `vit.ViT.__call__` takes them, such as `block_*/output`.
      layout: where arrays lie, or None for one device.
      dtype: of what is returned.

    Raises:
      ValueError: if a name is none of an activation, or it is none of single images.
    """

    def __init__(
        self,
        params: Any,
        config: Config,
        *,
        layers: Sequence[str] = ("pooled",),
        layout: Layout | None = None,
        dtype: Any = jnp.float32,
    ) -> None:
        self.config, self.layout, self.params = config, layout, params
        self.patterns = tuple(dict.fromkeys(OTHER_NAMES.get(name, name) for name in layers))
        abstract = nnx.eval_shape(lambda: ViT(config, layout=layout, rngs=nnx.Rngs(0)))
        graph = nnx.graphdef(abstract)
        self.shapes = _shapes(config, self.patterns)
        """of one image, by name"""

        def run(params: Any, images: jax.Array) -> dict[str, jax.Array]:
            found = _captured(nnx.merge(graph, params), images, self.patterns)
            return {name: found[name].astype(dtype) for name in self.shapes}

        rows = None if layout is None else NamedSharding(layout.mesh, P(layout.data))
        self._run = jax.jit(run, out_shardings=rows)

    def __call__(self, images: jax.Array) -> dict[str, jax.Array]:
        """The activations of [b@data, height, width, channels]; returns before they are there."""
        return self._run(self.params, images)


def without_classifier(config: Config, layers: Sequence[str]) -> Config:
    """The model without its classifier, unless `layers` ask for logits."""
    if any(fnmatch.fnmatchcase("logits", pattern) for pattern in layers):
        return config
    return dataclasses.replace(config, num_classes=None)


def _captured(model: ViT, images: jax.Array, patterns: Sequence[str]) -> dict[str, jax.Array]:
    result = model(images, capture=patterns)
    assert isinstance(result, tuple)  # as patterns are asked for
    return result[1]


def _shapes(config: Config, patterns: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """The shape of each activation for one image.

    Two sizes of batch tell a dimension that counts images from one that only happens to be as long.
    """

    def traced(batch: int) -> dict[str, Any]:
        images = jax.ShapeDtypeStruct((batch, *config.image_shape, config.channels), np.float32)
        model = nnx.eval_shape(lambda: ViT(config, layout=None, rngs=nnx.Rngs(0)))
        return nnx.eval_shape(lambda model, x: _captured(model, x, patterns), model, images)

    found, more = traced(1), traced(2)
    for name, x in found.items():
        if more[name].shape[:1] != (2,) or x.shape[:1] != (1,):
            raise ValueError(
                f"{name} is of the batch as a whole, not of an image: name the layers one by one"
            )
    return {name: x.shape[1:] for name, x in found.items()}
