"""Our models on a GPU: one process of `python -m bench gpu`.

python -m bench.measured.gpu REQUEST OUT      (as JSON, and a file; see `gpu_cases.report`)
"""

from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from bench.flops import count
from bench.measured.gpu_cases import Case, report
from bench.work import Work, pass_work
from models.capture import Capture
from models.encoder import Encoder
from models.vit import ViT


def function(case: Case) -> tuple[Callable[..., Any], Any, jax.ShapeDtypeStruct]:
    """`(parameters, x) -> y`, and its arguments' shapes and dtypes: kernels are bfloat16."""
    graph, state = nnx.split(nnx.eval_shape(lambda: _module(case)))
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: jax.ShapeDtypeStruct(x.shape, _dtype(path)), nnx.to_pure_dict(state)
    )

    def forward(params: Any, x: jax.Array) -> Any:
        module = nnx.merge(graph, params)
        return module(x) if case.whole else module(x, Capture(lambda _: False))

    return forward, params, jax.ShapeDtypeStruct(case.shape, jnp.bfloat16)


def work(case: Case, *, backward: bool) -> Work:
    """Model FLOPs of a pass; a pass forward and backward has 3 times those of the pass forward."""
    return pass_work(count(*function(case)), backward=backward)


def prepare(case: Case, backward: bool) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    """The pass on arrays of random numbers, compiled at its first call.

    The backward pass computes the gradients of all parameters, and those of a stack's input.
    """
    forward, params, x = function(case)
    y = jax.eval_shape(forward, params, x)
    params, x, dy = jax.jit(lambda: _random((params, x, y)))()
    if not backward:
        run = jax.jit(forward)
        return lambda: run(params, x), jax.block_until_ready

    def both(params: Any, x: jax.Array, dy: jax.Array) -> Any:
        if case.whole:
            y, pull = jax.vjp(lambda params: forward(params, x), params)
        else:
            y, pull = jax.vjp(forward, params, x)
        return y, pull(dy)

    compiled = jax.jit(both)
    return lambda: compiled(params, x, dy), jax.block_until_ready


def _module(case: Case) -> Any:
    kind = ViT if case.whole else Encoder
    return kind(case.config, layout=None, rngs=nnx.Rngs(0))


def _dtype(path: tuple[Any, ...]) -> Any:
    return jnp.bfloat16 if path[-1].key == "kernel" else jnp.float32


def _random(like: Any) -> Any:
    """Arrays of normal numbers, kernels' of their initial size: zeros would take less power.

    All of them repeat the same million, which is quicker to make.
    """
    values = jax.random.normal(jax.random.key(0), (1_000_003,))

    def array(x: jax.ShapeDtypeStruct) -> jax.Array:
        fan_in = x.shape[-2] if len(x.shape) > 1 else 1
        return jnp.resize(values / fan_in**0.5, x.shape).astype(x.dtype)

    return jax.tree.map(array, like)


def main(request: dict[str, Any], out: pathlib.Path) -> None:
    """Times the case of the request.

    Raises:
      RuntimeError: if a GPU is asked for, and this jax has none.
    """
    device = jax.devices()[0]
    if device.platform != request["device"]:
        raise RuntimeError(
            f"jax {jax.__version__} is asked for a {request['device']} and has {device.platform}"
        )
    report(request, out, prepare, device.device_kind)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), pathlib.Path(sys.argv[2]))
