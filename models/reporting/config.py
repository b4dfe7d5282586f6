"""What a run tells beside its metrics file: the field `report` of a config."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Report:
    """Sinks, profiler traces and what is left at the end.

    Raises:
      ValueError: if a number makes no sense.
    """

    tensorboard: bool = False
    """write the numbers for TensorBoard too, into `out`/tensorboard"""
    profile: int | None = None
    """the step with which a profiler trace begins, in `out`/profile; None: no trace"""
    profile_steps: int = 3
    """steps that the trace covers"""
    weights: bool = True
    """leave the parameters as safetensors at the end; they pass through one host's memory whole"""

    def __post_init__(self) -> None:
        for name in ("profile", "profile_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"report.{name}={value} must be at least 1")
