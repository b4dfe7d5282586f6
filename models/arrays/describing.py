"""What the shapes of a file tell about its model, and what has to be guessed."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from typing import Any

from models.arrays.reading import Source
from models.vit_config import SIZES

Shape = tuple[int, ...]


def shapes_of(source: Source, canonical: Mapping[str, str]) -> dict[str, Shape]:
    """The shapes by canonical name."""
    return {name: source.arrays[theirs].shape for name, theirs in canonical.items()}


def depth_of(names: Collection[str], before: str, after: str) -> int:
    """How many layers there are, from names such as `before` + "11" + `after`."""
    layers = [
        name.removeprefix(before).removesuffix(after)
        for name in names
        if name.startswith(before) and name.endswith(after)
    ]
    return sum(layer.isdigit() for layer in layers)


def image(tokens: int, patch_size: int) -> dict[str, Any]:
    """The image size, if the grid of this many position embeddings is square."""
    side = math.isqrt(tokens)
    return {"image_size": side * patch_size} if side * side == tokens else {}


def heads(width: int, depth: int) -> dict[str, int]:
    """The heads of the published model with these sizes, if there is one."""
    found = {size.heads for size in SIZES.values() if (size.width, size.depth) == (width, depth)}
    return {"heads": found.pop()} if len(found) == 1 else {}


def config_json(source: Source) -> dict[str, Any]:
    """The config.json beside a file, as transformers makes it; empty if there is none."""
    path = source.path.with_name("config.json")
    if not path.exists():
        return {}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


HIDDEN = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
"""What transformers calls the activations."""


def of_transformers(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `vit.Config` from those of a config.json of transformers.

    Raises:
      ValueError: if the activation is one that we do not have.
    """
    activation = fields.get("hidden_act", "gelu")
    if activation not in HIDDEN:
        raise ValueError(f"hidden_act={activation!r} is none of {tuple(HIDDEN)}")
    size = fields["image_size"]
    return {
        "width": fields["hidden_size"],
        "depth": fields["num_hidden_layers"],
        "mlp_dim": fields["intermediate_size"],
        "heads": fields["num_attention_heads"],
        "patch_size": fields["patch_size"],
        "image_size": tuple(size) if isinstance(size, list) else size,
        "channels": fields.get("num_channels", 3),
        "epsilon": fields["layer_norm_eps"],
        "activation": HIDDEN[activation],
    }


def to_transformers(config: Any) -> dict[str, Any]:
    """The other way: the fields of a config.json."""
    names = {ours: theirs for theirs, ours in HIDDEN.items()}
    return {
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "intermediate_size": config.mlp_dim,
        "num_attention_heads": config.heads,
        "patch_size": config.patch_size,
        "image_size": config.image_size,
        "num_channels": config.channels,
        "layer_norm_eps": config.epsilon,
        "hidden_act": names[config.activation],
    }


def labels(count: int) -> dict[str, Any]:
    """Names of the classes, from which transformers takes their number."""
    return {
        "id2label": {str(i): f"LABEL_{i}" for i in range(count)},
        "label2id": {f"LABEL_{i}": i for i in range(count)},
    }
