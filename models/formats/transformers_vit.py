"""transformers' `ViTModel` and `ViTForImageClassification` as safetensors, with a config.json.

A class token and the standard block. transformers' activation is the exact GELU, and its norms add
1e-12; the config.json states both, and a config that says otherwise is refused.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from models.arrays.describing import config_json, labels, of_transformers, shapes_of
from models.arrays.describing import to_transformers as sizes
from models.arrays.format import BLOCKS, QKV, TORCH, Entry, Format, Shape, linear, norm
from models.arrays.reading import Source
from models.vit_config import Config, Style

LAYERS = "encoder.layer"


def _entries(config: Config, _: Mapping[str, Shape]) -> list[Entry]:
    made = [
        *linear("embeddings.patch_embeddings.projection", "embedding"),
        Entry("embeddings.cls_token", ("cls",)),
        Entry("embeddings.position_embeddings", ("position",)),
    ]
    bias = config.style.qkv_bias
    for i in range(config.depth):
        own, inner = f"{LAYERS}.{i}", f"{BLOCKS}.attention"
        made += norm(f"{own}.layernorm_before", f"{BLOCKS}.attention_norm", i)
        for part in QKV:
            name = f"{own}.attention.attention.{part}"
            made += linear(name, f"{inner}.{part}", layer=i, bias=bias)
        made += linear(f"{own}.attention.output.dense", f"{inner}.out", layer=i)
        made += norm(f"{own}.layernorm_after", f"{BLOCKS}.mlp_norm", i)
        made += linear(f"{own}.intermediate.dense", f"{BLOCKS}.mlp.up", layer=i)
        made += linear(f"{own}.output.dense", f"{BLOCKS}.mlp.down", layer=i)
    made += norm("layernorm", "encoder.norm")
    return made + (linear("classifier", "head") if config.num_classes is not None else [])


def _canonical(names: Collection[str]) -> dict[str, str]:
    """Without the prefix that a classifier's tower has."""
    return {re.sub(r"^vit\.", "", name): name for name in names}


def _in_file(config: Config, name: str) -> str:
    return name if config.num_classes is None or name.startswith("classifier") else f"vit.{name}"


def _unsupported(config: Config) -> str | None:
    if config.parallel or config.style != Style(qkv_bias=config.style.qkv_bias):
        return "its blocks are standard, with layer norms and without QK-norm"
    if config.pool != "cls":
        return f"its pooling is the class token's: pool='cls', not {config.pool!r}"
    return None


def _describe(source: Source) -> tuple[dict[str, Any], dict[str, Any]]:
    fields = config_json(source)
    shapes = shapes_of(source, _canonical(source.arrays))
    classes = shapes["classifier.weight"][0] if "classifier.weight" in shapes else None
    key_bias = f"{LAYERS}.0.attention.attention.key.bias" in shapes
    stated = of_transformers(fields) if fields else {}
    stated |= {"num_classes": classes, "pool": "cls", "style": Style(qkv_bias=key_bias)}
    return stated, {}


def _companion(config: Config) -> dict[str, Any]:
    fields = {"model_type": "vit", "qkv_bias": config.style.qkv_bias} | sizes(config)
    if config.num_classes is None:
        return fields | {"architectures": ["ViTModel"]}
    return fields | {"architectures": ["ViTForImageClassification"]} | labels(config.num_classes)


FORMAT = Format(
    suffix=".safetensors",
    arrangement=TORCH,
    entries=_entries,
    recognises=lambda names: any(
        name.endswith("embeddings.patch_embeddings.projection.weight") for name in names
    ),
    unsupported=_unsupported,
    describe=_describe,
    canonical=_canonical,
    in_file=_in_file,
    position="embeddings.position_embeddings",
    heads=("classifier.", "pooler."),
    hints={
        "pooler.": "head=False leaves transformers' pooler out",
        "mask_token": "the mask token of ViTForMaskedImageModeling is not part of these models",
    },
    companion=_companion,
)
