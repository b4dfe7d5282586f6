"""Measures how many images a second are decoded, against what a training step eats.

    python -m bench data [--appetite 5000] [--workers 1 2] [--threads 1 2] [--json FILE]

JPEGs are generated, read from a folder, cropped, flipped and resized as an ImageNet run does, by a
plain loop, by threads of one process and by worker processes. The appetite is in images/s; without
`--appetite` it is predicted for `--model` on one `--chip`, at the MFU that is assumed.
"""

from __future__ import annotations

import argparse
import math
import pathlib
import tempfile
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from bench.commands import UserError
from bench.flops import count
from bench.record import Record
from bench.tables import markdown
from bench.work import model_work
from collective_matmul import hardware
from models import vit
from models.data import Data
from models.data.throughput import Rate, alone, photographs, reading, streamed

ORDER = 70  # among the tables of the report


def main(arguments: Sequence[str]) -> int:
    """Times, prints the table and writes the JSON that was asked for."""
    parser = argparse.ArgumentParser("python -m bench data", description=__doc__)
    parser.add_argument("--appetite", type=float, help="images/s that the steps take")
    parser.add_argument("--model", default="S/16", help="whose appetite is predicted")
    parser.add_argument("--chip", default="v5e", help="which it trains on, one device of it")
    parser.add_argument("--mfu", type=float, default=0.4, help="that it is assumed to reach")
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2], metavar="N")
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2], metavar="N")
    parser.add_argument("--size", default="500x375", help="width x height of the JPEGs")
    parser.add_argument("--resolution", type=int, default=224, help="of an image as a step sees it")
    parser.add_argument("--images", type=int, default=64, help="how many different JPEGs")
    parser.add_argument("--batch", type=int, default=64, help="images of a batch")
    parser.add_argument("--batches", type=int, default=20, help="how many are timed")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="where to write a record")
    asked = parser.parse_args(arguments)
    try:
        width, height = (int(size) for size in asked.size.split("x"))
    except ValueError:
        raise UserError(f"--size {asked.size} is not WIDTHxHEIGHT, such as 500x375") from None
    if min(width, height, asked.resolution, asked.images - 1, asked.batch, asked.batches) < 1:
        raise UserError("sizes and counts must be at least 1, and --images at least 2")
    eaten, said = appetite(asked)
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        size = photographs(root, asked.images, (width, height)) / asked.images
        rows = measured(root, asked, eaten)
    remarks = [
        f"JPEGs of {width} x {height} pixels and {size / 1e3:.0f} kB, from a folder in the page "
        f"cache; inception crop and flip to {asked.resolution} x {asked.resolution}. "
        f"{asked.batches} batches of {asked.batch}.",
        f"The appetite is {said}.",
        "Enough: how many such threads or workers would feed the step, at the rate of one of them "
        "here, with a core each.",
    ]
    print(markdown(rows), *remarks, sep="\n")
    if asked.json:
        result = {
            "title": "Decoding, against the appetite of a training step",
            "order": ORDER,
            "appetite": eaten,
            "rows": rows,
            "remarks": remarks,
        }
        Record("measured", "data", "cpu", result).save(asked.json)
    return 0


def appetite(asked: argparse.Namespace) -> tuple[float, str]:
    """Images/s that a step takes, and where the number comes from.

    Raises:
      UserError: if there is no such model or chip, or it has no published peak.
    """
    if asked.appetite is not None:
        if asked.appetite <= 0:
            raise UserError(f"--appetite {asked.appetite} must be more than 0")
        return asked.appetite, f"{asked.appetite:,.0f} images/s, as was asked for"
    try:
        config = vit.variant(asked.model, image_size=asked.resolution)
        chip = hardware.chip(asked.chip)
    except (ValueError, KeyError) as error:
        raise UserError(str(error)) from error
    peak = hardware.peak(chip, jnp.bfloat16)
    if peak is None or not 0 < asked.mfu <= 1:
        raise UserError(f"--mfu {asked.mfu} of the bfloat16 peak of {asked.chip}: there is none")
    graph, variables = nnx.split(
        nnx.eval_shape(lambda: vit.ViT(config, layout=None, rngs=nnx.Rngs(0)))
    )
    image = jax.ShapeDtypeStruct((1, *config.image_shape, config.channels), jnp.float32)
    forward = count(lambda variables, x: nnx.merge(graph, variables)(x), variables, image)
    work = model_work(forward)
    eaten = asked.mfu * peak / work.flops
    return eaten, (
        f"predicted, not measured: {eaten:,.0f} images/s, which is ViT-{asked.model} on one "
        f"{chip.name} at an assumed MFU of {asked.mfu:.0%} of {peak / 1e12:g} TFLOP/s, with "
        f"{work.flops / 1e9:.1f} GFLOP an image"
    )


def measured(root: pathlib.Path, asked: argparse.Namespace, eaten: float) -> list[dict[str, Any]]:
    """A row for each way of reading."""
    split, config = reading(root, asked.resolution, Data())
    loop = alone(split, config, asked.batch, asked.batches)
    rows = [_row("a plain loop", 1, loop, loop, eaten)]
    ways = [("threads", n, Data(threads=n)) for n in asked.threads]
    ways += [("workers", n, Data(threads=1, workers=n)) for n in asked.workers]
    for name, number, way in ways:
        split, config = reading(root, asked.resolution, way)
        rate = streamed(split, config, asked.batch, asked.batches)
        rows.append(_row(name, number, rate, loop, eaten))
    return rows


def _row(name: str, number: int, rate: Rate, loop: Rate, eaten: float) -> dict[str, Any]:
    each = rate.images_per_second / number
    return {
        "read by": name,
        "number": number,
        "images/s": rate.images_per_second,
        "of a plain loop": rate.images_per_second / loop.images_per_second,
        "of the appetite": rate.images_per_second / eaten,
        "enough": math.ceil(eaten / each),
    }
