"""Runs the QK-norm experiment: `python -m models.stability [--field value ...]`."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import time

import tyro

from models import configs
from models.config import Config
from models.files import atomically
from models.stability.figure import draw
from models.stability.sweep import sweep


@dataclasses.dataclass(frozen=True)
class Options:
    """The sweep; its base is models/configs/stability.py."""

    lrs: tuple[float, ...] = (0.01, 0.03, 0.1, 0.2, 0.3)
    """learning rates"""
    seeds: tuple[int, ...] = (0, 1, 2)
    """initial parameters"""
    steps: int = 300
    """of each run"""
    show: float = 0.2
    """the learning rate of which the figure shows the steps; one of `lrs`"""
    out: pathlib.Path = pathlib.Path("docs")
    """the folder that stability.json and stability.png go to"""


def main(options: Options, base: Config) -> None:
    """Trains, writes the numbers and draws them.

    Args:
      options: the sweep.
      base: what every run is like but for what is swept.
    """
    if options.show not in options.lrs:
        raise SystemExit(f"--show {options.show} is none of --lrs {options.lrs}")
    began = time.perf_counter()
    config = dataclasses.replace(base, steps=options.steps)
    runs = sweep(config, lrs=options.lrs, seeds=options.seeds)
    for run in runs:
        print(
            f"qk_norm {run['qk_norm'] or 'none':5} lr {run['lr']:<6g} seed {run['seed']}  loss "
            f"{run['final_loss']:<8g} accuracy {run['final_accuracy']:.1%}  largest logit "
            f"{run['logit_max']:<10g} least entropy {run['entropy_min']:g}"
        )
    with atomically(options.out / "stability.json") as draft:
        lines = ",\n".join(json.dumps(run) for run in runs)
        draft.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    draw(runs, options.out / "stability.png", show=options.show)
    print(
        f"{len(runs)} runs in {time.perf_counter() - began:.0f} s; stability.json and "
        f"stability.png are in {options.out}"
    )


if __name__ == "__main__":
    main(
        tyro.cli(Options, prog="python -m models.stability", description=__doc__),
        configs.load("stability"),
    )
