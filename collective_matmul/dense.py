"""Dense layers in global view, every collective of them overlapped: where shard_map is entered.

`column_parallel` cuts the hidden dimension of its kernel, `row_parallel` contracts it away: a pair
of them makes an MLP or an attention block whose hidden activations never leave their device. Where
the activations lie between layers, and how the collectives run, is one value, a `Layout`;
`layout=None` is one device, and gives the same numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from collective_matmul.layout import Layout, typed
from collective_matmul.operands import (
    Arrays,
    Biases,
    arrays,
    biases_of,
    check_operands,
    check_product,
    check_split,
)
from collective_matmul.per_device import between as device_between
from collective_matmul.per_device import column_spec, columns, embedding, rows


def column_parallel(
    x: jax.Array, kernel: Arrays, bias: Biases = None, *, layout: Layout | None
) -> Any:
    """`y[..., f...] = x[..., d] . kernel[d, f...] + bias[f...]`, the kernel's columns cut.

    The activations are gathered over the tensor axis while they are multiplied: their rows
    (`"tokens"`) or, accumulating, their features (`"features"`). Parameters that are cut over fsdp
    too are gathered for use, and their gradients reduce-scattered.

    Args:
      x: [b@data, s@tensor, d] for `"tokens"`, [b@data, s, d@tensor] for `"features"`; any number of
        dimensions between the first and the last.
      kernel: [d@fsdp, f@tensor, ...], the first hidden dimension cut, so that [d, heads, head_dim]
        is cut by heads. A tuple of kernels is fed by one gather.
      bias: [f@tensor, ...], or a tuple of such arrays or Nones.
      layout: where the arrays lie, or None for one device.

    Returns:
      [b@data, s, f@tensor, ...] in the operands' dtype, or a tuple of such arrays.

    Raises:
      ValueError: if sizes contradict, or do not split over their axes, with the nearest that do.
      TypeError: if the operands have different dtypes.
      NotImplementedError: if the layout names an algorithm or backend that cannot run this.
    """
    x, kernels, biases = jnp.asarray(x), arrays(kernel), biases_of(bias, kernel)
    check_operands((x,), kernels, biases)
    for w, b in zip(kernels, biases, strict=True):
        check_product(x, w, 1, b)
    specs = [column_spec(x.ndim, w.ndim) for w in kernels]
    results = _on_mesh(
        layout,
        columns,
        {"x": x, "kernel": kernels, "bias": biases},
        lambda at: (
            at.activation(x.ndim),
            tuple(at.column_kernel(w.ndim) for w in kernels),
            tuple(None if b is None else at.column_bias(b.ndim) for b in biases),
        ),
        lambda at: tuple(
            at.hidden(len(spec.out), w.ndim) for spec, w in zip(specs, kernels, strict=True)
        ),
    )
    return results if isinstance(kernel, (tuple, list)) else results[0]


def row_parallel(
    x: Arrays, kernel: Arrays, bias: jax.Array | None = None, *, layout: Layout | None
) -> jax.Array:
    """`y[..., d] = x[..., f...] . kernel[f..., d] + bias[d]`, the kernel's rows cut.

    Each device's product is a partial sum; the sums travel over the tensor axis while the next
    piece is multiplied, and each device keeps its rows (`"tokens"`) or features (`"features"`).

    Args:
      x: [b@data, s, f@tensor, ...], as `column_parallel` returns it; or a tuple of such arrays.
      kernel: [f@tensor, ..., d@fsdp], contracted in all its dimensions but the last; or a tuple,
        paired with x: one scatter carries the sum of the products.
      bias: [d], added once.
      layout: where the arrays lie, or None for one device.

    Returns:
      [b@data, s@tensor, d] for `"tokens"`, [b@data, s, d@tensor] for `"features"`.

    Raises:
      ValueError, TypeError, NotImplementedError: as `column_parallel`.
    """
    xs, kernels = arrays(x), arrays(kernel)
    (bias,) = biases_of(bias, ())
    if len(xs) != len(kernels):
        raise ValueError(f"{len(xs)} arrays x but {len(kernels)} kernels; they are paired")
    check_operands(xs, kernels, (bias,))
    shapes = [check_product(y, w, w.ndim - 1, bias) for y, w in zip(xs, kernels, strict=True)]
    if len(set(shapes)) > 1:
        raise ValueError(f"the products are summed, so their shapes must agree; they are {shapes}")
    return _on_mesh(
        layout,
        rows,
        {"x": xs, "kernel": kernels, "bias": bias},
        lambda at: (
            tuple(at.hidden(y.ndim, w.ndim) for y, w in zip(xs, kernels, strict=True)),
            tuple(at.row_kernel(w.ndim) for w in kernels),
            None if bias is None else at.row_bias(),
        ),
        lambda at: at.activation(len(shapes[0])),
    )


def embed(
    x: jax.Array, kernel: jax.Array, bias: jax.Array | None = None, *, layout: Layout | None
) -> jax.Array:
    """`y[..., d] = x[..., c] . kernel[c, d] + bias[d]`: from features that no axis cuts.

    The first layer of a model. For `"tokens"` every device has rows of its own, and the kernel's
    pieces travel to them (`gather_rhs`). For `"features"` every device makes its features of all
    rows, and nothing has to travel.

    Args:
      x: [b@data, s@tensor, c] for `"tokens"`, [b@data, s, c] for `"features"`.
      kernel: [c, d@(fsdp, tensor)] for `"tokens"`, [c, d@tensor] for `"features"`.
      bias: [d].
      layout: where the arrays lie, or None for one device.

    Returns:
      [b@data, s@tensor, d] for `"tokens"`, [b@data, s, d@tensor] for `"features"`.

    Raises:
      ValueError, TypeError, NotImplementedError: as `column_parallel`.
    """
    x, (kernel,), (bias,) = jnp.asarray(x), arrays(kernel), biases_of(bias, ())
    check_operands((x,), (kernel,), (bias,), ndim=2)
    check_product(x, kernel, 1, bias)
    return _on_mesh(
        layout,
        embedding,
        {"x": x, "kernel": kernel, "bias": bias},
        lambda at: (
            at.unsharded(x.ndim),
            at.embed_kernel(),
            None if bias is None else at.row_bias(),
        ),
        lambda at: at.activation(x.ndim),
    )


def mlp(
    x: jax.Array,
    kernel_in: Arrays,
    kernel_out: jax.Array,
    bias_in: Biases = None,
    bias_out: jax.Array | None = None,
    *,
    activation: Callable[[jax.Array], jax.Array],
    layout: Layout | None,
) -> jax.Array:
    """`y = activation(x . kernel_in + bias_in) . kernel_out + bias_out`, in one shard_map.

    With two kernels, `(gate, up)`, the hidden layer is `activation(x . gate) * (x . up)`.

    Args:
      x: [b@data, s@tensor, d] for `"tokens"`, [b@data, s, d@tensor] for `"features"`.
      kernel_in: [d@fsdp, f@tensor], or a pair (gate, up) of them, fed by one gather.
      kernel_out: [f@tensor, d@fsdp].
      bias_in: [f@tensor], or a pair.
      bias_out: [d].
      activation: elementwise, applied to this device's hidden units.
      layout: where the arrays lie, or None for one device.

    Returns:
      As x.

    Raises:
      ValueError: also if there are more than two kernels in; else as `column_parallel`.
      TypeError, NotImplementedError: as `column_parallel`.
    """
    x, kernels, biases = jnp.asarray(x), arrays(kernel_in), biases_of(bias_in, kernel_in)
    (kernel_out,), (bias_out,) = arrays(kernel_out), biases_of(bias_out, ())
    if len(kernels) > 2:
        raise ValueError(f"an MLP has one kernel in, or a (gate, up) pair; got {len(kernels)}")
    check_operands((x,), (*kernels, kernel_out), (*biases, bias_out), ndim=2)
    for w, b in zip(kernels, biases, strict=True):
        hidden = jax.ShapeDtypeStruct(check_product(x, w, 1, b), x.dtype)
        check_product(hidden, kernel_out, 1, bias_out)

    def body(layout: Layout | None, x: Any, w_in: Any, w_out: Any, b_in: Any, b_out: Any) -> Any:
        gate, *up = columns(layout, x, w_in, b_in)
        units = activation(gate)
        return rows(layout, (units * up[0] if up else units,), (w_out,), b_out)

    return _on_mesh(
        layout,
        body,
        {
            "x": x,
            "kernel_in": kernels,
            "kernel_out": kernel_out,
            "bias_in": biases,
            "bias_out": bias_out,
        },
        lambda at: (
            at.activation(x.ndim),
            tuple(at.column_kernel() for _ in kernels),
            at.row_kernel(),
            tuple(None if b is None else at.column_bias() for b in biases),
            None if bias_out is None else at.row_bias(),
        ),
        lambda at: at.activation(x.ndim),
    )


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
    return _on_mesh(
        layout,
        functools.partial(device_between, middle=middle, name=name),
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


def _on_mesh(
    layout: Layout | None,
    body: Callable[..., Any],
    arguments: dict[str, Any],
    in_specs: Callable[[Layout], tuple[Any, ...]],
    out_specs: Callable[[Layout], Any],
    check_vma: bool = True,
) -> Any:
    """`body(layout, *arguments)` on every device, sizes checked first; or plainly, on one."""
    values = tuple(arguments.values())
    if layout is None:
        return body(None, *values)
    specs = in_specs(layout)
    for name, value, spec in zip(arguments, values, specs, strict=True):
        jax.tree.map(lambda x, at, name=name: check_split(layout, name, x, at), value, spec)
    values = typed(layout, values, specs)
    if layout.partitioner == "gspmd":

        def constrained(values: Any, specs: Any) -> Any:
            return jax.tree.map(
                lambda x, at: jax.lax.with_sharding_constraint(x, NamedSharding(layout.mesh, at)),
                values,
                specs,
            )

        # Beside a tensor axis kernels are gathered over fsdp for use, in so many words: otherwise
        # the compiler gathers the whole batch instead, for the kernel's gradient (312 GiB a chip
        # for ViT-22B on 1,024). Without one it does well, and this would cost it 4 %.
        alone = layout.size(layout.tensor) == 1
        for_use = specs if alone else jax.tree.map(layout.without_fsdp, specs)
        values = tuple(
            constrained(value, at) if name.startswith("kernel") else value
            for name, value, at in zip(arguments, constrained(values, specs), for_use, strict=True)
        )
        return constrained(body(None, *values), out_specs(layout))
    axes = {*layout.data, *layout.tensor_axes}
    return jax.shard_map(
        lambda *local: body(layout, *local),
        mesh=layout.mesh,
        in_specs=specs,
        out_specs=out_specs(layout),
        axis_names=axes,
        check_vma=check_vma,
    )(*values)
