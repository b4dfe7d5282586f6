"""The FLOPs that an MFU divides, under the conventions that are in use, and which one it was.

    model FLOPs       what the mathematics of a training step needs: 3 times the forward pass, one
                      for the values and two for the gradients. Recomputed values do not count.
    hardware FLOPs    what the program that runs multiplies: with rematerialisation.

A decoder's attention is counted in full by some and by its causal half by others, 1 to 13 % apart
in the published rows that `tests/test_mfu.py` reproduces. A number needs its convention beside it.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from bench.flops import Count

_ATTENTION = {"full": 12, "causal": 6, "none": 0}


@dataclasses.dataclass(frozen=True)
class Work:
    """FLOPs, and what they count.

    Args:
      flops: of a token, a step or whatever is timed.
      kind: "model" or "hardware", as above.
      convention: where the number comes from and how attention is counted in it.
    """

    flops: float
    kind: Literal["model", "hardware"]
    convention: str

    def __str__(self) -> str:
        return f"{self.flops / 1e9:,.6g} GFLOP ({self.kind} FLOPs; {self.convention})"


def closed_form(
    matmul_params: int,
    *,
    layers: int,
    heads: int,
    head_dim: int,
    length: int,
    attention: Literal["full", "causal", "none"],
) -> Work:
    """Model FLOPs of training a transformer on one token: `6 N + 12 L H Q T`.

    Args:
      matmul_params: N, the parameters that every token is multiplied with: kernels, a language
        model's output layer, no embedding that is looked up.
      layers: L.
      heads: H, of the queries.
      head_dim: Q.
      length: T, tokens of a sequence.
      attention: "full", "causal" for half of it, `6 L H Q T`, or "none" for `6 N` alone.

    Raises:
      ValueError: if `attention` is another word.

    Reference: Chowdhery et al. 2022 (arXiv 2204.02311), appendix B.
    """
    if attention not in _ATTENTION:
        raise ValueError(f"attention={attention!r} is none of {tuple(_ATTENTION)}")
    factor = _ATTENTION[attention]
    formula = f"6 N + {factor} L H Q T" if factor else "6 N"
    flops = 6 * matmul_params + factor * layers * heads * head_dim * length
    said = "no attention" if attention == "none" else f"{attention} attention"
    return Work(flops, "model", f"{formula} a token, {said}")


def model_work(forward: Count) -> Work:
    """Model FLOPs of a training step: 3 times its forward pass, on one device and without remat.

    The first layer's share of it includes a gradient for its input that a step does not compute.

    Args:
      forward: `count(model, batch)`.
    """
    return Work(3 * forward.flops, "model", f"3 x the forward pass; {_said(forward)}")


def pass_work(forward: Count, *, backward: bool) -> Work:
    """Model FLOPs of a pass: of the forward pass alone, or with its gradients as `model_work`.

    Args:
      forward: `count(model, batch)`.
      backward: whether the pass computes gradients too.
    """
    if backward:
        return model_work(forward)
    return Work(forward.flops, "model", f"the forward pass; {_said(forward)}")


def hardware_work(step: Count) -> Work:
    """Hardware FLOPs: those of the program that is run.

    Args:
      step: `count(train_step, state, batch)`, of the very step that is timed.
    """
    return Work(step.flops, "hardware", f"the step as it runs; {_said(step)}")


def _said(count: Count) -> str:
    if not count.uncounted:
        return count.convention
    return f"{count.convention}; NOT counted: {'; '.join(count.uncounted)}"
