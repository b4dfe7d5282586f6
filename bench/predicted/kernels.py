"""What the Pallas kernels of a program take: the bundles of the compiler's schedules are counted.

Where the compiler writes schedules (`schedules`), they are there once a program is compiled. Of a
training step they would be gigabytes: elsewhere every distinct kernel is compiled by itself, in a
process of its own (`alone`), which takes seconds.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import subprocess
import sys
from collections.abc import Iterable
from typing import Any

from jax.sharding import Mesh

from bench.predicted import schedules
from bench.predicted.compiling import Options
from bench.predicted.schedules import Issued
from bench.predicted.slices import SMALLEST, chip_of
from bench.record import ROOT
from collective_matmul.hardware import Chip
from collective_matmul.inspect import OverlapReport, kernels, overlap_report
from collective_matmul.inspect.hlo import Array, Instruction, Module, parse
from collective_matmul.inspect.overlap import text_of
from collective_matmul.inspect.remote import schedule

TIMEOUT = 600  # seconds that compiling one kernel may take
# Of a kernel's configuration, what the program says; the rest is what the compiler found out.
_GIVEN = (
    *("custom_call_config", "sparse_core_config", "device_type"),
    *("scoped_memory_configs", "flag_configs"),
)
# Of what the program says: where the compiler keeps arrays, or was to keep them, of a step that has
# other arrays beside these. Alone, a kernel has its own in HBM, and 7x refuses other colours.
_COLOURS = ("input_memory_space_colors", "output_memory_space_colors", "output_memory_colors")
_CONFIGURATION = "backend_config="
_COMMUNICATES = '"has_communication":true'


@dataclasses.dataclass(frozen=True)
class Kernel:
    """All that says what a kernel is.

    Args:
      configuration: JSON; the program of the kernel is in it.
      operands, results: (dtype as HLO writes it, shape). An array that is there more than once is
        one operand.
      taken: which operand each argument of the kernel is.
    """

    configuration: str
    operands: tuple[tuple[str, tuple[int, ...]], ...]
    taken: tuple[int, ...]
    results: tuple[tuple[str, tuple[int, ...]], ...]


def overlap(
    compiled: Any, mesh: Mesh, options: Options | None = None
) -> tuple[OverlapReport, tuple[str, ...]]:
    """The report on a compiled program, whose kernels take the bundles that they issue.

    Args:
      compiled: the program.
      mesh: that it is compiled for.
      options: the compiler's, by name.

    Returns:
      The report; and in sentences of which kernels no bundles are known, and why.

    Raises:
      ValueError: as `overlap_report`.
    """
    chip = chip_of(mesh.devices.flat)
    issued, unknown = bundles(text_of(compiled), chip, options)
    return overlap_report(compiled, chip=chip, mesh=mesh, bundles=issued), unknown


def bundles(
    text: str, chip: Chip, options: Options | None = None
) -> tuple[dict[str, float], tuple[str, ...]]:
    """The bundles of every Pallas kernel of a program.

    Args:
      text: of the compiled program.
      chip: that it is compiled for.
      options: the compiler's, by name.

    Returns:
      {name of the instruction: bundles of a run}, for `overlap_report`; and in sentences which
      kernels are not in it, and why.
    """
    if kernels.PALLAS not in text:
        return {}, ()
    module = parse(text)
    found: dict[str, float] = {}
    unknown: dict[str, list[str]] = {}
    for instruction in kernels.pallas(module):
        known = _issued(module, instruction, chip, options or {})
        if known.bundles is None:
            unknown.setdefault(known.why, []).append(instruction.name)
        else:
            found[instruction.name] = known.bundles
    notes = (f"no bundles of {', '.join(names)}: {why}" for why, names in unknown.items())
    return found, tuple(notes)


def _issued(module: Module, instruction: Instruction, chip: Chip, options: Options) -> Issued:
    if chip.name not in SMALLEST:
        return Issued(None, f"the TPU compiler does not know {chip.name}")
    if _COMMUNICATES in instruction.rest and schedule(instruction) is None:
        return Issued(None, "it communicates, and does not tell what it waits for")
    written = schedules.written(instruction.name)
    if written:
        return written
    try:
        kernel = kernel_of(module, instruction)
    except ValueError as error:
        return Issued(None, str(error))
    return issued(kernel, SMALLEST[chip.name], tuple(sorted(options.items())))


def kernel_of(module: Module, instruction: Instruction) -> Kernel:
    """The kernel that an instruction runs.

    Args:
      module: a compiled program.
      instruction: one of `inspect.kernels.pallas`.

    Raises:
      ValueError: if its configuration cannot be read.
    """
    _, _, rest = instruction.rest.partition(_CONFIGURATION)
    try:
        told, _ = json.JSONDecoder(strict=False).raw_decode(rest)
    except json.JSONDecodeError as error:
        raise ValueError(f"its configuration in the program's text is no JSON ({error})") from error
    given = {name: told[name] for name in _GIVEN if told.get(name)}
    if "custom_call_config" in given:
        own = given["custom_call_config"]
        given["custom_call_config"] = {k: v for k, v in own.items() if k not in _COLOURS}
    arguments = module.operands(instruction)
    operands = {each.name: each for each in arguments}
    names = list(operands)
    return Kernel(
        json.dumps(given, sort_keys=True),
        _types(array for each in operands.values() for array in each.result),
        tuple(names.index(each.name) for each in arguments),
        _types(instruction.result),
    )


@functools.cache
def issued(kernel: Kernel, topology: str, options: tuple[tuple[str, Any], ...]) -> Issued:
    """Compiles a kernel in another process, once in the life of this one.

    Args:
      kernel: what is compiled.
      topology: of the chip, as `tpu_slice` takes it.
      options: the compiler's, (name, value).
    """
    asked = {**dataclasses.asdict(kernel), "topology": topology, "options": dict(options)}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "bench.predicted.alone"],
            cwd=ROOT,
            input=json.dumps(asked),
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return Issued(None, f"it could not be compiled alone ({_line(str(error))})")
    if done.returncode:
        return Issued(None, f"it could not be compiled alone ({_line(done.stderr)})")
    return Issued(**json.loads(done.stdout.splitlines()[-1]))


def _types(arrays: Iterable[Array]) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple((array.dtype, array.shape) for array in arrays)


def _line(text: str) -> str:
    """The last line that says something, at most so long that it fits into a note."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:200] if lines else "no reason given"
