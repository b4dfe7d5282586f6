"""What a run watches, and how its processes find one another: the field `watch` of a config."""

from __future__ import annotations

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Watch:
    """Connecting, preemption, stalls, agreement and silent damage.

    Raises:
      ValueError: if a number makes no sense.
    """

    coordinator: str | None = None
    """HOST:PORT that process 0 listens on; None: JAX_COORDINATOR_ADDRESS, or what Slurm or the TPU
    pod says, or no other process at all"""
    processes: int | None = None
    """how many processes there are; None: JAX_NUM_PROCESSES, or what the cluster says"""
    process: int | None = None
    """the number of this one; None: JAX_PROCESS_ID, or what the cluster says"""
    patience: int = 300
    """seconds to wait for the other processes at the start"""
    heartbeat: int = 100
    """seconds without a sign of life after which a process counts as lost, and all are ended"""
    stall: float | None = 600.0
    """seconds without a step after which stacks are dumped and whoever hangs is named; None: never.
    Counted from the first step, so compiling may take longer"""
    on_stall: Literal["continue", "abort"] = "continue"
    """abort: a stalled run ends with status 43, so that a supervisor starts it again"""
    preempted_status: Literal[0, 75] = 0
    """status after a SIGTERM; 75 where whoever started the run takes 0 for finished"""
    agree: bool = True
    """compare config, code, versions and the program over processes before the first step"""
    replicas_every: int | None = None
    """steps from one comparison of the copies of every parameter to the next; None: never"""
    fingerprint_every: int | None = None
    """steps from one link of the chain of fingerprints to the next; None: no chain"""

    def __post_init__(self) -> None:
        for name in (
            "processes",
            "patience",
            "heartbeat",
            "stall",
            "replicas_every",
            "fingerprint_every",
        ):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"watch.{name}={value} must be more than 0")
        if self.coordinator is not None:
            host, _, port = self.coordinator.rpartition(":")
            if not host or not port.isdigit():
                raise ValueError(
                    f"watch.coordinator={self.coordinator!r} is not HOST:PORT, as in node0:1234"
                )
        if self.process is not None and self.process < 0:
            raise ValueError(f"watch.process={self.process} must be 0 or more")
