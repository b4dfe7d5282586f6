"""Weights in and out: one file of this folder for each format. Its name is what callers write.

    params = formats.load("ViT-L_16.npz", config)                    numpy, the format found out
    params = formats.load("model.safetensors", config, layout=layout)     on a mesh, shard by shard
    formats.save(params, config, "out/model.safetensors", "siglip")
    config = formats.config_of("google-siglip/")

What one format cannot say of a model is refused with the reason; nothing is dropped or made up.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import pathlib
import pkgutil
from typing import Any

import jax
from flax import nnx

from collective_matmul import Layout
from models.arrays import checking, laying
from models.arrays.fitting import fit
from models.arrays.format import Format
from models.arrays.reading import Source, open_file
from models.arrays.tree import abstract
from models.arrays.writing import write
from models.files import atomically
from models.vit_config import Config

Path = str | os.PathLike[str]


def names() -> tuple[str, ...]:
    """The formats there are: the files of this folder."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


def get(name: str) -> Format:
    """A format by name.

    Args:
      name: one of `names()`.

    Raises:
      ValueError: if there is no such file.
    """
    if name not in names():
        raise ValueError(f"no format {name!r}: there are {', '.join(names())}")
    form: Format = importlib.import_module(f"{__name__}.{name}").FORMAT
    return form


def sniff(path: Path) -> str:
    """The format of a file, from the names of its arrays.

    Args:
      path: a file, or the folder of a model.

    Raises:
      FileNotFoundError, ValueError: if there is no file, or it is of no known format.
    """
    return _sniff(open_file(pathlib.Path(path)))


def load(
    path: Path,
    config: Config,
    like: Any = None,
    format: str | None = None,  # noqa: A002
    layout: Layout | None = None,
    *,
    head: bool = True,
    resample: bool | tuple[int, int] = False,
) -> Any:
    """Reads the parameters of a model.

    One parameter at a time is read, and of it what this process's devices hold: no device and, from
    safetensors, no host has a model whole. bfloat16 and float16 become the parameters' float32.

    Args:
      path: a file, or the folder of a model.
      config: the model.
      like: the tree to fill, of arrays or `jax.ShapeDtypeStruct`; None: that of `config`.
      format: one of `names()`; None: found out.
      layout: where the arrays go, if `like` does not say; None: numpy.
      head: whether to read the classifier. Without, the model's starts anew: zeros, and
        `config.head_bias`.
      resample: True takes position embeddings of another grid to the model's, bilinearly, from a
        square grid or, if a pair of numbers, from that many rows and columns.

    Returns:
      Nested dictionaries: of jax arrays where `like` or `layout` says where they lie, else of numpy
      arrays.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if the file is damaged or of no known format, the format has no such models, or
        names, shapes, dtypes or what the file states differ from the model, with the remedy.
    """
    source = open_file(pathlib.Path(path))
    kind = format or _sniff(source)
    form = get(kind)
    _check_supported(kind, form, config)
    what = f"{source.path} as {kind}"
    if not form.recognises(source.arrays):
        raise ValueError(f"{what}: its names are others, such as {_some(source)}")
    checking.agree(what, form.describe(source)[0], config)
    if like is None:
        like = abstract(config, layout)
    return fit(source, kind, form, config, like, head=head, resample=resample)


def save(params: Any, config: Config, path: Path, format: str = "ours") -> None:  # noqa: A002
    """Writes the parameters of a model. Every process calls this; the first one writes.

    Args:
      params: nested dictionaries of arrays, on any mesh.
      config: the model.
      path: the file to make or replace, as a whole; without a suffix, a folder for `model` with the
        format's suffix. transformers' formats get a config.json beside it.
      format: one of `names()`.

    Raises:
      ValueError: if the format has no such models, the suffix is another format's, or the
        parameters are not those of the config.
    """
    form = get(format)
    _check_supported(format, form, config)
    path = pathlib.Path(path)
    path = path if path.suffix else path / f"model{form.suffix}"
    if path.suffix != form.suffix:
        raise ValueError(f"{path}: a file of the format {format} ends in {form.suffix}")
    if isinstance(params, nnx.State):
        params = nnx.to_pure_dict(params)
    write(path, laying.pending(params, config, form), form.metadata(config))
    if form.companion is not None and not jax.process_index():
        with atomically(path.with_name("config.json")) as draft:
            draft.write_text(json.dumps(form.companion(config), indent=2) + "\n")


def config_of(path: Path, format: str | None = None, **changes: Any) -> Config:  # noqa: A002
    """The config of the model that a file has.

    Our own files and those with transformers' config.json state it. Of others the shapes show most,
    and the rest is what is usual there: timm's heads are those of the published model of this size,
    its activation the exact GELU, a norm without bias RMS; position embeddings have a square grid.

    Args:
      path: a file, or the folder of a model.
      format: one of `names()`; None: found out.
      **changes: fields to set, such as those that cannot be told.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if a field is neither shown nor given, or there is no such field.
    """
    source = open_file(pathlib.Path(path))
    kind = format or _sniff(source)
    stated, guessed = get(kind).describe(source)
    fields = guessed | stated | changes
    known = {field.name: field for field in dataclasses.fields(Config)}
    if unknown := sorted(fields.keys() - known):
        raise ValueError(f"vit.Config has no field {unknown[0]!r}; it has {', '.join(known)}")
    needed = [n for n, field in known.items() if field.default is dataclasses.MISSING]
    if missing := [name for name in (*needed, "image_size") if name not in fields]:
        raise ValueError(
            f"{source.path} as {kind} does not show {', '.join(missing)}; give it: "
            f"config_of(path, {missing[0]}=...)"
        )
    return Config(**fields)


def _sniff(source: Source) -> str:
    found = [name for name in names() if get(name).recognises(source.arrays)]
    if len(found) != 1:
        raise ValueError(
            f"{source.path} is of {'no' if not found else 'more than one'} known format "
            f"({', '.join(found or names())}); its arrays are called {_some(source)}"
        )
    return found[0]


def _some(source: Source) -> str:
    return ", ".join(sorted(source.arrays)[:3]) or "nothing"


def _check_supported(kind: str, form: Format, config: Config) -> None:
    if reason := form.unsupported(config):
        raise ValueError(f"the format {kind} has no such model: {reason}")
