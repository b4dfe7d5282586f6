"""The family of vision transformers as data: a frozen config, the sizes, and where they come from.

What no public source states about ViT-22B is a flag, and says so: its authors published neither
code nor weights.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple, get_args

Norm = Literal["ln", "rms"]
Attend = Literal["xla", "pallas_tpu"]


@dataclasses.dataclass(frozen=True)
class Style:
    """Norms and biases, of the encoder or of the pooling head.

    Args:
      norm: "ln" subtracts the mean, "rms" does not.
      norm_bias: whether norms have a bias beside their scale.
      qk_norm: norm of queries and keys, per head over head_dim, one scale for all heads and no
        bias; None for none.
      qkv_bias: whether query, key and value have biases.
      out_bias: whether the attention's output projection has one.
    """

    norm: Norm = "ln"
    norm_bias: bool = True
    qk_norm: Norm | None = None
    qkv_bias: bool = True
    out_bias: bool = True


STANDARD = Style()
"""The usual ViT: Dosovitskiy et al. 2021, and every public implementation."""

VIT_22B = Style(norm="rms", norm_bias=False, qk_norm="rms", qkv_bias=False)
"""ViT-22B: no biases in norms and in query, key, value (the authors' talk and blog post).

- `norm`: "without bias and centering" by third parties' notes on the paper: the RMS norm.
- `qk_norm`: the same sentence says "rms"; the code that an author of the paper gave to flax
  (`normalize_qk`) subtracts the mean, "ln". A flag, since the sources disagree.
- `out_bias`: not stated in any public source. timm keeps it; the bias of the MLP's output, which is
  added to the same sum, does the same work.
"""


@dataclasses.dataclass(frozen=True)
class Config:
    """One vision transformer. `variant` makes the known ones.

    Args:
      width: d, the model width.
      depth: number of blocks.
      mlp_dim: hidden units of the MLP.
      heads: attention heads; each has width / heads features.
      patch_size: pixels along the side of a patch.
      image_size: pixels along the side of the images that the position embeddings are learned for;
        or (height, width). Others are resampled.
      channels: of the images.
      num_classes: size of the output; None leaves the classifier out, the pooled features come out.
      parallel: attention and MLP side by side behind one norm (ViT-22B), or one after the other.
      style: norms and biases of the encoder.
      head_style: norms and biases of the attention pooling head. What ViT-22B's was like is not
        stated in any public source, so by default it is big_vision's standard one.
      pool: "map", attention pooling with a learned query; "gap", the mean of the tokens; "cls", a
        learned token in front of the patches.
      activation: "gelu_tanh", the approximation that flax takes by default and all of the family's
        public code with it, or "gelu", the exact one, as in torch.
      epsilon: what norms add to the variance (1e-6 in flax and timm; 1e-12 in transformers' ViT).
      head_bias: initial value of the classifier's bias; big_vision trains ViT-g with -10.
      dtype: of activations and products. Parameters, norms, softmax and logits are float32. How
        ViT-22B mixed precisions is not stated in any public source.
      attention: what computes it in the blocks, between the projections, see `models.attend`; None
        chooses.
      remat: what the backward pass finds saved; see `encoder.REMAT`. None: everything.
      unroll: blocks that one step of the scan over layers runs; `depth` unrolls it.

    Raises:
      ValueError: if sizes do not divide, or a word is unknown.
    """

    width: int
    depth: int
    mlp_dim: int
    heads: int
    patch_size: int
    image_size: int | tuple[int, int] = 224
    channels: int = 3
    num_classes: int | None = 1000
    parallel: bool = False
    style: Style = STANDARD
    head_style: Style = STANDARD
    pool: Literal["map", "gap", "cls"] = "map"
    activation: Literal["gelu_tanh", "gelu"] = "gelu_tanh"
    epsilon: float = 1e-6
    head_bias: float = 0.0
    dtype: str = "bfloat16"
    attention: Attend | None = None
    remat: Literal["full", "dots", "products"] | None = None
    unroll: int = 1

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width={self.width} does not split into heads={self.heads}")
        self.grid_of(*self.image_shape)
        for field, known in (
            ("pool", ("map", "gap", "cls")),
            ("activation", ("gelu_tanh", "gelu")),
            ("attention", (None, *get_args(Attend))),
        ):
            if getattr(self, field) not in known:
                raise ValueError(f"{field}={getattr(self, field)!r} is none of {known}")

    @property
    def head_dim(self) -> int:
        """Features of one attention head."""
        return self.width // self.heads

    @property
    def image_shape(self) -> tuple[int, int]:
        """Height and width of the images that the position embeddings are learned for."""
        size = self.image_size
        return (size, size) if isinstance(size, int) else size

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the position embeddings."""
        return self.grid_of(*self.image_shape)

    @property
    def patch_dim(self) -> int:
        """Numbers in one patch."""
        return self.patch_size**2 * self.channels

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches of an image.

        Raises:
          ValueError: if the image does not split into patches.
        """
        p = self.patch_size
        if height % p or width % p:
            raise ValueError(
                f"an image of {height} x {width} pixels does not split into patches of {p} x {p}"
            )
        return height // p, width // p


class Size(NamedTuple):
    """One row of `SIZES`, and where its numbers are published."""

    width: int
    depth: int
    mlp_dim: int
    heads: int
    source: str


SIZES = {
    "mu": Size(64, 2, 256, 8, "ours: runs anywhere, with heads for a tensor axis of up to 8"),
    "Ti": Size(192, 12, 768, 3, "Touvron et al. 2021, arXiv 2012.12877"),
    "S": Size(384, 12, 1536, 6, "Touvron et al. 2021, arXiv 2012.12877"),
    "B": Size(768, 12, 3072, 12, "Dosovitskiy et al. 2021, arXiv 2010.11929"),
    "L": Size(1024, 24, 4096, 16, "Dosovitskiy et al. 2021, arXiv 2010.11929"),
    "H": Size(1280, 32, 5120, 16, "Dosovitskiy et al. 2021, arXiv 2010.11929"),
    "g": Size(1408, 40, 6144, 16, "Zhai et al. 2022, arXiv 2106.04560"),
    "G": Size(1664, 48, 8192, 16, "Zhai et al. 2022, arXiv 2106.04560"),
    "e": Size(1792, 56, 15360, 16, "Chen et al. 2023, arXiv 2209.06794"),
    "22B": Size(6144, 48, 24576, 48, "Dehghani et al. 2023, arXiv 2302.05442"),
}
"""All but mu and 22B as in google-research/big_vision, `models/vit.py: decode_variant`."""


def variant(name: str, **changes: object) -> Config:
    """The config of a named model: `variant("B/16")`, `variant("22B/14", image_size=560)`.

    Args:
      name: a size and a patch size in pixels; sizes are those of `SIZES`.
      **changes: fields of `Config` to set differently.

    Raises:
      ValueError: if there is no such size, or the patch size is no number.
    """
    size, _, patch = name.partition("/")
    if size not in SIZES or not patch.isdigit():
        raise ValueError(
            f"no variant {name!r}; write one of {', '.join(SIZES)}, and a patch size: B/16"
        )
    sizes = SIZES[size]._asdict()
    del sizes["source"]
    special = {"parallel": True, "style": VIT_22B} if size == "22B" else {}
    return Config(**(sizes | {"patch_size": int(patch)} | special | changes))
