"""Classification losses; a row without a label counts neither here nor in the accuracy.

Labels are numbers, one class for each row, or targets, a number for each class of each row: several
classes at once, or two images mixed.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
import optax

Kind = Literal["sigmoid", "softmax"]


def counted(labels: jax.Array) -> jax.Array:
    """1 for each row that has a label, 0 for one that only fills the batch: [b@data] float32.

    Args:
      labels: as in `classify`.
    """
    if labels.ndim == 2:
        labels = jnp.min(labels, axis=-1)
    return (labels >= 0).astype(jnp.float32)


def classify(
    logits: jax.Array, labels: jax.Array, kind: Kind, *, smoothing: float = 0.0
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sums over the rows of loss and correct answers, and how many rows have a label.

        sigmoid   -sum_c [ y_c log s(z_c) + (1 - y_c) log s(-z_c) ],  s the logistic function
        softmax   -sum_c y_c log softmax(z)_c

    A row is correct if the class of its largest logit has the largest target of the row: it is the
    class; or one of the assigned classes; or the one that most of a mixed image is of. A row with
    targets of 0 alone has no correct answer.

    Args:
      logits: [b@data, classes], any float dtype; computed in float32.
      labels: [b@data] int32, in [0, classes), or negative: the row only fills the batch. Or
        targets, [b@data, classes] float32, from 0 to 1; a row with a negative one fills the batch.
      kind: which of the losses. For softmax, targets that add up to more than 1 are divided by
        their sum.
      smoothing: this share of each target is spread over all classes, in the loss alone.

    Returns:
      Three float32 scalars.

    Reference: sums over the classes as google-research/big_vision `utils.sigmoid_xent`; smoothing
    as `optax.smooth_labels`.
    """
    z = logits.astype(jnp.float32)
    rows = counted(labels)
    if labels.ndim == 2:
        y = jnp.maximum(labels.astype(jnp.float32), 0.0)
        answer = jnp.take_along_axis(y, jnp.argmax(z, axis=-1, keepdims=True), axis=-1)[:, 0]
        correct = ((answer > 0.0) & (answer == jnp.max(y, axis=-1))).astype(jnp.float32)
        if kind == "softmax":
            y = y / jnp.maximum(jnp.sum(y, axis=-1, keepdims=True), 1.0)
    else:
        y = jax.nn.one_hot(labels, z.shape[-1], dtype=jnp.float32)
        correct = (jnp.argmax(z, axis=-1) == labels).astype(jnp.float32)
    if smoothing:
        y = optax.smooth_labels(y, smoothing)
    if kind == "sigmoid":
        losses = jnp.sum(optax.sigmoid_binary_cross_entropy(z, y), axis=-1)
    else:
        losses = optax.softmax_cross_entropy(z, y)
    return jnp.sum(losses * rows), jnp.sum(correct * rows), jnp.sum(rows)
