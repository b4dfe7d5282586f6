"""Where shard_map is entered, sizes checked first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding

from collective_matmul.layout import Layout, typed
from collective_matmul.operands import check_split


def on_mesh(
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
