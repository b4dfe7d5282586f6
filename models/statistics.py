"""What tells early that training goes wrong: attention logits that grow, entropy that vanishes.

    attention/logit_max     max |logit| over rows, heads, queries and keys
    attention/entropy_min   of each head -sum p log p, averaged over rows and queries; the least one
    gradient_norm/PART      the norm of the gradients of one part of the model

The first two are of all blocks and the pooling head together, and of each alone
(`attention/logit_max/block_3`, `attention/logit_max/pool`). The largest possible entropy is log(s)
for s tokens; near 0 every query looks at a single key. Where it vanishes while the logits grow,
training is about to diverge: Dehghani et al. 2023 (arXiv 2302.05442) saw it in models of 8 billion
parameters, Wortsman et al. 2023 (arXiv 2309.14322) in small ones with high learning rates.

Blocks reduce their logits to one number for each row and head before the scan over layers keeps
them, so this costs one pass over the logits and no memory.
"""  # noqa: A005

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

LOGIT, ENTROPY = "attention_logit_max", "attention_entropy"
CAPTURE = (f"*{LOGIT}", f"*{ENTROPY}")
"""What the model is asked to capture."""


def attention(noted: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Logits and entropy by block, and of all.

    Args:
      noted: what was captured: "block_3/attention_logit_max", "block_3/attention_entropy" and so
        on, each [parts, b@data, heads@tensor], of each part of the batch.

    Returns:
      float32 scalars by the names above.
    """
    largest, least = {}, {}
    for name, x in noted.items():
        place, _, what = name.rpartition("/")
        if what == LOGIT:
            largest[f"attention/logit_max/{place}"] = jnp.max(x)
        else:
            least[f"attention/entropy_min/{place}"] = jnp.min(jnp.mean(x, axis=(0, 1)))
    return {
        "attention/logit_max": jnp.max(jnp.stack(list(largest.values()))),
        "attention/entropy_min": jnp.min(jnp.stack(list(least.values()))),
        **largest,
        **least,
    }


def gradients(grads: dict[str, Any]) -> dict[str, jax.Array]:
    """The norm of the gradients of each block and of every other part.

    Args:
      grads: as the model's parameters; those of `encoder.blocks` are stacked over the layers.

    Returns:
      float32 scalars: "gradient_norm/head", "gradient_norm/block_3" and so on.
    """
    parts = {name: grads[name] for name in grads if name != "encoder"}
    parts |= {"encoder_norm": grads["encoder"]["norm"]}
    norms = {f"gradient_norm/{name}": optax.tree.norm(part) for name, part in parts.items()}
    squares = [
        jnp.sum(jnp.square(x), axis=range(1, x.ndim))
        for x in jax.tree.leaves(grads["encoder"]["blocks"])
    ]
    blocks = jnp.sqrt(sum(squares[1:], squares[0]))
    return norms | {f"gradient_norm/block_{i}": norm for i, norm in enumerate(blocks)}
