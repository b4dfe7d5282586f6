"""timm's `VisionTransformer` as safetensors, with its `Block` or its `ParallelScalingBlock`.

The parallel block is ViT-22B's graph. Its one input projection has the rows [MLP, query, key,
value]; with `fuse_out_proj` attention and MLP share an output projection, which has one bias, so it
is the block of `Style(out_bias=False)`.

The file does not state the number of heads, the activation, or what kind of norm has no bias.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.arrays.describing import depth_of, heads, image, shapes_of
from models.arrays.format import BLOCKS, TORCH, Entry, Format, Shape, attention, linear, norm
from models.arrays.reading import Source
from models.vit_config import STANDARD, Config, Norm, Style


def _entries(config: Config, _: Mapping[str, Shape]) -> list[Entry]:
    style = config.style
    block = _parallel if config.parallel else _standard
    made = [*linear("patch_embed.proj", "embedding"), Entry("pos_embed", ("position",))]
    if config.pool == "cls":
        made.append(Entry("cls_token", ("cls",)))
    for i in range(config.depth):
        made += block(style, i)
    made += norm("norm", "encoder.norm", bias=style.norm_bias)
    if config.pool == "map":
        made += _pool(config.head_style)
    return made + (linear("head", "head") if config.num_classes is not None else [])


def _standard(style: Style, i: int) -> list[Entry]:
    own, inner = f"blocks.{i}", f"{BLOCKS}.attention"
    return [
        *norm(f"{own}.norm1", f"{BLOCKS}.attention_norm", i, bias=style.norm_bias),
        *linear(f"{own}.attn.qkv", *attention(inner), layer=i, bias=style.qkv_bias),
        *_qk_norms(style, f"{own}.attn", i),
        *linear(f"{own}.attn.proj", f"{inner}.out", layer=i, bias=style.out_bias),
        *norm(f"{own}.norm2", f"{BLOCKS}.mlp_norm", i, bias=style.norm_bias),
        *linear(f"{own}.mlp.fc1", f"{BLOCKS}.mlp.up", layer=i),
        *linear(f"{own}.mlp.fc2", f"{BLOCKS}.mlp.down", layer=i),
    ]


def _parallel(style: Style, i: int) -> list[Entry]:
    own, out, mlp = f"blocks.{i}", f"{BLOCKS}.attention.out", f"{BLOCKS}.mlp"
    into = (f"{mlp}.up", *attention(f"{BLOCKS}.attention"))
    made = [
        *norm(f"{own}.in_norm", f"{BLOCKS}.norm", i, bias=style.norm_bias),
        *linear(f"{own}.in_proj", *into, layer=i, bias=style.qkv_bias),
        *_qk_norms(style, own, i),
    ]
    if not style.qkv_bias:
        made.append(Entry(f"{own}.mlp_bias", (f"{mlp}.up.bias",), i))
    if style.out_bias:
        made += linear(f"{own}.attn_out_proj", out, layer=i)
        return made + linear(f"{own}.mlp_out_proj", f"{mlp}.down", layer=i)
    kernels = (f"{out}.kernel", f"{mlp}.down.kernel")
    made.append(Entry(f"{own}.out_proj.weight", kernels, i, axis=1))
    return [*made, Entry(f"{own}.out_proj.bias", (f"{mlp}.down.bias",), i)]


def _qk_norms(style: Style, own: str, i: int) -> list[Entry]:
    if style.qk_norm is None:
        return []
    return [
        *norm(f"{own}.q_norm", f"{BLOCKS}.attention.query_norm", i, bias=False),
        *norm(f"{own}.k_norm", f"{BLOCKS}.attention.key_norm", i, bias=False),
    ]


def _pool(style: Style) -> list[Entry]:
    query, key, value = attention("pool.attention")
    return [
        Entry("attn_pool.latent", ("pool.probe",)),
        *linear("attn_pool.q", query),
        *linear("attn_pool.kv", key, value),
        *linear("attn_pool.proj", "pool.attention.out"),
        *norm("attn_pool.norm", "pool.norm", bias=style.norm_bias),
        *linear("attn_pool.mlp.fc1", "pool.mlp.up"),
        *linear("attn_pool.mlp.fc2", "pool.mlp.down"),
    ]


def _unsupported(config: Config) -> str | None:
    head = config.head_style
    if not config.parallel and not config.style.out_bias:
        return "timm's Block has a bias in the attention's output: style.out_bias=True"
    if config.pool == "map" and (head.qk_norm or not head.qkv_bias or not head.out_bias):
        return "timm's attention pooling has all biases and no QK-norm: set head_style so"
    return None


def _describe(source: Source) -> tuple[dict[str, Any], dict[str, Any]]:
    shapes = shapes_of(source, {name: name for name in source.arrays})
    width, channels, patch_size, _ = shapes["patch_embed.proj.weight"]
    parallel = "blocks.0.in_norm.weight" in shapes
    depth = depth_of(shapes, "blocks.", ".in_norm.weight" if parallel else ".norm1.weight")
    own = "blocks.0." if parallel else "blocks.0.attn."
    norm_bias, qk_norm = "norm.bias" in shapes, f"{own}q_norm.weight" in shapes
    kind: Norm = "ln" if norm_bias else "rms"
    into = "in_proj" if parallel else "qkv"
    has_cls = "cls_token" in shapes
    pool = "map" if "attn_pool.latent" in shapes else "cls" if has_cls else "gap"
    style = Style(
        norm=kind,
        norm_bias=norm_bias,
        qk_norm=kind if qk_norm else None,
        qkv_bias=f"{own}{into}.bias" in shapes,
        out_bias="blocks.0.out_proj.weight" not in shapes,
    )
    if parallel:
        mlp_dim = shapes["blocks.0.in_proj.weight"][0] - 3 * width
    else:
        mlp_dim = shapes["blocks.0.mlp.fc1.weight"][0]
    stated: dict[str, Any] = {
        "width": width,
        "depth": depth,
        "mlp_dim": mlp_dim,
        "patch_size": patch_size,
        "channels": channels,
        "num_classes": shapes["head.weight"][0] if "head.weight" in shapes else None,
        "parallel": parallel,
        "pool": pool,
    }
    if qk_norm:
        stated["heads"] = width // shapes[f"{own}q_norm.weight"][0]
    guessed = heads(width, depth) | image(shapes["pos_embed"][1] - has_cls, patch_size)
    head_style = _head_style(shapes, kind)
    return stated, guessed | {"style": style, "head_style": head_style, "activation": "gelu"}


def _head_style(shapes: Mapping[str, Shape], kind: Norm) -> Style:
    if "attn_pool.norm.weight" not in shapes or "attn_pool.norm.bias" in shapes:
        return STANDARD
    return Style(norm=kind, norm_bias=False)


FORMAT = Format(
    suffix=".safetensors",
    arrangement=TORCH,
    entries=_entries,
    recognises=lambda names: "patch_embed.proj.weight" in names,
    unsupported=_unsupported,
    describe=_describe,
    position="pos_embed",
    hints={
        "fc_norm": "this model normalises after the mean of the tokens, ours before it: make timm's"
        " with fc_norm=False",
        "out_proj.": "one output projection for both (fuse_out_proj) is style.out_bias=False here,"
        " two are out_bias=True",
        "q_norm.bias": "QK-norms have no bias here: make timm's with norm_layer=RmsNorm",
        ".ls": "layer scale is not part of these models",
        "reg_token": "register tokens are not part of these models",
    },
)
