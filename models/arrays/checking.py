"""Whether a file fits a model, and what to do where it does not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from models.arrays.format import Entry, Format
from models.arrays.reading import Stored
from models.vit_config import Config

SHOWN = 4
STATED = ("heads", "parallel", "style", "head_style", "pool", "activation", "epsilon")
"""Fields that change what a model computes, and that no shape need show."""


def check(
    what: str,
    form: Format,
    config: Config,
    entries: Sequence[Entry],
    leaves: Mapping[str, Any],
    found: Mapping[str, Stored],
) -> None:
    """Compares names, then shapes and dtypes.

    Args:
      what: the file, for the message.
      form: its format.
      config: the model.
      entries: the table of the format.
      leaves: the model's parameters by name.
      found: the file's arrays by canonical name.

    Raises:
      ValueError: with the first few that differ, and the remedies.
    """
    wanted = {entry.name: entry for entry in entries}
    missing = [name for name in wanted if name not in found]
    spare = [name for name in found if name not in wanted]
    if missing or spare:
        named = [(name, f"{name} is missing") for name in missing]
        named += [(name, f"{name} has no place in the model") for name in spare]
        _refuse(what, form, sorted(named))
    wrong = []
    for name, entry in wanted.items():
        shape, dtype = expected(form, config, entry, leaves)
        stored = found[name]
        if stored.shape != shape or not np.can_cast(stored.dtype, dtype, "safe"):
            has = f"{stored.dtype}{stored.shape}"
            wrong.append((name, f"{name} is {has}, and the model has {dtype}{shape}"))
    if wrong:
        _refuse(what, form, wrong)


def expected(
    form: Format, config: Config, entry: Entry, leaves: Mapping[str, Any]
) -> tuple[tuple[int, ...], np.dtype]:
    """The shape and dtype of an entry's array, for these parameters."""
    shapes = []
    for name in entry.ours:
        shape = leaves[name].shape
        inner = shape if entry.layer is None else shape[1:]
        shapes.append(form.arrangement.shape(name, inner, config))
    whole = list(shapes[0])
    if len(shapes) > 1:
        whole[entry.axis] = sum(shape[entry.axis] for shape in shapes)
    return tuple(whole), np.dtype(leaves[entry.ours[0]].dtype)


def agree(what: str, stated: Mapping[str, Any], config: Config) -> None:
    """Compares a config with what a file states.

    Args:
      what: the file, for the message.
      stated: fields of the config.
      config: the model.

    Raises:
      ValueError: if a field differs that changes what the model computes.
    """
    for name in STATED:
        if name == "head_style" and config.pool != "map":
            continue
        if name in stated and stated[name] != getattr(config, name):
            raise ValueError(
                f"{what} is of a model with {name}={stated[name]!r}, and the config has "
                f"{name}={getattr(config, name)!r}; formats.config_of(path) gives the file's config"
            )


def _refuse(what: str, form: Format, wrong: Sequence[tuple[str, str]]) -> None:
    (_, first), *others = wrong
    text = f"{what}: {first}"
    if others:
        some = ", ".join(name for name, _ in others[:SHOWN])
        more = f" and {len(others) - SHOWN} others" if others[SHOWN:] else ""
        text += f", and {len(others)} more differ: {some}{more}"
    raise ValueError(". ".join([text, *_remedies(form, [name for name, _ in wrong])]))


def _remedies(form: Format, names: Iterable[str]) -> list[str]:
    found = []
    for name in names:
        if name.startswith(form.heads):
            found.append("head=False leaves the classifier out; the model's own starts anew")
        if name == form.position:
            found.append(
                "resample=True takes square position embeddings to another grid, "
                "resample=(rows, columns) others"
            )
        found += [remedy for part, remedy in form.hints.items() if part in name]
    return list(dict.fromkeys(found))
