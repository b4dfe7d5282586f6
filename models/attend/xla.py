"""Attention as the compiler makes it: any shapes, any machine, and every step may be captured."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from models.capture import Capture
from models.norm import Norm


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    norms: tuple[Norm, Norm] | None,
    capture: Capture,
) -> jax.Array:
    """Norms, logits, softmax (in float32) and the average of the values, as `models.attend`."""
    query = capture("query", query if norms is None else norms[0](query))
    key = capture("key", key if norms is None else norms[1](key))
    value = capture("value", value)
    logits = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32)
    logits = capture("attention_logits", logits * query.shape[-1] ** -0.5)
    capture.derived("attention_logit_max", lambda: jnp.max(jnp.abs(logits), axis=(2, 3)))
    weights = jax.nn.softmax(logits)
    capture.derived(
        "attention_entropy",
        lambda: jnp.mean(jnp.sum(jax.scipy.special.entr(weights), axis=-1), axis=2),
    )
    weights = weights.astype(value.dtype)
    return capture("attention_output", jnp.einsum("bhqk,bkhd->bqhd", weights, value))
