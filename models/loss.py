"""Classification losses; a row whose label is no class counts neither here nor in the accuracy."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
import optax

Kind = Literal["sigmoid", "softmax"]


def classify(
    logits: jax.Array, labels: jax.Array, kind: Kind
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sums over the rows of loss and correct answers, and how many rows have a label.

        sigmoid   -sum_c [ y_c log s(z_c) + (1 - y_c) log s(-z_c) ],  s the logistic function
        softmax   -sum_c y_c log softmax(z)_c

    Args:
      logits: [b@data, classes], any float dtype; computed in float32.
      labels: [b@data] int32, in [0, classes), or negative: the row only fills the batch.
      kind: which of the losses.

    Returns:
      Three float32 scalars.

    Reference: sums over the classes as google-research/big_vision `utils.sigmoid_xent`.
    """
    z = logits.astype(jnp.float32)
    y = jax.nn.one_hot(labels, z.shape[-1], dtype=jnp.float32)
    counted = (labels >= 0).astype(jnp.float32)
    if kind == "sigmoid":
        losses = jnp.sum(optax.sigmoid_binary_cross_entropy(z, y), axis=-1)
    else:
        losses = optax.softmax_cross_entropy(z, y)
    correct = (jnp.argmax(z, axis=-1) == labels).astype(jnp.float32)
    return jnp.sum(losses * counted), jnp.sum(correct * counted), jnp.sum(counted)
