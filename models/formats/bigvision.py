"""big_vision's npz, in all the names that its own loader reads.

    params/...                     today's names; params/img/... is the image tower of a SigLIP
    .../encoderblock/...           layers stacked, as a scan has them; encoderblock_0/... else
    opt/target/..., or no prefix   vision_transformer's: posembed_input, LayerNorm_2, MlpBlock_3
    |V2                            bfloat16, which numpy has no name for

Today's big_vision adds no position to the class token. Older ones did, as we do, and their files
have one more position. So it is saved, and big_vision folds it into the class token as it loads.

Reference: `fix_old_checkpoints` in google-research/big_vision, `models/vit.py`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from models.arrays.describing import depth_of, image, shapes_of
from models.arrays.format import BLOCKS, FLAX, Entry, Format, Shape
from models.arrays.reading import Source
from models.vit_config import STANDARD, Config

FIRST, BLOCK, PRELINEN = "embedding/kernel", "Transformer/encoderblock", r"(encoderblock(_\d+)?)/"
OLD = (
    (r"^Transformer/posembed_input/pos_embedding$", "pos_embedding"),
    (r"^Transformer/pos_embedding$", "pos_embedding"),
    (PRELINEN + "LayerNorm_2/", r"\1/LayerNorm_1/"),
    (PRELINEN + "MultiHeadDotProductAttention_1/", r"\1/MultiHeadDotProductAttention_0/"),
    (PRELINEN + "MlpBlock_3/", r"\1/MlpBlock_0/"),
    (r"^(probe$|(MlpBlock|MultiHeadDotProductAttention|LayerNorm)_0/)", r"MAPHead_0/\1"),
)
"""What arrays were called before, and are called today."""


def _entries(config: Config, _: Mapping[str, Shape]) -> list[Entry]:
    made = [*_linear("embedding", "embedding"), Entry("pos_embedding", ("position",))]
    if config.pool == "cls":
        made.append(Entry("cls", ("cls",)))
    for i in range(config.depth):
        made += _norm(f"{BLOCK}_{i}/LayerNorm_0", f"{BLOCKS}.attention_norm", i)
        made += _attention(f"{BLOCK}_{i}", f"{BLOCKS}.attention", i)
        made += _norm(f"{BLOCK}_{i}/LayerNorm_1", f"{BLOCKS}.mlp_norm", i)
        made += _mlp(f"{BLOCK}_{i}", f"{BLOCKS}.mlp", i)
    made += _norm("Transformer/encoder_norm", "encoder.norm")
    if config.pool == "map":
        made.append(Entry("MAPHead_0/probe", ("pool.probe",)))
        made += _attention("MAPHead_0", "pool.attention")
        made += _norm("MAPHead_0/LayerNorm_0", "pool.norm")
        made += _mlp("MAPHead_0", "pool.mlp")
    return made + (_linear("head", "head") if config.num_classes is not None else [])


def _linear(name: str, ours: str, layer: int | None = None) -> list[Entry]:
    return [Entry(f"{name}/{part}", (f"{ours}.{part}",), layer) for part in ("kernel", "bias")]


def _norm(name: str, ours: str, layer: int | None = None) -> list[Entry]:
    return [Entry(f"{name}/{part}", (f"{ours}.{part}",), layer) for part in ("scale", "bias")]


def _attention(name: str, ours: str, layer: int | None = None) -> list[Entry]:
    name = f"{name}/MultiHeadDotProductAttention_0"
    parts = [
        _linear(f"{name}/{part}", f"{ours}.{part}", layer)
        for part in ("query", "key", "value", "out")
    ]
    return [entry for part in parts for entry in part]


def _mlp(name: str, ours: str, layer: int | None = None) -> list[Entry]:
    name = f"{name}/MlpBlock_0/Dense_"
    return [*_linear(f"{name}0", f"{ours}.up", layer), *_linear(f"{name}1", f"{ours}.down", layer)]


def _canonical(names: Collection[str]) -> dict[str, str]:
    """Today's names, of the tower that the embedding belongs to."""
    found = {}
    prefix = min((n for n in names if n.endswith(FIRST)), key=len).removesuffix(FIRST)
    for name in names:
        if name.startswith(prefix):
            short = name.removeprefix(prefix)
            for old, new in OLD:
                short = re.sub(old, new, short)
            found[short] = name
    return found


def _unsupported(config: Config) -> str | None:
    if config.parallel or config.style != STANDARD or config.head_style != STANDARD:
        return "its blocks and its pooling are standard, with layer norms and without QK-norm"
    return None


def _describe(source: Source) -> tuple[dict[str, Any], dict[str, Any]]:
    shapes = shapes_of(source, _canonical(source.arrays))
    scanned = f"{BLOCK}/LayerNorm_0/scale" in shapes
    block = BLOCK if scanned else f"{BLOCK}_0"
    patch_size, _, channels, width = shapes["embedding/kernel"]
    has_cls, rows = "cls" in shapes, shapes["pos_embedding"][1]
    pool = "map" if "MAPHead_0/probe" in shapes else "cls" if has_cls else "gap"
    stated = {
        "width": width,
        "depth": shapes[f"{block}/LayerNorm_0/scale"][0]
        if scanned
        else depth_of(shapes, f"{BLOCK}_", "/LayerNorm_0/scale"),
        "mlp_dim": shapes[f"{block}/MlpBlock_0/Dense_0/kernel"][-1],
        "heads": shapes[f"{block}/MultiHeadDotProductAttention_0/query/kernel"][-2],
        "patch_size": patch_size,
        "channels": channels,
        "num_classes": shapes["head/bias"][0] if "head/bias" in shapes else None,
        "pool": pool,
    }
    guessed = image(rows, patch_size) or (image(rows - 1, patch_size) if has_cls else {})
    return stated, guessed | {"activation": "gelu_tanh", "epsilon": 1e-6}


FORMAT = Format(
    suffix=".npz",
    arrangement=FLAX,
    entries=_entries,
    recognises=lambda names: any(name.endswith(FIRST) for name in names),
    unsupported=_unsupported,
    describe=_describe,
    canonical=_canonical,
    in_file=lambda _, name: f"params/{name}",
    stacked=(f"{BLOCK}_", f"{BLOCK}/"),
    position="pos_embedding",
    heads=("head/", "pre_logits/"),
    hints={"pre_logits/": "a layer between pooling and classifier is not part of these models"},
)
