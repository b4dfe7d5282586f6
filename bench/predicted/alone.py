"""Compiles one kernel, and says how many bundles it issues: `python -m bench.predicted.alone`.

What `bench.predicted.kernels` starts. The kernel comes as JSON on the standard input, the answer is
the last line of the output.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from bench.predicted import schedules
from bench.predicted.schedules import Issued
from bench.predicted.slices import compile_only, tpu_slice
from collective_matmul.inspect import costs, kernels
from collective_matmul.inspect.hlo import parse
from collective_matmul.inspect.overlap import text_of

_WIDTHS = (2, 4, 8, 16, 32, 64)
# HLO's names of dtypes where they are not numpy's.
DTYPES = {
    **costs.DTYPES,
    **{f"s{width}": f"int{width}" for width in _WIDTHS},
    **{f"u{width}": f"uint{width}" for width in _WIDTHS},
    "pred": "bool",
    "f8e4m3": "float8_e4m3",
    "f8e8m0fnu": "float8_e8m0fnu",
    "f4e2m1fn": "float4_e2m1fn",
}


def main() -> int:
    """Answers what the standard input asks."""
    print(json.dumps(dataclasses.asdict(answer(json.loads(sys.stdin.read())))))
    return 0


def answer(asked: dict[str, Any]) -> Issued:
    """What a kernel issues.

    Args:
      asked: the fields of `kernels.Kernel`, "topology" and "options" for the compiler.
    """
    compile_only()
    schedules.ask()
    try:
        name = _compiled(asked)
    except (jax.errors.JaxRuntimeError, ValueError, TypeError, NotImplementedError) as error:
        return Issued(None, f"alone it does not compile ({_first(error)})")
    return schedules.written(name) or Issued(None, "the compiler did not write its schedule")


def _compiled(asked: dict[str, Any]) -> str:
    """Compiles the kernel on every device of a slice; the name that its instruction got."""
    mesh = Mesh(np.array(tpu_slice(asked["topology"])), ("device",))
    whole = NamedSharding(mesh, P())
    operands = [
        jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=whole)
        for array in map(_described, asked["operands"])
    ]
    call = jax.ffi.ffi_call(
        kernels.PALLAS,
        [_described(each) for each in asked["results"]],
        custom_call_api_version=1,
        legacy_backend_config=asked["configuration"],
    )
    # Nothing tells jax how the results of a kernel vary over the mesh.
    mapped = jax.shard_map(
        lambda *arrays: call(*(arrays[i] for i in asked["taken"])),
        mesh=mesh,
        in_specs=P(),
        out_specs=P(),
        check_vma=False,
    )
    compiled = jax.jit(mapped).lower(*operands).compile(compiler_options=asked["options"])
    (made,) = kernels.pallas(parse(text_of(compiled)))
    return made.name


def _described(array: tuple[str, list[int]]) -> jax.ShapeDtypeStruct:
    dtype, shape = array
    return jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(DTYPES.get(dtype, dtype)))


def _first(error: Exception) -> str:
    return str(error).partition("\n")[0][:200]


if __name__ == "__main__":
    sys.exit(main())
