r"""Checksums of arrays' values, the same on every mesh: exact, computed where the arrays lie.

For the bits $w_i$ of the element at position $i$, and two lanes with different keys $k_i$,

$$ s = \sum_i h(w_i \oplus k_i) \bmod 2^{32} $$

$h$ is the finaliser of MurmurHash3, a bijection of 32 bits: a change of one element, of any of its
bits, always changes both sums. Keys are hashes of the position, so elements that swap places, or
any other change of several, go unnoticed with a chance of about $2^{-64}$. Integer sums do not
depend on their order: each device sums its piece, and one all-reduce of two words per array is all
that travels.

Reference: https://github.com/aappleby/smhasher (MurmurHash3, fmix32).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

LANES = (0x9E3779B9, 0x85EBCA77)  # odd, so that multiplying by them loses nothing


def sums(arrays: Mapping[str, jax.Array]) -> list[jax.Array]:
    """Both sums of every array, in the order of their sorted names. Returns before they are there.

    Args:
      arrays: {name: array} of any shapes, on any mesh.

    Returns:
      Of each array uint32[2], the whole of it on each device.

    Raises:
      TypeError: if the bits of a dtype cannot be taken.
    """
    return [of_array(arrays[name]) for name in sorted(arrays)]


def texts(names: Iterable[str], values: Sequence[jax.Array]) -> dict[str, str]:
    """The sums as a manifest has them: {name: 16 hexadecimal digits}. Waits for them.

    Args:
      names: the arrays' names.
      values: uint32[2] of each, from `sums`.
    """
    rows = [row.tolist() for row in jax.device_get(list(values))]
    return {name: f"{a:08x}{b:08x}" for name, (a, b) in zip(sorted(names), rows, strict=True)}


@jax.jit
def of_array(x: jax.Array) -> jax.Array:
    """uint32[2] of one array. Compiled once for all arrays of a shape, a dtype and a place."""
    words = _words(x)
    found = []
    for lane in LANES:
        key = jnp.uint32(lane)
        for dim in range(words.ndim):  # one after the other: a position may exceed 32 bits
            number = jax.lax.broadcasted_iota(jnp.uint32, words.shape, dim)
            key = (key ^ number) * jnp.uint32(lane)
            key = key ^ (key >> 15)
        found.append(jnp.sum(_mixed(words ^ key), dtype=jnp.uint32))
    return jnp.stack(found)


def _mixed(x: jax.Array) -> jax.Array:
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _words(x: jax.Array) -> jax.Array:
    """The bits as uint32[..., words of an element]."""
    if jnp.issubdtype(x.dtype, jnp.bool_):
        x = x.astype(jnp.uint8)
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) or jnp.issubdtype(x.dtype, np.complexfloating):
        raise TypeError(f"{x.dtype} has no bits to sum; keep jax.random.key_data, or real and imag")
    wide = {8: jnp.uint8, 16: jnp.uint16}.get(8 * x.dtype.itemsize, jnp.uint32)
    return jax.lax.bitcast_convert_type(x, wide).astype(jnp.uint32)
