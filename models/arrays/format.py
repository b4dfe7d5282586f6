"""What a format of weights is: a table of the arrays of a file, and how each lies in it.

A table works in both directions, so a format is written once: `Entry("blocks.3.attn.qkv.weight",
("encoder.blocks.attention.query.kernel", ...key..., ...value...), layer=3)` says that layer 3 of
three parameters of ours lies side by side in one array of the file.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal

import numpy as np

from models.arrays.reading import Source
from models.vit_config import Config

Shape = tuple[int, ...]
BLOCKS = "encoder.blocks"
QKV = ("query", "key", "value")


@dataclasses.dataclass(frozen=True)
class Entry:
    """An array of a file.

    Args:
      name: in the file.
      ours: the parameters that lie in it, side by side.
      layer: which layer of them, where ours are stacked and theirs are not.
      axis: the dimension of the file's array along which they follow each other.
    """

    name: str
    ours: tuple[str, ...]
    layer: int | None = None
    axis: int = 0


@dataclasses.dataclass(frozen=True)
class Arrangement:
    """How one parameter lies in a file: its shape there, and the way there and back.

    Args:
      shape: `(name, our shape, config) -> their shape`.
      there: `(name, our array, config) -> theirs`, as a view where numpy can.
      back: `(name, their array, our shape, config) -> ours`, likewise.
    """

    shape: Callable[[str, Shape, Config], Shape]
    there: Callable[[str, np.ndarray, Config], np.ndarray]
    back: Callable[[str, np.ndarray, Shape, Config], np.ndarray]


def _convolution(shape: Shape, config: Config) -> Shape:
    p = config.patch_size
    return (p, p, config.channels, shape[-1])


def _flax_shape(name: str, shape: Shape, config: Config) -> Shape:
    return _convolution(shape, config) if name == "embedding.kernel" else shape


def _torch_shape(name: str, shape: Shape, config: Config) -> Shape:
    if name == "embedding.kernel":
        p, _, channels, d = _convolution(shape, config)
        return (d, channels, p, p)
    if name.endswith(".kernel"):
        inputs = math.prod(shape[:-1]) if name.endswith("attention.out.kernel") else shape[0]
        return (math.prod(shape) // inputs, inputs)
    return (math.prod(shape),) if name.endswith(".bias") else shape


def _torch_there(name: str, x: np.ndarray, config: Config) -> np.ndarray:
    if name == "embedding.kernel":
        return x.reshape(_convolution(x.shape, config)).transpose(3, 2, 0, 1)
    shape = _torch_shape(name, x.shape, config)
    return x.reshape(shape[::-1]).T if name.endswith(".kernel") else x.reshape(shape)


def _torch_back(name: str, y: np.ndarray, shape: Shape, _: Config) -> np.ndarray:
    if name == "embedding.kernel":
        return y.transpose(2, 3, 1, 0).reshape(shape)
    return (y.T if name.endswith(".kernel") else y).reshape(shape)


PLAIN = Arrangement(lambda _n, shape, _c: shape, lambda _n, x, _c: x, lambda _n, y, _s, _c: y)
"""Exactly as ours."""

FLAX = Arrangement(
    _flax_shape,
    lambda name, x, config: x.reshape(_flax_shape(name, x.shape, config)),
    lambda _n, y, shape, _c: y.reshape(shape),
)
"""As flax's layers: what differs is the embedding, a convolution's [p, p, channels, d]."""

TORCH = Arrangement(_torch_shape, _torch_there, _torch_back)
"""As torch's layers: [out, in], heads not told apart; a convolution is [d, channels, p, p]."""


@dataclasses.dataclass(frozen=True)
class Format:
    """A format. `canonical` and `describe` get the file as it is, all else its canonical names.

    Args:
      suffix: of its files.
      arrangement: how parameters lie in them.
      entries: `(config, our shapes) -> the table`.
      recognises: whether a file with these names is one.
      unsupported: why the format cannot express a model, or None.
      describe: `(source) -> (stated, guessed)`: fields of `vit.Config` that the file states, and
        those that its shapes and its format's habits suggest.
      canonical: `(names) -> {canonical name: name in the file}`, without other models' arrays.
      in_file: `(config, canonical name) -> name` to save under.
      stacked: how the names of one layer's arrays begin, before its number, and how those of arrays
        with all layers do, where a file may have either.
      position: the canonical name of the position embeddings.
      position_rank: 3 for [1, tokens, d], 2 for [tokens, d].
      heads: how the names begin of what follows the pooled features.
      hints: `{part of a name: what to do}` if such an array does not fit.
      companion: `(config) -> config.json` to save beside it.
      metadata: `(config) -> words` to save in it.
    """

    suffix: Literal[".safetensors", ".npz"]
    arrangement: Arrangement
    entries: Callable[[Config, Mapping[str, Shape]], list[Entry]]
    recognises: Callable[[Collection[str]], bool]
    unsupported: Callable[[Config], str | None]
    describe: Callable[[Source], tuple[dict[str, Any], dict[str, Any]]]
    canonical: Callable[[Collection[str]], dict[str, str]] = lambda names: {n: n for n in names}
    in_file: Callable[[Config, str], str] = lambda _, name: name
    stacked: tuple[str, str] | None = None
    position: str = "position"
    position_rank: Literal[2, 3] = 3
    heads: tuple[str, ...] = ("head.",)
    hints: Mapping[str, str] = dataclasses.field(default_factory=dict)
    companion: Callable[[Config], dict[str, Any]] | None = None
    metadata: Callable[[Config], dict[str, str]] = lambda _: {}


def linear(name: str, *ours: str, layer: int | None = None, bias: bool = True) -> list[Entry]:
    """A layer of torch: `name.weight` and `name.bias`, of layers of ours side by side."""
    made = [Entry(f"{name}.weight", tuple(f"{o}.kernel" for o in ours), layer)]
    if bias:
        made.append(Entry(f"{name}.bias", tuple(f"{o}.bias" for o in ours), layer))
    return made


def norm(name: str, ours: str, layer: int | None = None, *, bias: bool = True) -> list[Entry]:
    """A norm of torch: `name.weight`, and `name.bias` where it has one."""
    made = [Entry(f"{name}.weight", (f"{ours}.scale",), layer)]
    return [*made, Entry(f"{name}.bias", (f"{ours}.bias",), layer)] if bias else made


def attention(ours: str) -> tuple[str, ...]:
    """The layers of query, key and value."""
    return tuple(f"{ours}.{part}" for part in QKV)
