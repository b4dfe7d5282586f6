"""MFU of ViT-22B's blocks and of whole ViTs on one GPU: ours and PyTorch's, in the same run.

    python -m bench gpu [--only TEXT] [--minutes 9] [--json FILE]
    python -m bench gpu --device cpu --tiny        the same path on a CPU, which tells nothing

Each model of each framework has a process of its own, so that the GPU's memory is free when it
begins, and one that fails costs its own row. PyTorch and timm are optional: without them the rows
say so.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from bench.commands import UserError
from bench.measured import gpu
from bench.measured.gpu_cases import PASSES, Case, cases
from bench.mfu import utilisation
from bench.record import ROOT, Record
from bench.tables import markdown
from collective_matmul import hardware

FRAMEWORKS = {"ours, jax": "bench.measured.gpu", "timm, PyTorch": "bench.measured.torch_peer"}
ORDER = 55  # among the tables of the report


def main(arguments: Sequence[str]) -> int:
    """Times every case by both frameworks, prints the table and writes the JSON asked for."""
    parser = argparse.ArgumentParser("python -m bench gpu", description=__doc__)
    parser.add_argument("--device", choices=("gpu", "cpu"), default="gpu")
    parser.add_argument("--tiny", action="store_true", help="sizes that run anywhere")
    parser.add_argument("--eager", action="store_true", help="PyTorch without torch.compile")
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="the models with this in the name"
    )
    parser.add_argument("--rounds", type=int, default=10, help="of which the median is taken")
    parser.add_argument(
        "--minutes", type=float, default=9.0, help="until what has not begun is left out"
    )
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="where to write a record")
    asked = parser.parse_args(arguments)
    chosen = {name: x for name, x in cases(tiny=asked.tiny).items() if asked.only in name}
    if not chosen:
        raise UserError(f"--only {asked.only!r} is in none of {', '.join(cases(tiny=asked.tiny))}")
    jax.config.update("jax_platforms", "cpu")  # here FLOPs are counted; the GPU is the processes'
    ends = time.monotonic() + 60 * asked.minutes
    rows: list[dict[str, Any]] = []
    chips: dict[str, None] = {}
    sentences: dict[str, None] = {}
    for name, case in chosen.items():
        for framework, module in FRAMEWORKS.items():
            request = {
                "case": name,
                "tiny": asked.tiny,
                "rounds": asked.rounds,
                "device": asked.device,
                "compile": not asked.eager,
            }
            for line in run(module, request, patience=ends - time.monotonic()):
                row, used = row_of(case, framework, line)
                rows.append(row)
                print(json.dumps(row), flush=True)
                if used is not None:
                    chips[line["chip"]] = None
                if used is not None and used.value is None:
                    sentences[str(used)] = None
    compiled = "Without torch.compile" if asked.eager else "PyTorch by torch.compile"
    result: dict[str, Any] = {
        "title": "Blocks and whole models on one device, ours and PyTorch's",
        "order": ORDER,
        "rows": rows,
        "remarks": [
            "Kernels and activations are bfloat16, nothing is recomputed. MFU divides model FLOPs "
            "of our program's products for both: forward, or 3 times that with the gradients. The "
            "lower bound is these FLOPs at the peak of the datasheet. "
            f"{compiled}, and SDPA.",
            *sentences,
        ],
    }
    print(markdown(rows), *result["remarks"], sep="\n")
    if asked.json and chips:
        Record("measured", "gpu", next(iter(chips)), result).save(asked.json)
    return 0 if any("median ms" in row for row in rows) else 1


def run(module: str, request: Mapping[str, Any], *, patience: float) -> list[dict[str, Any]]:
    """A process's lines, one for each pass; what it did not come to has the reason in "failed"."""
    if patience <= 0:
        return [{"pass": name, "failed": "not run: no time was left"} for name in PASSES]
    own = {"JAX_PLATFORMS": "cpu"} if request["device"] == "cpu" else {}
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder, "lines.jsonl")
        command = [sys.executable, "-m", module, json.dumps(request), str(out)]
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                env={"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"} | os.environ | own,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=patience,
                check=False,
            )
            said = (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1]
        except subprocess.TimeoutExpired:
            said = f"stopped after {patience:.0f} s"
        text = out.read_text(encoding="utf-8") if out.exists() else ""
    lines = [json.loads(line) for line in text.splitlines()]
    return lines + [{"pass": name, "failed": said} for name in PASSES[len(lines) :]]


def row_of(case: Case, framework: str, line: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
    """A line as a row of the table, and its utilisation where it was timed."""
    row = {
        "model": case.name,
        "images": case.batch,
        "tokens": case.batch * case.tokens,
        "pass": line["pass"],
        "framework": framework,
    }
    if "failed" in line:
        return row | {"note": line["failed"]}, None
    work = gpu.work(case, backward=line["pass"] != "forward")
    chip = hardware.from_device_kind(line["chip"])
    used = utilisation(work, line["median"], devices=1, chip=chip)
    row |= {"median ms": 1e3 * line["median"], "IQR ms": 1e3 * line["spread"]}
    if used.peak is not None and used.value is not None:
        row |= {
            "lower bound ms": 1e3 * work.flops / used.peak,
            "TFLOP/s": work.flops / line["median"] / 1e12,
            "MFU %": 100 * used.value,
        }
    return row, used
