"""Two products and anything between them: once, or layer by layer with weights fetched ahead."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from collective_matmul import per_device
from collective_matmul.dense.on_mesh import on_mesh
from collective_matmul.layout import Layout
from collective_matmul.operands import Arrays, arrays, biases_of, check_operands, check_product
from collective_matmul.per_device import Parts
from collective_matmul.slab import InPlace


def between(
    x: jax.Array,
    kernels_in: Arrays,
    kernels_out: Arrays,
    operands: Sequence[Any] = (),
    bias: jax.Array | None = None,
    *,
    middle: Callable[..., jax.Array],
    operand_specs: Callable[[Layout], Sequence[Any]] = lambda _: (),
    layout: Layout | None,
    name: str | None = None,
    check_vma: bool = True,
) -> jax.Array:
    """`y = middle(x . [w_1 | w_2 ..], *operands) . [v_1 / v_2 ..] + b`, in one shard_map.

    What a block does between its norm and its sum, where all its kernels in share an x and all its
    kernels out a sum: one gather, one wide product, what the middle does with it on each device,
    one product, one scatter. The middle sees the columns of all kernels side by side, and is free
    to work in place. The backward pass runs it again, from the wide product, which is kept.

    Args:
      x: [b@data, s@tensor, d] for `"tokens"`, [b@data, s, d@tensor] for `"features"`.
      kernels_in: [d@fsdp, f@tensor, ...], one or several.
      kernels_out: [f@tensor, ..., d@fsdp], one or several.
      operands: what else the middle takes: pytrees of arrays.
      bias: [d], added once.
      middle: from [b, s, columns in of one device] and the operands to [b, s, rows out of one
        device], in the dtype of x. It is called with what one device holds.
      operand_specs: from the layout to where the operands lie, a pytree of specs for each.
      layout: where the arrays lie, or None for one device.
      name: under which `jax.checkpoint` finds the wide product.
      check_vma: as in `jax.shard_map`; False for a middle that jax cannot type, such as a kernel
        that it interprets.

    Returns:
      As x.

    Raises:
      NotImplementedError: if the layout leaves the collectives to the compiler, which cuts each
        kernel's columns and has no columns of one device.
      ValueError, TypeError: as `column_parallel`.
    """
    if layout is not None and layout.partitioner == "gspmd":
        raise NotImplementedError(
            "partitioner='gspmd' has no middle on one device; use column_parallel and row_parallel"
        )
    x, kernels_in, kernels_out = jnp.asarray(x), arrays(kernels_in), arrays(kernels_out)
    (bias,) = biases_of(bias, ())
    check_operands((x,), (*kernels_in, *kernels_out), (bias,))
    for kernel in kernels_in:
        check_product(x, kernel, 1, None)
    return on_mesh(
        layout,
        functools.partial(per_device.between, middle=middle, name=name),
        {
            "x": x,
            "kernels_in": kernels_in,
            "kernels_out": kernels_out,
            "operands": tuple(operands),
            "bias": bias,
        },
        lambda at: (
            at.activation(x.ndim),
            tuple(at.column_kernel(kernel.ndim) for kernel in kernels_in),
            tuple(at.row_kernel(kernel.ndim) for kernel in kernels_out),
            tuple(operand_specs(at)),
            None if bias is None else at.row_bias(),
        ),
        lambda at: at.activation(x.ndim),
        check_vma,
    )


def layers(
    x: jax.Array,
    parameters: Any,
    *,
    parts: Callable[[Any], Parts],
    before: Callable[[jax.Array, Any], jax.Array],
    middle: InPlace | Callable[[jax.Array, Any], jax.Array],
    specs: Any = None,
    layout: Layout | None,
    check_vma: bool = True,
) -> jax.Array:
    """`x <- x + middle(before(x) . [w_1 | w_2 ..]) . [v_1 / v_2 ..] + b`, layer by layer.

    A stack of residual blocks of two products each, in one shard_map and one scan. Each layer's
    kernels are fetched while the layer before works, and its gradients summed while the next one in
    the backward pass does, a round of hops beside each product: of ViT-22B's step on 1,024 v4, what
    is not hidden of all that travels is 1.5 % (`docs/performance.md`). Of each layer its x and its
    wide product are kept; the backward pass runs `before` and `middle` again.

    A dozen hops are in flight at once: on TPU compile with `compiler_options`, which allows it.

    Args:
      x: [b@data, s@tensor, d]: activations that are cut by tokens.
      parameters: a pytree of arrays, the layers as their first dimension.
      parts: from one layer's parameters, as they are on one device, to the layer's parts.
      before: `(x, parts.before) -> [b, s, d]`, of one device, token by token: a norm.
      middle: `(wide, parts.middle) -> [b, s, rows out of one device]`, as in `between`; or one that
        reads the wide product where it lies.
      specs: where the parameters lie on the layout's mesh: a pytree of PartitionSpecs like them, as
        `nn.partition_specs` finds them of a module.
      layout: where the arrays lie, or None for one device.
      check_vma: as in `between`.

    Returns:
      As x.

    Raises:
      NotImplementedError: if the layout cuts activations by features, of which `before` would need
        the others, or leaves the collectives to the compiler.
      ValueError: if the parameters are not of the same number of layers; else as `column_parallel`.
      TypeError: as `column_parallel`.
    """
    if layout is not None and (layout.partitioner == "gspmd" or layout.activations == "features"):
        raise NotImplementedError(
            f"layers with partitioner={layout.partitioner!r}, activations={layout.activations!r}: "
            "a device needs its tokens whole, and products of its own; use partitioner='shard_map' "
            "and activations='tokens', or a scan over column_parallel and row_parallel"
        )
    x = jnp.asarray(x)
    depths = {array.shape[:1] for array in jax.tree.leaves(parameters)}
    if len(depths) != 1 or () in depths:
        found = ", ".join(sorted(str(depth[0]) if depth else "none" for depth in depths))
        raise ValueError(
            f"parameters are stacked, layers as their first dimension; these have {found} of them"
        )
    of_one = jax.eval_shape(lambda p: parts(jax.tree.map(lambda a: a[0], p)), parameters)
    check_operands((x,), (*of_one.kernels_in, *of_one.kernels_out), (of_one.bias,))
    for kernel in of_one.kernels_in:
        check_product(x, kernel, 1, None)
    if not isinstance(middle, InPlace):
        middle = InPlace.of(middle)
    return on_mesh(
        layout,
        functools.partial(per_device.layers, parts=parts, before=before, middle=middle),
        {"x": x, "parameters": parameters},
        lambda at: (at.activation(x.ndim), specs),
        lambda at: at.activation(x.ndim),
        check_vma,
    )
