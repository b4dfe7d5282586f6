"""Writes the features of images: `python -m models.features MODEL --weights FILE --images FOLDER`.

MODEL is an experiment of models/configs, a variant such as B/16, or `file`: the model that the
weights are of. `python -m models.features MODEL --weights FILE --help` lists all options.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import math
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Literal

import jax
import numpy as np
import tyro

from collective_matmul import Layout
from models import configs, formats, vit
from models.config import MeshSizes
from models.data import Data, Split, splits
from models.devices import Cut, layout_of, simulate
from models.features import Folder, Tower, extract, names_of
from models.features.tower import without_classifier
from models.watch import distributed, fingerprint
from models.watch.config import Watch


@dataclasses.dataclass(frozen=True)
class Options:
    """What to extract, from what, and where to."""

    model: vit.Config
    """the model"""
    weights: pathlib.Path
    """a file of weights, of any of the formats, or a folder with one"""
    images: str
    """a folder of images, or digits"""
    out: pathlib.Path
    """the folder that the features go to"""
    layers: tuple[str, ...] = ("pooled",)
    """which activations: pooled, tokens, logits, or names such as block_3/output and block_*/key"""
    batch: int = 64
    """images at a time, on all devices together"""
    file_images: int = 4096
    """images of one file, about"""
    dtype: Literal["float32", "float16"] = "float32"
    """of the features"""
    format: str | None = None
    """of the weights; None: found out"""
    resample: bool = False
    """whether position embeddings of another grid are taken to this one"""
    split: Literal["train", "test"] = "test"
    """which of the digits; of a folder all images are taken"""
    workers: int = 0
    """processes that decode; 0: threads of this one"""
    skip_bad_images: bool = False
    """whether to go without images that cannot be read"""
    mesh: MeshSizes = (1, 1, 1)
    """devices on the axes data, fsdp and tensor"""
    layout: Cut = "tokens"
    """what the tensor axis cuts between layers"""
    algorithm: str | None = None
    """how the collective matmuls travel; None: the cost model chooses"""
    backend: str | None = None
    """what runs them; None: the cost model chooses"""

    @property
    def devices(self) -> int:
        """How many devices the mesh has."""
        return math.prod(self.mesh)


def main(arguments: Sequence[str]) -> None:
    """What the command line asks for."""
    options = from_command_line(arguments)
    with distributed.joined(Watch()) as processes:
        simulate(math.ceil(options.devices / processes))
        write(options)


def write(options: Options) -> None:
    """Leaves the features in `options.out`.

    Raises:
      ValueError: if the weights do not fit the model, the images or the batch not the mesh, or the
        folder has other features.
    """
    layout = layout_of(options)
    data, split = _images(options)
    tower = _tower(options, layout)
    each = max(1, options.file_images // options.batch)
    plan = {
        "layers": tower.patterns,
        "dtype": options.dtype,
        "batch": options.batch,
        "model": dataclasses.asdict(tower.config),
        "weights": _digest(tower),
        "images": split.fingerprint,
    }
    batches = -(-len(split) // options.batch)
    folder = Folder(options.out, plan, names_of(split, data), batches=batches, each=each)
    missing = folder.missing()
    lacking = sum(end - first for first, end in missing)
    _say(f"{len(split):,} images, {folder.count - lacking} of {folder.count} files are there")
    done, began = 0, time.perf_counter()
    for first, end in missing:
        start, stop = folder.span(first, end)
        parts: list[dict[str, np.ndarray]] = []
        made = extract(tower, split, data, options.batch, start=start, stop=stop)
        for batch, (_, arrays) in enumerate(made, start):
            parts.append(arrays)
            if batch + 1 == stop or (batch + 1) % each == 0:
                folder.write(batch // each, parts)
                done += options.batch * len(parts)
                speed = done / (time.perf_counter() - began)
                _say(f"file {batch // each + 1} of {folder.count}, {speed:,.0f} images/s")
                parts = []
    sizes = ", ".join(f"{name} {list(shape)}" for name, shape in tower.shapes.items())
    _say(f"{sizes} of each image are in {options.out}")


def from_command_line(arguments: Sequence[str]) -> Options:
    """`MODEL --weights FILE [--field value ...]`; what is unknown ends the process with status 2.

    Args:
      arguments: what follows `python -m models.features`.
    """
    first = argparse.ArgumentParser(prog="python -m models.features", add_help=False)
    first.add_argument("model")
    first.add_argument("--weights", type=pathlib.Path)
    first.add_argument("--format")
    if not arguments or arguments[0].startswith("-"):
        raise SystemExit(__doc__)
    known, _ = first.parse_known_args(arguments)
    try:
        if known.model == "file":
            if known.weights is None:
                raise ValueError(
                    "`file` is the model that the weights are of: name them: --weights FILE"
                )
            model = formats.config_of(known.weights, known.format)
        elif "/" in known.model:
            model = vit.variant(known.model)
        else:
            model = configs.load(known.model).model
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(str(error)) from None
    return tyro.cli(
        Options,
        prog=f"python -m models.features {known.model}",
        description=__doc__,
        default=Options(model, tyro.MISSING, tyro.MISSING, tyro.MISSING),
        args=list(arguments[1:]),
        config=(tyro.conf.FlagConversionOff,),
    )


def _images(options: Options) -> tuple[Data, Split]:
    if options.images == "digits":
        data = Data(source="digits", workers=options.workers)
    else:
        path = pathlib.Path(options.images)
        data = Data(
            source="folder",
            path=path,
            test_path=path,  # all of it
            workers=options.workers,
            skip_bad_records=options.skip_bad_images,
        )
    shape, channels = options.model.image_shape, options.model.channels
    train, test = splits(data, image_shape=shape, channels=channels, classes=None, seed=0)
    return data, train if options.split == "train" else test


def _tower(options: Options, layout: Layout | None) -> Tower:
    config = without_classifier(options.model, options.layers)
    params = formats.load(
        options.weights,
        config,
        format=options.format,
        layout=layout,
        head=config.num_classes is not None,
        resample=options.resample,
    )
    if layout is None:
        params = jax.device_put(params)
    return Tower(params, config, layers=options.layers, layout=layout, dtype=options.dtype)


def _digest(tower: Tower) -> str:
    """What stands for the weights' values."""
    return hashlib.sha256(np.asarray(fingerprint.marks(tower.params)).tobytes()).hexdigest()[:16]


def _say(text: str) -> None:
    if not jax.process_index():
        print(text, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
