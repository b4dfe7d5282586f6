"""Bringing arrays to one manual-axes type, as `jax.shard_map` with `check_vma=True` demands.

Inside shard_map the type of an array says over which mesh axes its value may vary. The operands of
a custom derivative rule must agree on that beforehand: were a weight left invariant over a data
axis, its gradient, which varies, would have the wrong type. `lax.pcast` to the union of the axes
ahead of the rule mends it, and its own transpose then supplies the `psum` over the data axis.
"""

from __future__ import annotations

from collections.abc import Iterable

import jax
from jax import lax


def varying_axes(x: jax.Array) -> frozenset[str]:
    """The manual axes over which `x` may vary; none outside shard_map or without vma checks."""
    return jax.typeof(x).manual_axis_type.varying


def varying_over(x: jax.Array, axes: Iterable[str]) -> jax.Array:
    """`x`, typed as varying over `axes` too."""
    missing = tuple(sorted(set(axes) - varying_axes(x)))
    return lax.pcast(x, missing, to="varying") if missing else x


def varying_like(x: jax.Array, other: jax.Array) -> jax.Array:
    """`x`, typed as varying over all that `other` varies over."""
    return varying_over(x, varying_axes(other))
