"""The model FLOPs of a training step in closed form, for the MFU that a run shows of itself.

    3 * 2 * products,   forward once and backward twice, attention full, nothing computed again

`bench` counts the same from the traced program of any model; a test holds the two together.
"""

from __future__ import annotations

from models.vit_config import Config


def model_flops(config: Config, images: int) -> int:
    """FLOPs of a step on `images` images, on all devices together.

    Args:
      config: the model.
      images: of the batch.
    """
    d, m = config.width, config.mlp_dim
    tokens = config.grid[0] * config.grid[1] + (config.pool == "cls")
    block = tokens * (4 * d * d + 2 * d * m) + 2 * tokens * tokens * d
    products = tokens * config.patch_dim * d + config.depth * block
    if config.pool == "map":
        # Keys and values of every token; a query that all images share, and one token's rest.
        products += tokens * 2 * d * d + 2 * tokens * d + d * d + 2 * d * m
    if config.num_classes is not None:
        products += d * config.num_classes
    shared = d * d if config.pool == "map" else 0
    return 6 * (images * products + shared)
