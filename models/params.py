"""Counting parameters, by the four conventions that papers mix in one table."""

from __future__ import annotations

import math
from typing import Literal

from flax import nnx

from models.vit import ViT
from models.vit_config import Config

CONVENTIONS = ("matmul", "encoder", "with_map", "with_head")


def count(config: Config, convention: Literal["matmul", "encoder", "with_map", "with_head"]) -> int:
    """The number of parameters; nothing is allocated.

    Args:
      config: which model.
      convention: "matmul" counts the kernels of the blocks alone, as ViT-22B's 21,743 million;
        "encoder" also their biases and norms, the embeddings and the last norm, as most of the
        table's rows; "with_map" the attention pooling head too; "with_head" the classifier too,
        that is everything.

    Raises:
      ValueError: if the convention is unknown, or counts a part that the model does not have.
    """
    if convention not in CONVENTIONS:
        raise ValueError(f"convention={convention!r} is none of {CONVENTIONS}")
    if convention == "with_map" and config.pool != "map":
        raise ValueError(
            f"a model with pool={config.pool!r} has no attention pooling head to count"
        )
    if convention == "with_head" and config.num_classes is None:
        raise ValueError("a model with num_classes=None has no classifier to count")
    left_out = {"encoder": {"pool", "head"}, "with_map": {"head"}}.get(convention, set())
    model = nnx.eval_shape(lambda: ViT(config, layout=None, rngs=nnx.Rngs(0)))
    return sum(
        math.prod(variable.shape)
        for path, variable in nnx.to_flat_state(nnx.state(model))
        if path[0] not in left_out
        and (convention != "matmul" or (path[:2] == ("encoder", "blocks") and path[-1] == "kernel"))
    )
