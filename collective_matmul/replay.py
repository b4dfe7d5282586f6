"""Recomputation that leaves what is kept as it is.

`jax.checkpoint` rounds, in an operation of its own, what its policy keeps of a forward pass that
also uses it (`reduce_precision`, so that both see the same digits). A compiler fuses that into what
reads it next, but not into a kernel: ViT-22B's queries, keys and values were written and read once
more, 35 ms of its step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name


def replayed(function: Callable[..., jax.Array], name: str | None) -> Callable[..., jax.Array]:
    """The function, with a gradient that keeps nothing but its arguments and runs it again.

    Args:
      function: of pytrees of arrays.
      name: under which a `jax.checkpoint` around it finds the arguments; None for no name.
    """

    def forward(*arguments: Any) -> tuple[jax.Array, Any]:
        kept = arguments if name is None else checkpoint_name(arguments, name)
        return function(*arguments), kept

    def backward(arguments: Any, dy: jax.Array) -> Any:
        return jax.vjp(function, *arguments)[1](dy)

    replayed_function = jax.custom_vjp(function)
    replayed_function.defvjp(forward, backward)
    return replayed_function
