"""What the collective matmuls are compared with: the same step, partitioned in other ways.

A row of `BASELINES` is a way. The schedules of this library are rows too, one for each algorithm
that `collective_matmul.algorithms.names()` finds, and one for the cost model's own choice.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

from bench.predicted.compiling import Options
from collective_matmul import Layout, algorithms, make_mesh

XLA_COLLECTIVE_MATMUL: Options = {
    "xla_tpu_all_gather_collective_matmul_mode": "post_spmd",
    "xla_tpu_reduce_scatter_collective_matmul_mode": "post_spmd",
}
"""XLA's own decomposition of collectives that feed products, of gathers and of scatters."""


@dataclasses.dataclass(frozen=True)
class Baseline:
    """A way to partition and to schedule.

    Args:
      name: in tables, and on the command line.
      about: what it is.
      algorithm, backend, partitioner: as in `collective_matmul.Layout`.
      axes: of the devices that the asked mesh has for data, fsdp and tensor, which serve what:
        "asked" as asked; "fsdp" all of them cut the parameters; "hybrid" those of fsdp and tensor
        do, and those of data repeat them.
      options: the compiler's.
    """

    name: str
    about: str
    algorithm: str | None = None
    backend: str | None = None
    partitioner: Literal["shard_map", "gspmd"] = "shard_map"
    axes: Literal["asked", "fsdp", "hybrid"] = "asked"
    options: Options = dataclasses.field(default_factory=dict)

    def layout(self, devices: Any, sizes: tuple[int, int, int], **placed: Any) -> Layout:
        """Where arrays lie.

        Args:
          devices: all there are.
          sizes: the asked mesh: data, fsdp and tensor.
          **placed: `activations` and `token_dim`, as in `Layout`.
        """
        data, fsdp, tensor = sizes
        used = {
            "asked": sizes,
            "fsdp": (1, math.prod(sizes), 1),
            "hybrid": (data, fsdp * tensor, 1),
        }[self.axes]
        return Layout(
            make_mesh(*used, devices=devices),
            algorithm=self.algorithm,
            backend=self.backend,
            partitioner=self.partitioner,
            **placed,
        )


OURS = "collective matmul"

BASELINES = (
    Baseline("unfused", "gather, then multiply; multiply, then scatter", backend="unfused"),
    Baseline(
        "unfused + XLA",
        "the same, and XLA's own collective matmul",
        backend="unfused",
        options=XLA_COLLECTIVE_MATMUL,
    ),
    Baseline("gspmd", "sharding constraints only", partitioner="gspmd"),
    Baseline(
        "gspmd + XLA",
        "sharding constraints, and XLA's own collective matmul",
        partitioner="gspmd",
        options=XLA_COLLECTIVE_MATMUL,
    ),
    Baseline(
        "fsdp",
        "parameters cut over all devices, gathered for use; no tensor parallelism",
        partitioner="gspmd",
        axes="fsdp",
    ),
    Baseline(
        "fsdp x data",
        "parameters cut over as many devices as fsdp x tensor, repeated over data",
        partitioner="gspmd",
        axes="hybrid",
    ),
)


def ours() -> tuple[Baseline, ...]:
    """The schedules of this library: the cost model's choice, and each algorithm by name."""
    chosen = Baseline(OURS, "this library, each product as the cost model chooses")
    named = (
        Baseline(name, f"this library, every product by {name}", name, "xla")
        for name in algorithms.names()
    )
    return (chosen, *named)


def everything() -> tuple[Baseline, ...]:
    """All rows, this library's first."""
    return (*ours(), *BASELINES)


def named(names: tuple[str, ...]) -> tuple[Baseline, ...]:
    """The rows of these names, or all if there are none.

    Raises:
      ValueError: if a name is none of theirs.
    """
    rows = {row.name: row for row in everything()}
    unknown = [name for name in names if name not in rows]
    if unknown:
        raise ValueError(f"no baseline {unknown[0]!r}; there are {', '.join(map(repr, rows))}")
    return tuple(rows[name] for name in names or rows)
