"""Times every algorithm on every backend, and training steps, on the devices of this machine.

    python -m bench measure [--quick] [--only EXPRESSION] [--devices 8] [--json FILE]

On CPUs the devices are simulated and share the cores, so the suites are smoke runs: they say how
the schedules compare on this machine, and nothing about an accelerator.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import pytest

from bench.commands import UserError
from bench.mfu import utilisation
from bench.predicted.slices import chip_of
from bench.record import ROOT, Record
from bench.tables import markdown
from bench.work import Work
from models.devices import simulate

SUITES = ROOT / "bench" / "suites"
ORDER = 50  # among the tables of the report


def main(arguments: Sequence[str]) -> int:
    """Runs the suites, prints the table and writes the JSON that was asked for."""
    parser = argparse.ArgumentParser("python -m bench measure", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer sizes and rounds")
    parser.add_argument("--only", metavar="EXPRESSION", help="as pytest's -k: a part of the suites")
    parser.add_argument(
        "--devices", type=int, default=8, help="to simulate where there are no accelerators"
    )
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="where to write a record")
    asked = parser.parse_args(arguments)
    simulate(asked.devices)
    with tempfile.TemporaryDirectory() as folder:
        raw = pathlib.Path(folder, "raw.json")
        chosen = ["-k", asked.only] if asked.only else []
        quick = ["--quick"] if asked.quick else []
        status = pytest.main(
            [
                str(SUITES), f"--rootdir={ROOT}", "-q", "-p", "no:cacheprovider",
                "-o", "filterwarnings=default",  # a suite that is left out whole is no error
                "--benchmark-enable", f"--benchmark-json={raw}", "--benchmark-columns=median,iqr",
                *chosen, *quick,
            ]
        )  # fmt: skip
        if status == pytest.ExitCode.NO_TESTS_COLLECTED:
            raise UserError(f"--only {asked.only!r} matches nothing in the suites")
        timed = json.loads(raw.read_text())["benchmarks"] if raw.exists() else []
    result = result_of(timed)
    for table in result["tables"]:
        print(f"\n{table['title']}\n\n{markdown(table['rows'])}")
    print("\n".join(["", *result["remarks"]]))
    if asked.json and timed:
        command = "measure --quick" if asked.quick else "measure"
        Record("measured", command, jax.devices()[0].device_kind, result).save(asked.json)
    return int(status)


def result_of(timed: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The tables of a record, from what pytest-benchmark writes about each item."""
    chip = chip_of(jax.devices())
    suites: dict[str, list[dict[str, Any]]] = {}
    sentences: dict[str, None] = {}
    for item in timed:
        about, seconds = item["extra_info"], item["stats"]["median"]
        work = Work(about["flops"], about["kind"], about["convention"])
        used = utilisation(work, seconds, devices=about["devices"], chip=chip, dtype=about["dtype"])
        row = about["row"] | {
            "median ms": 1e3 * seconds,
            "IQR ms": 1e3 * item["stats"]["iqr"],
            "plain ms": 1e3 * about["plain"],
            "plain / this": about["plain"] / seconds,
        }
        if used.value is None:
            sentences[str(used)] = None
        else:
            row["lower bound ms"] = 1e3 * about["bound"]
            row["MFU %" if work.kind == "model" else "HFU %"] = 100 * used.value
        title = "Training steps" if "model" in row else "Operations"
        suites.setdefault(title, []).append(row)
    remarks = [
        "The plain collective of the same sizes ran before each round; a ratio above 1 is faster "
        "than it.",
        *sentences,
    ]
    if jax.default_backend() == "cpu":
        remarks.append(
            f"The {len(jax.devices())} devices are simulated and share the cores of one machine: "
            "a smoke run, which tells nothing about an accelerator."
        )
    return {
        "title": f"Suites on {jax.devices()[0].device_kind}",
        "order": ORDER,
        "tables": [{"title": title, "rows": rows} for title, rows in suites.items()],
        "remarks": remarks,
    }
