"""What is timed on a GPU, as data that both frameworks read, and how a process reports it.

A case is a stack of ViT-22B's blocks at their full width, between whose ends nothing but a norm is
added, or a whole vision transformer. Both have bfloat16 kernels and activations.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from bench.measured.timing import measure
from models.vit_config import Config, variant

PASSES = ("forward", "forward+backward")
WARMUP = 3
AT_LEAST = 0.2  # s of a round


@dataclasses.dataclass(frozen=True)
class Case:
    """One model with its batch.

    Args:
      name: as the table calls it.
      config: the model.
      batch: images.
      whole: the whole model, from images to logits; or its encoder alone, on tokens.
    """

    name: str
    config: Config
    batch: int
    whole: bool

    @property
    def tokens(self) -> int:
        """Of an image."""
        rows, columns = self.config.grid
        return rows * columns

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what goes in: images [b, height, width, c], or tokens [b, s, d]."""
        if self.whole:
            return (self.batch, *self.config.image_shape, self.config.channels)
        return (self.batch, self.tokens, self.config.width)


def cases(*, tiny: bool) -> dict[str, Case]:
    """All of them by name; `tiny` ones run on a CPU in a moment and tell nothing."""
    if tiny:
        block = dataclasses.replace(_blocks(1), width=64, mlp_dim=256, heads=4, image_size=28)
        small = variant("mu/4", image_size=16, num_classes=10)
        found = [
            Case("22B block x 1", block, 2, whole=False),
            Case("ViT mu/4", small, 2, whole=True),
        ]
    else:
        found = [Case(f"22B block x {n}", _blocks(n), 32, whole=False) for n in (1, 4)]
        found += [
            Case(f"ViT {name}", variant(name), batch, whole=True)
            for name, batch in (("B/16", 256), ("L/16", 128), ("H/14", 64), ("g/14", 64))
        ]
    return {case.name: case for case in found}


def report(
    request: Mapping[str, Any],
    out: pathlib.Path,
    prepare: Callable[[Case, bool], tuple[Callable[[], Any], Callable[[Any], Any]]],
    chip: str,
) -> None:
    """Times a case's two passes, and leaves a line for each as soon as it is there.

    A pass that fails leaves its error, and the next one runs.

    Args:
      request: "case", "tiny", "rounds".
      out: the file of lines, each a JSON object.
      prepare: makes a case's pass ready: what to call, and how to wait for it.
      chip: what it runs on, as the framework calls it.
    """
    case = cases(tiny=request["tiny"])[request["case"]]
    for name in PASSES:
        line: dict[str, Any] = {"pass": name, "chip": chip}
        try:
            call, wait = prepare(case, name != "forward")
            at_least = 0.0 if request["tiny"] else AT_LEAST
            times = measure(call, wait, rounds=request["rounds"], warmup=WARMUP, at_least=at_least)
            line |= {"median": times.median, "spread": times.spread}
        except Exception as error:  # a compiler's or an allocator's
            said = str(error).strip().partition("\n")[0]
            line["failed"] = f"{type(error).__name__}: {said}"
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def _blocks(depth: int) -> Config:
    return dataclasses.replace(variant("22B/14"), depth=depth)
