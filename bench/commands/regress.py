"""Predicts the programs of bench/golden.json again, and explains what changed.

python -m bench regress                    # the products of every generation
python -m bench regress --slow             # two blocks of ViT-22B's width as well, minutes
python -m bench regress --only "v5e" --update   # writes what is found into the golden file
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from bench.asking import read
from bench.commands import UserError
from bench.predicted.regression import CASES, changes, explain, predict
from bench.predicted.slices import compile_only
from bench.record import ROOT, versions
from bench.tables import markdown
from models.files import atomically

PATH = ROOT / "bench" / "golden.json"
SHOWN = 12  # parts that an explanation lists


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Which programs to predict, and what to do with the figures."""

    only: str = ""
    """a regular expression: the programs whose names it matches"""
    slow: bool = False
    """also those that take minutes to compile"""
    update: bool = False
    """write the figures into the golden file, and succeed"""
    golden: pathlib.Path = PATH
    """the golden file"""


def main(arguments: Sequence[str]) -> int:
    """Runs the command; status 1 if a figure has left the tolerance."""
    asked = read(Arguments, "regress", None, arguments)
    compile_only()
    chosen = {
        name: case
        for name, case in CASES.items()
        if re.search(asked.only, name) and (asked.slow or not case.slow)
    }
    if not chosen:
        raise UserError(f"--only {asked.only!r} matches none of {', '.join(CASES)}")
    known = json.loads(asked.golden.read_text(encoding="utf-8")) if asked.golden.exists() else {}
    installed = {name: versions().get(name, "none") for name in ("libtpu", "jax")}
    found, failed = {}, []
    for name, case in chosen.items():
        try:
            new = found[name] = {**predict(case), "versions": installed}
        except ValueError as error:  # jax 0.10.2 cannot read what the compiler makes for 7x
            print(f"{name}: not judged: {error}", flush=True)
            continue
        text, judged = verdict(name, known.get(name), new)
        print(text, flush=True)
        if judged:
            failed.append(name)
    if asked.update:
        kept = {name: known[name] for name in CASES if name in known}
        with atomically(asked.golden) as draft:
            text = json.dumps({**kept, **found}, indent=1, sort_keys=True)
            draft.write_text(text + "\n", encoding="utf-8")
        print(f"wrote {asked.golden}")
        return 0
    if failed:
        print(f"changed: {', '.join(failed)}. If that is meant, --update writes it down.")
    return 1 if failed else 0


def verdict(name: str, old: Mapping[str, Any] | None, new: Mapping[str, Any]) -> tuple[str, bool]:
    """What to say of a program's figures, and whether they have changed beyond the tolerance."""
    step = f"{new['seconds'] * 1e3:.3f} ms"
    if old is None:
        return f"{name}: {step}, not in the golden file", False
    changed = changes(old, new)
    told = f"{name}: {step}, golden {old['seconds'] * 1e3:.3f} ms"
    if not changed:
        return f"{told}: unchanged", False
    figures = ", ".join(f"{figure} {change:+.1%}" for figure, change in changed.items())
    rows = explain(old, new)
    table = markdown(rows[:SHOWN]) if rows else "no part of the time changed"
    told = f"{told}: {figures}\n{table}"
    before, now = old["versions"]["libtpu"], new["versions"]["libtpu"]
    if before != now:
        return (
            f"{told}\nnot judged: the golden figures are of libtpu {before}, this is {now}",
            False,
        )
    return told, True
