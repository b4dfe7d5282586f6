"""The vision tower of transformers' SigLIP as safetensors, with a config.json.

Of a `SiglipModel`, `SiglipVisionModel` or `SiglipForImageClassification`; the text tower is passed
over. The tower pools by attention; transformers' classifier takes the mean of the tokens instead,
so a classifier needs `pool="gap"`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from models.arrays.describing import config_json, labels, of_transformers, shapes_of
from models.arrays.describing import to_transformers as sizes
from models.arrays.format import BLOCKS, QKV, TORCH, Entry, Format, Shape, attention, linear, norm
from models.arrays.reading import Source
from models.vit_config import STANDARD, Config

PREFIX = "vision_model."
OTHERS = ("text_model.", "logit_scale", "logit_bias")


def _entries(config: Config, _: Mapping[str, Shape]) -> list[Entry]:
    made = [
        *linear("embeddings.patch_embedding", "embedding"),
        Entry("embeddings.position_embedding.weight", ("position",)),
    ]
    for i in range(config.depth):
        own, inner = f"encoder.layers.{i}", f"{BLOCKS}.attention"
        made += norm(f"{own}.layer_norm1", f"{BLOCKS}.attention_norm", i)
        for part in QKV:
            made += linear(f"{own}.self_attn.{part[0]}_proj", f"{inner}.{part}", layer=i)
        made += linear(f"{own}.self_attn.out_proj", f"{inner}.out", layer=i)
        made += norm(f"{own}.layer_norm2", f"{BLOCKS}.mlp_norm", i)
        made += linear(f"{own}.mlp.fc1", f"{BLOCKS}.mlp.up", layer=i)
        made += linear(f"{own}.mlp.fc2", f"{BLOCKS}.mlp.down", layer=i)
    made += norm("post_layernorm", "encoder.norm")
    if config.pool == "map":
        qkv = attention("pool.attention")
        made += [
            Entry("head.probe", ("pool.probe",)),
            Entry("head.attention.in_proj_weight", tuple(f"{part}.kernel" for part in qkv)),
            Entry("head.attention.in_proj_bias", tuple(f"{part}.bias" for part in qkv)),
            *linear("head.attention.out_proj", "pool.attention.out"),
            *norm("head.layernorm", "pool.norm"),
            *linear("head.mlp.fc1", "pool.mlp.up"),
            *linear("head.mlp.fc2", "pool.mlp.down"),
        ]
    return made + (linear("classifier", "head") if config.num_classes is not None else [])


def _canonical(names: Collection[str]) -> dict[str, str]:
    """Without the prefix that older versions and whole models have, and without the text tower."""
    own = [name for name in names if not name.startswith(OTHERS)]
    return {re.sub(f"^{re.escape(PREFIX)}", "", name): name for name in own}


def _in_file(_: Config, name: str) -> str:
    return name if name.startswith("classifier") else PREFIX + name


def _unsupported(config: Config) -> str | None:
    if config.parallel or config.style != STANDARD or config.head_style != STANDARD:
        return "its blocks and its pooling are standard, with layer norms and without QK-norm"
    if config.pool == "map" and config.num_classes is not None:
        return "transformers' classifier takes the mean: pool='gap', or num_classes=None"
    if config.pool == "cls":
        return "it has no class token: pool='map' or 'gap'"
    if config.grid[0] != config.grid[1]:
        return f"its images are square, and these are {config.image_shape}"
    return None


def _describe(source: Source) -> tuple[dict[str, Any], dict[str, Any]]:
    fields = config_json(source)
    fields = fields.get("vision_config", fields)
    shapes = shapes_of(source, _canonical(source.arrays))
    classes = shapes["classifier.weight"][0] if "classifier.weight" in shapes else None
    stated = of_transformers({"hidden_act": "gelu_pytorch_tanh"} | fields) if fields else {}
    by_attention = "head.probe" in shapes and classes is None
    guessed = {"pool": "map" if by_attention else "gap"}  # a classifier's file has both
    return stated | {"num_classes": classes, "style": STANDARD}, guessed


def _companion(config: Config) -> dict[str, Any]:
    by_attention = config.pool == "map"
    tower = sizes(config) | {"image_size": config.image_shape[0], "vision_use_head": by_attention}
    if config.num_classes is None:
        return {
            "model_type": "siglip_vision_model",
            "architectures": ["SiglipVisionModel"],
        } | tower
    return {
        "model_type": "siglip",
        "architectures": ["SiglipForImageClassification"],
        "vision_config": tower,
    } | labels(config.num_classes)


FORMAT = Format(
    suffix=".safetensors",
    arrangement=TORCH,
    entries=_entries,
    recognises=lambda names: any(
        name.endswith("embeddings.patch_embedding.weight") for name in names
    ),
    unsupported=_unsupported,
    describe=_describe,
    canonical=_canonical,
    in_file=_in_file,
    position="embeddings.position_embedding.weight",
    position_rank=2,
    heads=("classifier.",),
    hints={
        "head.": "a classifier of the mean (pool='gap') does without the pooling head; "
        "pool='map' and num_classes=None read it"
    },
    companion=_companion,
)
