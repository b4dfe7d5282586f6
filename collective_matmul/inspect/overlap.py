"""From a compiled program to its report: which chip, which mesh, which network, how much memory."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from collective_matmul import hardware
from collective_matmul.hardware import Chip
from collective_matmul.inspect import kernels
from collective_matmul.inspect.hlo import Module, parse
from collective_matmul.inspect.network import Network
from collective_matmul.inspect.report import OverlapReport
from collective_matmul.inspect.rows import (
    collective_rows,
    op_rows,
    uncosted_rows,
    waits_for_copies,
)
from collective_matmul.inspect.simulate import simulate
from collective_matmul.inspect.timeline import Timeline
from collective_matmul.inspect.total import total_flops


def overlap_report(
    program: Any,
    *,
    chip: str | Chip | None = None,
    mesh: Mesh | None = None,
    flops: float | None = None,
    clock: float | None = None,
    bundles: Mapping[str, float] | None = None,
) -> OverlapReport:
    """What a compiled program takes on one device, and how much of its communication is hidden.

        compiled = jax.jit(step).lower(*args).compile()
        print(overlap_report(compiled))

    Nothing is run: the program's schedule is simulated with the compiler's own estimates of compute
    and a model of the links. Every time is a prediction.

    Args:
      program: what `.lower(..).compile()` returned, or its `as_text()`.
      chip: the chip, its name or its jax device kind; default that of the program's devices.
      mesh: the mesh that the program was compiled for, which says where its devices stand; default
        that of the program's arguments.
      flops: what `OverlapReport.reconcile` checks the products against, of all devices together.
      clock: Hz that the compiler's cycles are divided by; default the chip's.
      bundles: {name of a Pallas kernel's instruction: bundles that the compiler's schedule of it
        issues in a run} (`inspect.bundles`). What a kernel that is not named declares is a lower
        bound.

    Returns:
      The report.

    Raises:
      ValueError: if the chip cannot be told, the mesh has another number of devices than the
        program, or the text is not a scheduled program or cannot be had.
      ReconciliationError: as `OverlapReport.reconcile`.
    """
    module = parse(program if isinstance(program, str) else text_of(program))
    if not module.scheduled:
        raise ValueError(
            "the order of this text is no schedule: pass the compiled program or its as_text(), "
            "not what .lower() returns"
        )
    if mesh is None and not isinstance(program, str):
        mesh = _mesh(program)
    chip = _chip(chip, mesh)
    network, remarks = _network(module, mesh, chip)
    clock = clock or chip.clock
    timeline = simulate(module, network, clock=clock, bundles=bundles)
    repeated = total_flops(module).repeated
    report = _report(timeline, network, clock, remarks, _memory(program), repeated)
    return report if flops is None else report.reconcile(flops)


def _report(
    timeline: Timeline,
    network: Network,
    clock: float | None,
    remarks: list[str],
    peak: int | None,
    repeated: int,
) -> OverlapReport:
    chip = network.chip
    rows, ops = collective_rows(timeline), op_rows(timeline, chip)
    told = math.nan if chip.assumed else 1.0
    if chip.assumed:
        remarks = [f"{chip.name}: no published rates, so no time can be told; counts hold"]
        rows = tuple(
            dataclasses.replace(row, seconds=told, exposed=told, hidden=told) for row in rows
        )
        ops = tuple(
            dataclasses.replace(row, seconds=told, peak_share=None, hbm_share=None) for row in ops
        )
    elif not any(op.how == "cycles" for op in ops):
        remarks.append(
            "no cycle estimates in this text: compute is costed at the peak, or at the memory's "
            "bandwidth, so it is a lower bound"
        )
    if (declared := _declared(timeline)) and not chip.assumed:
        remarks.append(
            "Pallas kernels that take what they declare, at the peak or at the memory's bandwidth, "
            f"which is a lower bound: {', '.join(declared)}"
        )
    if rows and not chip.assumed and not any(row.asynchronous for row in rows):
        remarks.append("no collective has a start and a done: all of them are exposed")
    return OverlapReport(
        chip=chip,
        partitions=len(network.positions),
        axes=network.axes,
        clock=clock,
        seconds=told * timeline.seconds,
        compute_seconds=told * sum(op.seconds for op in timeline.ops),
        exposed_seconds=sum(row.exposed for row in rows),
        copies_seconds=told * waits_for_copies(timeline.transfers),
        hidden_seconds=sum(row.hidden for row in rows),
        collectives=rows,
        ops=ops,
        flops=sum(op.count * op.cost.flops for op in timeline.ops),
        repeated_flops=repeated,
        wire_bytes=sum(row.wire_bytes for row in rows),
        hbm_peak=peak,
        hbm_limit=None if chip.assumed else chip.hbm_bytes,
        uncosted=uncosted_rows(timeline),
        remarks=(*remarks, *timeline.remarks),
        timeline=timeline,
    )


def _declared(timeline: Timeline) -> list[str]:
    return sorted(
        op.instruction.name
        for op in timeline.ops
        if op.cost.how == "declared" and kernels.is_pallas(op.instruction)
    )


def text_of(program: Any) -> str:
    """The HLO text of a compiled program.

    Args:
      program: what `.lower(..).compile()` returned.

    Returns:
      The text.

    Raises:
      ValueError: if it cannot be had.
    """
    try:
        text = program.as_text()
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(
            f"jax {jax.__version__} cannot read what the compiler wrote; a libtpu of the same date "
            f"as jaxlib, or a newer jaxlib, can ({error})"
        ) from error
    if not text:
        raise ValueError("this program has no HLO text: pass what .lower(..).compile() returns")
    return str(text)


def _chip(chip: str | Chip | None, mesh: Mesh | None) -> Chip:
    if isinstance(chip, Chip):
        return chip
    if chip is not None:
        return hardware.chip(chip)
    if mesh is None:
        raise ValueError(
            "neither the program nor the arguments tell the chip: pass chip=, one of "
            f"{', '.join(hardware.names())}, or mesh="
        )
    return hardware.from_device_kind(mesh.devices.flat[0].device_kind)


def _mesh(compiled: Any) -> Mesh | None:
    """The largest mesh that the arguments or results of a compiled program lie on."""
    shardings = jax.tree.leaves((compiled.input_shardings, compiled.output_shardings))
    meshes = [s.mesh for s in shardings if isinstance(getattr(s, "mesh", None), Mesh)]
    if meshes:
        return max(meshes, key=lambda mesh: mesh.size)
    alone = [s.device_set for s in shardings if len(s.device_set) == 1]
    return Mesh(list(alone[0]), ("device",)) if alone else None


def _network(module: Module, mesh: Mesh | None, chip: Chip) -> tuple[Network, list[str]]:
    count = module.partitions * module.replicas
    if mesh is not None and mesh.size != count:
        raise ValueError(
            f"the program runs on {count} devices, and the mesh has {mesh.size}: pass the mesh "
            "that it was compiled for"
        )
    if mesh is not None:
        network = Network.of(mesh.devices.flat, dict(mesh.shape), chip)
    else:
        known = math.prod(module.mesh.values()) == count
        axes = dict(module.mesh) if module.mesh and known else {"device": count}
        network = Network.without_coordinates(axes, chip)
    return network, [network.assumed] if network.assumed else []


def _memory(program: Any) -> int | None:
    """Bytes of HBM that the compiler planned for: arguments, results and temporaries.

    (`peak_memory_in_bytes` also counts what lies in on-chip memory.)
    """
    stats = None if isinstance(program, str) else program.memory_analysis()
    if stats is None:
        return None
    return (
        stats.argument_size_in_bytes
        + stats.output_size_in_bytes
        - stats.alias_size_in_bytes
        + stats.temp_size_in_bytes
    )
