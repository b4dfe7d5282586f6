"""What is between the projections: attention over heads that a device has whole, by two ways.

xla         operations that the compiler fuses as it can; whatever is to be captured
pallas_tpu  one kernel, one more for the gradient; self-attention on TPU
"""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import PartitionSpec as P

from collective_matmul import Layout
from collective_matmul.compiling import on_tpu
from collective_matmul.layout import typed
from collective_matmul.varying import varying_like
from models.attend import pallas_tpu, xla
from models.capture import Capture
from models.norm import Norm
from models.vit_config import Attend

INSIDE = ("query", "key", "attention_logits", "attention_logit_max", "attention_entropy")
"""What the kernel never makes."""


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    norms: tuple[Norm, Norm] | None,
    *,
    choice: Attend | None,
    layout: Layout | None,
    capture: Capture,
) -> jax.Array:
    """`softmax(N(query) . N(key) / sqrt(head_dim)) . value`, the softmax in float32.

    Args:
      query: [b@data, q, heads@tensor, head_dim], or [1, q, ...], the same for all rows.
      key, value: [b@data, s, heads@tensor, head_dim].
      norms: of queries and keys, or None.
      choice: "xla"; "pallas_tpu", which on other machines is interpreted, slowly; or None: the
        kernel where there is a TPU and it can run, else "xla".
      layout: where the arrays lie, or None for one device.
      capture: notes query, key, value, attention_logits and attention_output; and of each row and
        head attention_logit_max, max |logit|, and attention_entropy, the mean over queries of
        -sum p log p, both [b@data, heads@tensor] float32.

    Returns:
      [b@data, q, heads@tensor, head_dim].

    Raises:
      NotImplementedError: if the kernel is asked for by name and cannot run, with the reason.
    """
    kernel = kernel_for(query, key, norms, choice=choice, layout=layout, capture=capture)
    if kernel is None:
        return xla.attend(query, key, value, norms, capture)
    value = capture("value", value)
    y = _on_devices(kernel, query, key, value, scales_of(norms), layout)
    capture.names += INSIDE
    return capture("attention_output", y)


def kernel_for(
    query: Any,
    key: Any,
    norms: tuple[Norm, Norm] | None,
    *,
    choice: Attend | None,
    layout: Layout | None,
    capture: Capture,
) -> pallas_tpu.Kernel | None:
    """The kernel that `attend` runs, or None if that is none.

    Args:
      query, key: as `attend`, or their `jax.ShapeDtypeStruct`s.
      norms, choice, layout, capture: as `attend`.

    Raises:
      NotImplementedError: as `attend`.
    """
    tpu = on_tpu(None if layout is None else layout.mesh)
    if choice == "xla" or (choice is None and not tpu):
        return None
    refusal = _captured(capture) or pallas_tpu.refusal(query, key)
    if refusal and choice is None:
        return None
    if refusal:
        raise NotImplementedError(
            f"attention='pallas_tpu' cannot run: {refusal}. attention='xla' can; None chooses"
        )
    return pallas_tpu.Kernel(
        heads=key.shape[2] // (1 if layout is None else layout.size(layout.tensor)),
        head_dim=key.shape[3],
        centred=norms[0].centred if norms else None,
        epsilon=norms[0].epsilon if norms else 0.0,
        interpret=not tpu,
    )


def scales_of(norms: tuple[Norm, Norm] | None) -> pallas_tpu.Scales | None:
    """What the kernels take of the norms."""
    if norms is None:
        return None
    return pallas_tpu.Scales(*(norm.scale[...].reshape(1, -1) for norm in norms))


def _captured(capture: Capture) -> str | None:
    asked = [name for name in INSIDE if capture.wanted(name)]
    return f"it never makes {asked[0]}, which is to be captured" if asked else None


def _on_devices(
    kernel: pallas_tpu.Kernel,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    scales: pallas_tpu.Scales | None,
    layout: Layout | None,
) -> jax.Array:
    """The kernel, on every device for its rows and heads."""

    def body(
        query: jax.Array, key: jax.Array, value: jax.Array, scales: pallas_tpu.Scales | None
    ) -> jax.Array:
        flat = (x.reshape(*x.shape[:2], -1) for x in (query, key, value))
        scales = jax.tree.map(lambda x: varying_like(x, query), scales)
        return pallas_tpu.attend(kernel, *flat, scales).reshape(query.shape)

    if layout is None:
        return body(query, key, value, scales)
    at = layout.hidden(4, 3)
    query, key, value = typed(layout, (query, key, value), (at, at, at))
    return jax.shard_map(
        body,
        mesh=layout.mesh,
        in_specs=(at, at, at, P()),
        out_specs=at,
        axis_names={*layout.data, *layout.tensor_axes},
        # jax's interpreter of kernels slices by indices that have no type of what they vary over.
        check_vma=not kernel.interpret,
    )(query, key, value, scales)
