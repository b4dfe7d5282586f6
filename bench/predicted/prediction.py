"""What a program is predicted to take on TPUs that are not there.

The TPU compiler compiles it, and estimates the cycles of every operation; `overlap_report` runs its
schedule against a model of the links. A Pallas kernel, of which it estimates nothing, takes the
bundles of its own schedule (`kernels`). Nothing runs on a TPU: every time here is a prediction, and
`accuracy` says what is known of its error.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from bench.mfu import utilisation
from bench.predicted import kernels
from bench.predicted.compiling import Options, OutOfMemory, attempt, gib
from bench.predicted.programs import Program
from bench.predicted.slices import chip_of
from bench.record import RESULTS
from bench.work import Work
from collective_matmul import hardware
from collective_matmul.hardware import Chip
from collective_matmul.inspect import OverlapReport, ReconciliationError


@dataclasses.dataclass(frozen=True)
class Prediction:
    """One program on one mesh. Times are predicted seconds of a device.

    Args:
      name: of the program among those that it is compared with.
      chip: what the devices are.
      mesh: {axis: size}.
      model, hardware: FLOPs of a run on all devices, with their convention.
      dtype: of the products' operands.
      tokens: of a run; 0 if it knows none.
      compile_seconds: that lowering and compiling took on this machine: measured, of the host.
      report: what the compiled program overlaps; None if there is no program.
      temporary: bytes of HBM beside arguments and results.
      out_of_memory: why there is none; or
      failure: why, in the compiler's words.
      notes: what else to know.
    """

    name: str
    chip: Chip
    mesh: dict[str, int]
    model: Work
    hardware: Work
    dtype: str
    tokens: int
    compile_seconds: float
    report: OverlapReport | None = None
    temporary: int | None = None
    out_of_memory: OutOfMemory | None = None
    failure: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def devices(self) -> int:
        """How many jax devices run the program."""
        total = 1
        for size in self.mesh.values():
            total *= size
        return total

    @property
    def seconds(self) -> float | None:
        """Of one run; None if there is no program."""
        return self.report.seconds if self.report else None

    def utilisation(self, work: Work) -> float | None:
        """The share of the peak that `work` is: MFU of `model`, HFU of `hardware`."""
        if not self.seconds:
            return None
        return utilisation(
            work, self.seconds, devices=self.devices, chip=self.chip, dtype=self.dtype
        ).value

    @property
    def mfu(self) -> float | None:
        """Model FLOPs over the peak; None where one of them is not known."""
        return self.utilisation(self.model)

    @property
    def hfu(self) -> float | None:
        """Hardware FLOPs over the peak."""
        return self.utilisation(self.hardware)

    @property
    def tokens_per_chip(self) -> float:
        """Tokens of a run on a chip, which may be two devices."""
        return self.tokens * self.chip.devices_per_chip / self.devices

    @property
    def throughput(self) -> float | None:
        """Tokens a second and chip."""
        return self.tokens_per_chip / self.seconds if self.seconds else None

    @property
    def hbm(self) -> float | None:
        """Bytes of a device's memory that the program needs."""
        if self.out_of_memory:
            return self.out_of_memory.used
        return self.report.hbm_peak if self.report else None

    def as_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        fields = ("name", "mesh", "dtype", "tokens", "compile_seconds", "temporary", "failure")
        derived = ("devices", "seconds", "mfu", "hfu", "tokens_per_chip", "throughput", "hbm")
        return {
            **{name: getattr(self, name) for name in (*fields, *derived)},
            "chip": self.chip.name,
            "model_work": dataclasses.asdict(self.model),
            "hardware_work": dataclasses.asdict(self.hardware),
            "hbm_limit": self.chip.hbm_bytes,
            "out_of_memory": self.out_of_memory and dataclasses.asdict(self.out_of_memory),
            "notes": list(self.notes),
            "overlap": self.report and self.report.as_dict(),
        }

    def __str__(self) -> str:
        axes = ", ".join(f"{axis}={size}" for axis, size in self.mesh.items())
        head = f"{self.name}: predicted for {self.devices:,} x {self.chip.name} ({axes})"
        built = f"lowered and compiled in {self.compile_seconds:.0f} s on this machine"
        if self.report is None or self.seconds is None:
            return f"{head}\n{self.out_of_memory or self.failure}\n{built}"
        lines = [head, f"step       {1e3 * self.seconds:,.2f} ms"]
        for work in (self.model, self.hardware):
            said = utilisation(
                work, self.seconds, devices=self.devices, chip=self.chip, dtype=self.dtype
            )
            lines.append(f"{' ' * 10} {said}")
        if self.throughput:
            lines.append(
                f"tokens     {self.throughput:,.0f} a second and chip, "
                f"{self.tokens_per_chip:,.0f} a step and chip"
            )
        lines.append(f"HBM        {gib(self.hbm or 0)} of {gib(self.chip.hbm_bytes)} a device")
        lines.append(f"accuracy   {accuracy(self.chip)}")
        lines += [f"note       {note}" for note in self.notes]
        return "\n".join([*lines, f"compiler   {built}", "", str(self.report)])


def predict(name: str, program: Program, options: Options | None = None) -> Prediction:
    """Compiles a program for its mesh, and predicts it.

    Args:
      name: what the prediction is called.
      program: of devices that `bench.predicted.slices` made, or of real ones.
      options: the compiler's, by name.
    """
    chip = chip_of(program.mesh.devices.flat)
    tried = attempt(program.traced, options)
    base = Prediction(
        name=name,
        chip=chip,
        mesh={axis: int(size) for axis, size in program.mesh.shape.items()},
        model=program.model,
        hardware=program.hardware,
        dtype=program.dtype,
        tokens=program.tokens,
        compile_seconds=tried.seconds,
        out_of_memory=tried.out_of_memory,
        failure=tried.failure,
    )
    if tried.compiled is None:
        return base
    report, unknown = kernels.overlap(tried.compiled, program.mesh, options)
    temporary = int(tried.compiled.memory_analysis().temp_size_in_bytes)
    notes = (*_reconciled(report, program.hardware), *unknown)
    return dataclasses.replace(base, report=report, temporary=temporary, notes=notes)


def _reconciled(report: OverlapReport, work: Work) -> tuple[str, ...]:
    """Nothing, or in a sentence how far the compiled program is from what was traced."""
    try:
        report.reconcile(flops=work.flops)
    except ReconciliationError as error:
        return (f"does not reconcile: {error}",)
    return ()


def accuracy(chip: Chip) -> str:
    """What is known of the error of predictions for a chip: `python -m bench calibrate` says it."""
    path = RESULTS / "calibration.json"
    if not path.is_file():
        return "not calibrated: the error of this prediction is not known"
    calibration = json.loads(path.read_text(encoding="utf-8"))
    known = calibration.get("result", calibration)["chips"]
    if chip.name not in known:
        others = ", ".join(sorted(set(known) & set(hardware.names())))
        return f"not calibrated for {chip.name} (only for {others})"
    found = known[chip.name]
    return (
        f"against {found['points']} published measurements on {chip.name} the predicted time is "
        f"{found['median_error']:.0%} off in the median, {found['worst_error']:.0%} at worst"
    )
