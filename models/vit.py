"""Vision transformers, every linear layer of them a collective matmul; ViT-22B among them.

The same parameters give the same output on one device (`layout=None`) and on any mesh.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from collective_matmul import Layout, nn
from models.capture import Patterns
from models.encoder import Encoder
from models.heads import MapHead, classifier
from models.position import resample
from models.vit_config import SIZES, STANDARD, VIT_22B, Config, Style, variant

__all__ = ["Config", "Style", "STANDARD", "VIT_22B", "SIZES", "ViT", "patches", "variant"]


class ViT(nnx.Module):
    """`logits = head(pool(encoder(embedding(patches(images)) + position)))`.

    Parameters: `embedding.kernel` is a convolution's, [p, p, c, d], reshaped to [p * p * c, d];
    `position` is [1, tokens, d], and has a first row for the class token where there is one;
    `encoder.blocks` is stacked over layers; `head` is the classifier.

    Args:
      config: which model; see `variant`.
      layout: where arrays lie, or None for one device.
      rngs: keys of the initialisers, which are big_vision's. ViT-22B's own are not stated in any
        public source.

    Raises:
      ValueError: if the config names something unknown.
    """

    def __init__(self, config: Config, *, layout: Layout | None, rngs: nnx.Rngs) -> None:
        d, tokens = config.width, config.grid[0] * config.grid[1]
        self.config = config
        self.embedding = nn.InputProjection(
            config.patch_dim, d, layout=layout, dtype=jnp.dtype(config.dtype), rngs=rngs
        )
        has_cls = config.pool == "cls"
        self.cls = nnx.data(nnx.Param(jnp.zeros((1, 1, d), jnp.float32)) if has_cls else None)
        normal = nnx.initializers.normal(d**-0.5)
        self.position = nnx.Param(normal(rngs.params(), (1, has_cls + tokens, d), jnp.float32))
        self.encoder = Encoder(config, layout=layout, rngs=rngs)
        self.pool = nnx.data(
            MapHead(config, layout=layout, rngs=rngs) if config.pool == "map" else None
        )
        self.head = nnx.data(
            classifier(config, config.num_classes, layout, rngs)
            if config.num_classes is not None
            else None
        )

    def __call__(
        self, images: jax.Array, *, capture: Sequence[str] = ()
    ) -> jax.Array | tuple[jax.Array, dict[str, jax.Array]]:
        """The logits of a batch of images, or its features where the model has no classifier.

        Args:
          images: [b@data, height, width, channels], floating point, of any size that splits into
            patches.
          capture: names of activations to return as well, such as `"block_3/attention_logits"`;
            `"block_*/output"` and the like match several, `"*"` all. The error of a wrong name
            lists them.

        Returns:
          float32 [b@(data, tensor), classes]; without a classifier [b@data, d@tensor] from the
          attention pooling, [b@data, d] else. With `capture` a pair of this and a dictionary.

        Raises:
          ValueError: if images do not split into patches, sizes do not split over the mesh (with
            the nearest that do), or `capture` names an activation that there is not.
        """
        config, noted = self.config, Patterns(capture)
        grid = config.grid_of(*images.shape[1:3])
        x = self._embed(patches(images, config.patch_size), grid)
        x = noted("embedded", x)
        x = self.encoder(x, noted)
        if self.pool is not None:
            x = self.pool(x, noted)
        elif config.pool == "gap":
            x = jnp.mean(x, axis=1, dtype=jnp.float32).astype(x.dtype)
        else:
            x = x[:, 0]
        x = noted("pooled", x)
        if self.head is not None:
            x = noted("logits", self.head(x))
        x = x.astype(jnp.float32)
        noted.check()
        return (x, noted.found) if noted.patterns else x

    def _embed(self, x: jax.Array, grid: tuple[int, int]) -> jax.Array:
        """Tokens with their positions, added in float32."""
        if self.cls is not None:
            # An empty patch holds the class token's place, so that the sequence is cut only once.
            x = jnp.pad(x, ((0, 0), (1, 0), (0, 0)))
        y = self.embedding(x).astype(jnp.float32)
        if self.cls is not None:
            first = jnp.arange(y.shape[1]).reshape(1, -1, 1) == 0
            y = jnp.where(first, self.cls[...], y)
        position = self.position[...]
        if grid != self.config.grid:
            fixed, learned = jnp.split(position, [0 if self.cls is None else 1], axis=1)
            learned = resample(learned, self.config.grid, grid)
            position = jnp.concatenate([fixed, learned], axis=1)
        return (y + position).astype(self.config.dtype)


def patches(images: jax.Array, size: int) -> jax.Array:
    """Cuts images into squares, row by row; the numbers of one as a convolution's kernel has them.

    Args:
      images: [b@data, height, width, channels].
      size: pixels along the side of a patch, p.

    Returns:
      [b@data, (height / p) * (width / p), p * p * channels].
    """
    b, height, width, channels = images.shape
    rows, columns = height // size, width // size
    x = images.reshape(b, rows, size, columns, size, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, rows * columns, size * size * channels)
