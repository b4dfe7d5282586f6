"""Compiles the step of a training run and says whether it fits: memory, predicted time and MFU.

What `python -m models.train CONFIG --dry-run` asks. With a topology the TPU compiler compiles for a
slice that need not be there; without one the step is compiled for this machine's devices, and only
what is known of them is said.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax

from bench.asking import read
from bench.commands import UserError
from bench.predicted.compiling import gib
from bench.predicted.prediction import predict
from bench.predicted.programs import training_step
from bench.predicted.slices import compile_only, tpu_slice
from collective_matmul import Layout, make_mesh
from models import configs, placing, step
from models.config import Config
from models.devices import cut, layout_of, simulate


@dataclasses.dataclass(frozen=True)
class Options:
    """Where to compile for; after `--` come the config's name and its changed fields."""

    topology: str | None = None
    """the slice: CHIP:XxY or CHIP:XxYxZ, in chips; None: this machine's devices"""


def main(arguments: Sequence[str]) -> int:
    """Compiles and prints; returns 0 if the run fits."""
    given = list(arguments)
    at = given.index("--") if "--" in given else len(given)
    asked = read(Options, "dry-run", __doc__, given[:at])
    config = configs.from_command_line(given[at + 1 :], prog="python -m models.train")
    return _for_slice(config, asked.topology) if asked.topology else _for_this_machine(config)


def _for_slice(config: Config, topology: str) -> int:
    compile_only()
    devices = tpu_slice(topology)
    if config.devices != len(devices):
        raise UserError(
            f"mesh={config.mesh} has {config.devices} devices, and {topology} has {len(devices)}; "
            f"choose --mesh so that data x fsdp x tensor = {len(devices)}"
        )
    try:
        layout = Layout(
            make_mesh(*config.mesh, devices=devices),
            **cut(config.layout),
            algorithm=config.algorithm,
            backend=config.backend,
        )
        step.rows_held(layout, config.batch)
        program = training_step(config, layout)
    except (ValueError, NotImplementedError) as error:
        raise UserError(str(error)) from error
    found = predict(topology, program)
    print(found)
    return 0 if found.report is not None else 1


def _for_this_machine(config: Config) -> int:
    simulate(config.devices)
    try:
        layout = layout_of(config)
        rows = len(step.rows_held(layout, config.batch))
        graph, state = step.abstract(config, layout)
        batch = placing.described(config, layout)
        compiled = (
            step.jitted_training(graph, step.usual(config), state).lower(state, batch).compile()
        )
    except (ValueError, NotImplementedError) as error:
        raise UserError(str(error)) from error
    kind = jax.devices()[0].device_kind
    print(f"the step compiles for {config.devices} x {kind}; a process brings {rows} images")
    memory = compiled.memory_analysis()
    if memory is not None:
        state_bytes, work = memory.argument_size_in_bytes, memory.temp_size_in_bytes
        print(f"memory     {gib(state_bytes)} of state and batch, {gib(work)} beside it, a device")
    print(f"no time and no MFU are predicted for {kind}; name a slice: --dry-run v5e:2x4")
    return 0
