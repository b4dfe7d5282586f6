"""Predicts a model's training step on TPUs that are not there, and compares ways to partition it.

The real step is compiled by the TPU compiler for the slice that is asked for; needs libtpu, and no
TPU. Times are predictions, and their known error stands beside them.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Sequence
from typing import Any, Literal

from bench import plots, predicted_tables
from bench.asking import read
from bench.commands import UserError
from bench.predicted import baselines, figures
from bench.predicted.baselines import Baseline
from bench.predicted.comparison import Row, as_dicts, compare, table, tell, winner
from bench.predicted.keeping import keep
from bench.predicted.prediction import Prediction, accuracy, predict
from bench.predicted.programs import Program, vit_step
from bench.predicted.slices import chip_of, compile_only, tpu_slice
from collective_matmul import make_mesh
from collective_matmul.mesh import AXES
from models import vit

MODELS = {"vit_22b": "22B/14"}
IMAGES = 64  # a device, by default: ViT-22B trained with 65,536 on 1,024


@dataclasses.dataclass(frozen=True)
class Options:
    """What to predict."""

    model: str = "vit_22b"
    """vit_22b, or any SIZE/PATCH of models/vit.py: B/16, L/16, e/14"""
    topology: str = "v4:8x8x16"
    """the slice: CHIP:XxY or CHIP:XxYxZ, in chips"""
    mesh: str = "data=-1,fsdp=8,tensor=4"
    """devices on each axis; one may be -1, what is left; an axis that is not named has 1"""
    algorithm: str | None = None
    """how the collective matmuls travel; None: the cost model chooses"""
    backend: str | None = None
    """what runs them; None: the cost model chooses"""
    layout: Literal["tokens", "features"] = "tokens"
    """what the tensor axis cuts between layers"""
    token_dim: Literal[0, 1] = 0
    """with tokens: 0 cuts the batch rows, whose tokens lie together in memory; 1 the sequence"""
    remat: Literal["none", "full", "dots", "products"] = "full"
    """what the backward pass computes again; full saves the inputs of blocks alone"""
    batch: int | None = None
    """images of a step, on all devices; None: 64 a device, as ViT-22B trained"""
    image_size: int = 224
    """pixels along the side"""
    depth: int | None = None
    """number of blocks; None: the model's own"""
    classes: int = 1000
    """of the classifier"""
    dtype: str = "bfloat16"
    """of activations and products"""
    compare: bool = False
    """predict the same step under all baselines"""
    sweep: bool = False
    """compare at several batches: MFU against tokens per chip"""
    factors: tuple[float, ...] = (1 / 8, 1 / 4, 1 / 2, 1.0, 2.0)
    """with --sweep: the batches, as multiples of the asked one"""
    baselines: tuple[str, ...] = ()
    """with --compare or --sweep: only these rows"""
    out: pathlib.Path | None = None
    """folder for JSON, pictures and the trace"""


def main(arguments: Sequence[str]) -> int:
    """Predicts, prints and writes; out of memory is a result."""
    asked = read(Options, "predict", __doc__, arguments)
    compile_only()
    rows = _chosen(asked.baselines)
    devices = tpu_slice(asked.topology)
    sizes = _sizes(asked.mesh, devices)
    if asked.sweep:
        return _sweep(asked, devices, sizes, rows)
    if asked.compare:
        return _compare(asked, devices, sizes, rows)
    return _single(asked, devices, sizes)


def _single(asked: Options, devices: Any, sizes: tuple[int, int, int]) -> int:
    name = asked.algorithm or asked.backend or baselines.OURS
    row = Baseline(name, "as asked", asked.algorithm, asked.backend)
    try:
        program = _program(asked, devices, sizes, row)
    except (ValueError, NotImplementedError) as error:
        raise UserError(str(error)) from error
    found = predict(name, program)
    print(found)
    if asked.out:
        _keep(asked, "predict", {"prediction": found.as_dict()}, found)
    return 0 if found.failure is None else 1


def _compare(
    asked: Options, devices: Any, sizes: tuple[int, int, int], rows: Sequence[Baseline]
) -> int:
    found = compare(rows, functools.partial(_program, asked, devices, sizes))
    title = _title(asked, devices)
    print(f"{title}\n\n{table(found)}\n\naccuracy: {accuracy(chip_of(devices))}")
    if asked.out:
        best = winner(found)
        _keep(asked, "compare", {"rows": as_dicts(found)}, best)
        figures.comparison(as_dicts(found), asked.out / "compare.png", title)
    return 0 if winner(found) else 1


def _sweep(
    asked: Options, devices: Any, sizes: tuple[int, int, int], rows: Sequence[Baseline]
) -> int:
    batch = _batch(asked, devices)
    found: dict[int, list[Row]] = {}
    for images in dict.fromkeys(max(1, round(factor * batch)) for factor in asked.factors):
        tell(f"batch {images:,}:")
        smaller = dataclasses.replace(asked, batch=images)
        found[images] = compare(rows, functools.partial(_program, smaller, devices, sizes))
        print(f"{_title(smaller, devices)}\n\n{table(found[images])}\n")
    print(f"accuracy: {accuracy(chip_of(devices))}")
    if asked.out:
        result = {"batches": {str(images): as_dicts(each) for images, each in found.items()}}
        _keep(asked, "sweep", result, None)
        (table_of_all,) = predicted_tables.tables(result)
        for plot in table_of_all["plots"]:
            plots.draw(plot, asked.out / "sweep.png", _title(asked, devices))
    return 0


def _program(asked: Options, devices: Any, sizes: tuple[int, int, int], row: Baseline) -> Program:
    layout = row.layout(devices, sizes, activations=asked.layout, token_dim=asked.token_dim)
    changes: dict[str, Any] = {"depth": asked.depth} if asked.depth else {}
    model = vit.variant(
        MODELS.get(asked.model, asked.model),
        image_size=asked.image_size,
        num_classes=asked.classes,
        dtype=asked.dtype,
        remat=None if asked.remat == "none" else asked.remat,
        **changes,
    )
    return vit_step(model, layout, _batch(asked, devices))


def _sizes(text: str, devices: Any) -> tuple[int, int, int]:
    """The mesh that "data=2,fsdp=4" means.

    Raises:
      UserError: if it means none, or none of so many devices.
    """
    try:
        pairs = dict(part.split("=") for part in text.replace(" ", "").split(","))
        asked = {axis: int(size) for axis, size in pairs.items()}
    except ValueError:
        raise UserError(f"--mesh {text}: write data=64,fsdp=4,tensor=4, one axis or more") from None
    unknown = sorted(set(asked) - set(AXES))
    if unknown:
        raise UserError(f"--mesh {text}: no axis {unknown[0]!r}; there are {', '.join(AXES)}")
    try:
        mesh = make_mesh(*(asked.get(axis, 1) for axis in AXES), devices=devices)
    except ValueError as error:
        raise UserError(f"--mesh {error}") from error
    data, fsdp, tensor = mesh.devices.shape
    return data, fsdp, tensor


def _chosen(names: tuple[str, ...]) -> tuple[Baseline, ...]:
    try:
        return baselines.named(names)
    except ValueError as error:
        raise UserError(f"--baselines: {error}") from error


def _batch(asked: Options, devices: Any) -> int:
    return asked.batch or IMAGES * len(devices)


def _title(asked: Options, devices: Any) -> str:
    batch, chip = _batch(asked, devices), chip_of(devices)
    return (
        f"{asked.model} on {asked.topology} ({len(devices):,} x {chip.name}), {batch:,} images of "
        f"{asked.image_size} x {asked.image_size} a step, {asked.mesh}, remat {asked.remat}: "
        "predicted"
    )


def _keep(asked: Options, name: str, result: dict[str, Any], drawn: Prediction | None) -> None:
    assert asked.out is not None
    chip = chip_of(tpu_slice(asked.topology))
    keep(asked.out, name, command="predict", options=asked, chip=chip, result=result, drawn=drawn)
