"""Compiles a traced program, and takes what the compiler answers as a result: also "out of memory".

The TPU compiler refuses a program that does not fit into the device's memory, and says by how much.
Its report of the largest buffers comes from a second run, which stops as early as the first.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import re
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import jax

from bench.predicted import schedules

Options = Mapping[str, str | bool | int | float]

LARGEST = 8  # buffers that are listed
_UNITS = {"B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"([\d.]+)\s*([KMGT]?)"
_REFUSAL = re.compile(rf"\({_SIZE}i?B?\) exceeds available HBM \({_SIZE}i?B?\)")
_BUFFER = re.compile(rf"^\s*[^;]*\(\s*\d+%\);\s*{_SIZE}i?B;[^;]*;[^;]*;\s*(.*)$", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class OutOfMemory:
    """The compiler's refusal.

    Args:
      used: bytes of HBM that one device would need.
      limit: bytes that the compiler has for programs, less than the chip's memory.
      largest: the largest buffers, (bytes, shapes of the values that share it).
    """

    used: float
    limit: float
    largest: tuple[tuple[float, str], ...] = ()

    def __str__(self) -> str:
        lines = [f"out of memory: {gib(self.used)} of {gib(self.limit)} HBM"]
        lines += [f"  {gib(size):>10}  {shapes}" for size, shapes in self.largest]
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Attempt:
    """What came of compiling: one of `compiled`, `out_of_memory` and `failure` is there.

    Args:
      compiled: the program.
      out_of_memory: it does not fit.
      failure: the compiler's error, whatever else it was.
      seconds: that lowering and compiling took on this machine.
    """

    compiled: Any | None
    out_of_memory: OutOfMemory | None
    failure: str | None
    seconds: float


def attempt(traced: Any, options: Options | None = None) -> Attempt:
    """Lowers and compiles a program.

    Args:
      traced: `jax.jit(f).trace(*args)`, of arguments that lie on the devices to compile for.
      options: the compiler's, by name.
    """
    start = time.perf_counter()
    schedules.forget()

    def ended(
        compiled: Any = None, refusal: OutOfMemory | None = None, failure: str | None = None
    ) -> Attempt:
        return Attempt(compiled, refusal, failure, time.perf_counter() - start)

    lowered = traced.lower()
    try:
        return ended(lowered.compile(compiler_options=dict(options or {})))
    except jax.errors.JaxRuntimeError as error:
        refusal = read_refusal(str(error))
        if refusal is None:
            return ended(failure=str(error).partition("\n")[0])
    largest = read_buffers(_memory_report(lowered, options or {}))
    return ended(refusal=dataclasses.replace(refusal, largest=largest))


def read_refusal(message: str) -> OutOfMemory | None:
    """The compiler's numbers in its error, or None if memory was not the reason."""
    found = _REFUSAL.search(message)
    if found is None:
        return None
    return OutOfMemory(_bytes(found[1], found[2]), _bytes(found[3], found[4]))


def read_buffers(report: str) -> tuple[tuple[float, str], ...]:
    """The largest buffers of the compiler's memory usage report.

    Args:
      report: lines of `cumulative; size; offset; number of values; shapes`, the largest first.
    """
    rows = [(_bytes(x[1], x[2]), _short(x[3].strip())) for x in _BUFFER.finditer(report)]
    return tuple(sorted(rows, key=lambda row: -row[0])[:LARGEST])


def gib(size: float) -> str:
    """Bytes for people."""
    return f"{size / 2**30:.2f} GiB"


def _memory_report(lowered: Any, options: Options) -> str:
    with tempfile.TemporaryDirectory() as folder:
        dump = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # it is the same refusal again
            lowered.compile(compiler_options={**options, **dump})
        reports = sorted(pathlib.Path(folder).glob("*memory-usage-report.txt"))
        return "\n".join(report.read_text(encoding="utf-8") for report in reports)


def _bytes(number: str, unit: str) -> float:
    return float(number) * _UNITS[unit or "B"]


def _short(shapes: str) -> str:
    first, *others = re.split(r",\s+(?![^\[]*\])", shapes)
    return f"{first} and {len(others)} more" if others else first
