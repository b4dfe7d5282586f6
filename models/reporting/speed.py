"""Rates of a step: images, tokens, and the share of the chips' peak where a chip has one."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from collective_matmul import hardware
from models.reporting.work import model_flops
from models.vit_config import Config as Model


@dataclasses.dataclass(frozen=True)
class Speed:
    """What a step does, per second of its duration.

    Args:
      images: of the global batch.
      tokens: of one image.
      devices: that share the step.
      flops: model FLOPs of the step, forward and backward, attention full.
      peak: FLOP/s of a device for the model's dtype; None: not known, as for a CPU.
    """

    images: int
    tokens: int
    devices: int
    flops: int
    peak: float | None

    def rates(self, seconds: float) -> dict[str, float]:
        """images_per_second, tokens_per_second_per_device, and mfu where the peak is known.

        Args:
          seconds: that the step took.
        """
        seconds = max(seconds, 1e-9)
        found = {
            "images_per_second": self.images / seconds,
            "tokens_per_second_per_device": self.images * self.tokens / seconds / self.devices,
        }
        if self.peak:
            found["mfu"] = self.flops / seconds / (self.devices * self.peak)
        return found


def speed_of(model: Model, batch: int, devices: int) -> Speed:
    """The speed of a run on this machine's devices.

    Args:
      model: which model.
      batch: images of a step.
      devices: that share it.
    """
    chip = hardware.from_device_kind(jax.devices()[0].device_kind)
    peak = hardware.peak(chip, jnp.dtype(model.dtype))
    rows, columns = model.grid
    return Speed(batch, rows * columns, devices, model_flops(model, batch), peak)
