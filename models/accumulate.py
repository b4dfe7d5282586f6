"""Gradients of a large batch with the memory of a small one: part by part, then one update.

The loss is a mean over all labelled rows of the batch. A mean of the parts' means would be another
number where the parts have different numbers of labelled rows, so each part is divided by the
number of the whole batch, and the parts are added.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from collective_matmul import Layout

Batch = dict[str, jax.Array]
Objective = Callable[[Any, Batch], tuple[jax.Array, Any]]


def value_and_grad(
    objective: Objective,
    params: Any,
    batch: Batch,
    *,
    parts: int,
    constrain: Callable[[Any], Any],
) -> tuple[tuple[jax.Array, Any], Any, Any]:
    """The sum over the parts of an objective, of what it returns beside it, and of its gradients.

    Args:
      objective: `(params, part) -> (value, (summed, noted))`: value and summed are added over the
        parts, noted is kept of each part.
      params: what it is differentiated for.
      batch: arrays of `[b@data, ...]`, cut into parts along b.
      parts: how many.
      constrain: puts gradients where they belong. Those of each part are put there, so that no
        device ever has the sum of them whole.

    Returns:
      (value, summed), noted with a first dimension of parts, and the gradients.
    """
    gradient = jax.value_and_grad(objective, has_aux=True)
    if parts == 1:
        (value, (summed, noted)), grads = gradient(params, batch)
        return (value, summed), jax.tree.map(lambda x: x[None], noted), constrain(grads)

    def one(carry: Any, part: Batch) -> tuple[Any, Any]:
        (value, (summed, noted)), grads = gradient(params, part)
        return optax.tree.add(carry, (value, summed, constrain(grads))), noted

    # Part i has the rows i, i + parts, ...: so each device has its share of every part already.
    cut = {
        name: jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0)
        for name, x in batch.items()
    }
    first = {name: x[0] for name, x in cut.items()}
    value, (summed, _) = jax.eval_shape(objective, params, first)
    none = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (value, summed, params))
    begin = (none[0], none[1], constrain(none[2]))
    (value, summed, grads), noted = jax.lax.scan(one, begin, cut)
    return (value, summed), noted, grads


def check(batch: int, parts: int, layout: Layout | None) -> None:
    """Whether a batch can be cut.

    Raises:
      ValueError: if it does not split into parts, or a part not over the devices that cut rows.
    """
    if batch % parts:
        raise ValueError(
            f"batch={batch} does not split into accumulate={parts} parts; "
            f"choose a multiple of {parts}"
        )
    if layout is None:
        return
    data, tensor = layout.size(layout.data), layout.size(layout.tensor)
    if batch // parts % (data * tensor):
        raise ValueError(
            f"a part of batch / accumulate = {batch} / {parts} = {batch // parts} rows does not "
            f"split over data x tensor = {data} x {tensor} devices, as the classifier cuts it; "
            f"choose a batch that is a multiple of {parts * data * tensor}"
        )
