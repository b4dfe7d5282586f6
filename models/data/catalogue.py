"""The images of a folder and their labels: from class folders, or from a JSON or CSV file.

    FOLDER/CLASS/.../NAME.jpg     each image has the label CLASS
    FOLDER/.../NAME.jpg           and {"NAME.jpg": ["cat", "pet"]}, or the line NAME.jpg,cat,pet
    FOLDER/NAME.jpg               no labels

A hierarchy, {"cat": ["mammal"], "mammal": ["animal"]} or lines cat,mammal, is flattened: an image
of a cat is given the labels mammal and animal as well, as the labels of JFT are used in Dehghani et
al. 2023 (arXiv 2302.05442), section 4.1.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Iterable, Mapping

from models.data.images import digest

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
Table = Mapping[str, tuple[str, ...]]


@dataclasses.dataclass(frozen=True)
class Catalogue:
    """What images there are.

    Args:
      root: their folder.
      names: their paths below it, sorted, with / between the parts.
      labels: the classes of each, by number.
      classes: the names of the classes, or None: the images have no labels.
    """

    root: pathlib.Path
    names: tuple[str, ...]
    labels: tuple[tuple[int, ...], ...]
    classes: tuple[str, ...] | None

    @functools.cached_property
    def multilabel(self) -> bool:
        """Whether some image has several labels, or none where others have one."""
        return self.classes is not None and any(len(labels) != 1 for labels in self.labels)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of names, labels and classes; where the folder lies does not matter."""
        return digest("\n".join(self.names), repr(self.labels), repr(self.classes))


def catalogue(
    root: pathlib.Path,
    *,
    labels: pathlib.Path | None = None,
    hierarchy: pathlib.Path | None = None,
    classes: tuple[str, ...] | None = None,
) -> Catalogue:
    """Lists the images of a folder; none of them is opened.

    Args:
      root: the folder.
      labels: the file with the labels of each image, or None: class folders, if there are any.
      hierarchy: the file with the parents of labels, or None: labels stay as they are.
      classes: all classes in their order, or None: those that occur, sorted.

    Raises:
      ValueError: if there are no images, or it is not clear what their labels are.
    """
    names = tuple(sorted(_images(root)))
    if not names:
        raise ValueError(f"{root} holds no images: no file ends in {', '.join(SUFFIXES)}")
    told = _class_folders(root, names) if labels is None else _listed(root, names, labels)
    if told is None:
        if hierarchy is not None:
            raise ValueError(f"{hierarchy} is of no use: the images of {root} have no labels")
        return Catalogue(root, names, ((),) * len(names), None)
    parents = {} if hierarchy is None else table(hierarchy)
    flat = {found: flattened(found, parents) for found in set(told)}
    if classes is None:
        classes = tuple(sorted(set().union(*flat.values())))
    number = {name: place for place, name in enumerate(classes)}
    for name, found in zip(names, told, strict=True):
        if strange := set(flat[found]) - set(number):
            raise ValueError(
                f"{root / name} has the label {min(strange)!r}, which none of the {len(classes)} "
                "classes of the training images is"
            )
    numbers = {found: tuple(sorted(number[x] for x in wide)) for found, wide in flat.items()}
    return Catalogue(root, names, tuple(numbers[found] for found in told), classes)


def flattened(labels: Iterable[str], parents: Table) -> tuple[str, ...]:
    """Labels and all their ancestors, sorted.

    Args:
      labels: as they were assigned.
      parents: of each label that has some.

    Raises:
      ValueError: if a label is its own ancestor.
    """
    found: set[str] = set()

    def climb(label: str, below: tuple[str, ...]) -> None:
        if label in below:
            raise ValueError(f"the hierarchy turns round: {' < '.join((*below, label))}")
        found.add(label)
        for parent in parents.get(label, ()):
            climb(parent, (*below, label))

    for label in labels:
        climb(label, ())
    return tuple(sorted(found))


def table(path: pathlib.Path) -> Table:
    """What each name has: {"name": ["value", ...]} of JSON, or lines name,value,... of CSV.

    Raises:
      ValueError: if the file is neither.
    """
    if path.suffix == ".json":
        read = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(read, dict):
            raise ValueError(f"{path} must be an object of lists: {{name: [value, ...]}}")
        return {name: (x,) if isinstance(x, str) else tuple(x) for name, x in read.items()}
    if path.suffix == ".csv":
        found: dict[str, tuple[str, ...]] = {}
        with path.open(encoding="utf-8", newline="") as file:
            for name, *values in filter(None, csv.reader(file)):
                found[name] = (*found.get(name, ()), *filter(None, values))
        return found
    raise ValueError(f"{path} is neither .json nor .csv")


def _images(root: pathlib.Path) -> Iterable[str]:
    if not root.is_dir():
        raise ValueError(f"{root} is no folder")
    for folder, folders, files in os.walk(root):
        folders[:] = (name for name in folders if not name.startswith("."))
        for name in files:
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                yield (pathlib.Path(folder) / name).relative_to(root).as_posix()


def _class_folders(root: pathlib.Path, names: tuple[str, ...]) -> list[tuple[str, ...]] | None:
    inside = ["/" in name for name in names]
    if not any(inside):
        return None
    if not all(inside):
        raise ValueError(
            f"{root} holds both class folders and images beside them, such as "
            f"{names[inside.index(False)]}, which have no class; move these, or name a file of "
            "labels"
        )
    return [(name.partition("/")[0],) for name in names]


def _listed(
    root: pathlib.Path, names: tuple[str, ...], path: pathlib.Path
) -> list[tuple[str, ...]]:
    told = table(path)
    if missing := sorted(set(told) - set(names)):
        raise ValueError(
            f"{path} has labels of {missing[0]}, which {root} does not hold, and of "
            f"{len(missing) - 1} more such images"
        )
    if missing := sorted(set(names) - set(told)):
        raise ValueError(f"{path} has no labels of {missing[0]}, nor of {len(missing) - 1} more")
    return [told[name] for name in names]
