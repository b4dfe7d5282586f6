"""What several test files share: the plans there are, cases of the primitive, and their oracle.

An oracle is numpy in float64 (int64 for integers) on the operands of all devices together. The
operands of a case differ on every device, so that a result that mixes devices up cannot be right.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.sharding import PartitionSpec as P

import collective_matmul as cm
from collective_matmul import algorithms, backends, hardware


@functools.cache
def quick() -> dict[str, Any]:
    """Options that make compiling quicker, which is what these tests spend their time on.

    What XLA does with the program stays the same; its parts are compiled with less effort. Not
    every version of jaxlib has every option.
    """
    options = {
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
        "xla_cpu_use_fusion_emitters": False,
    }
    known = {}
    for name, value in options.items():
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            jax.jit(lambda: 0).lower().compile(compiler_options={name: value})
            known[name] = value
    return known


needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed: NOTHING IS COMPILED (pip install collective-matmul[aot])",
)


def interpreted_here(backend: str) -> bool:
    """Whether a backend's kernels run here operation by operation."""
    module = backends.get(backend)
    return module.decomposes and module.interpreted(hardware.chip("cpu"))


def plans(*, interpreted: bool = False) -> list[tuple[str | None, str | None]]:
    """Every (backend, algorithm) there is: the files of both folders; a plain backend has None.

    Those whose kernels are interpreted here, or the others: they take a hundred times as long.
    """
    return [
        (backend, algorithm)
        for backend in backends.names()
        if interpreted_here(backend) == interpreted
        for algorithm in (algorithms.names() if backends.get(backend).decomposes else (None,))
    ]


def lanes_plans() -> list[tuple[str, str]]:
    """The plans that decompose, without those whose kernels are interpreted."""
    return [(backend, algorithm) for backend, algorithm in plans() if algorithm is not None]


def plan_id(plan: tuple[str | None, str | None]) -> str:
    return "-".join(name or "plain" for name in plan) if plan != (None, None) else "chosen"


@dataclasses.dataclass(frozen=True)
class Case:
    """One call: `sizes` of the letters, of which `letter` (of `mode`) is the size of one shard."""

    spec: str | tuple[str, ...]
    mode: str
    letter: str
    sizes: dict[str, int]
    dtype: str = "float32"
    tuples: tuple[bool, bool] = (False, False)  # lhs, rhs are tuples
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def specs(self) -> tuple[str, ...]:
        return (self.spec,) if isinstance(self.spec, str) else self.spec

    def __str__(self) -> str:
        shape = ",".join(f"{letter}={size}" for letter, size in self.sizes.items())
        given = "".join(f", {key}={value}" for key, value in self.options.items())
        kinds = "".join(" tuple" if tuple_ else "" for tuple_ in self.tuples)
        return f"{self.spec} {self.mode}={self.letter} {shape} {self.dtype}{kinds}{given}"

    def operands(self, t: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Left and right operands, `[t, ...]`: one local array for every device.

        They depend on the form alone: cases that differ in their options have the same.
        """
        form = f"{self.spec} {self.mode} {self.letter} {self.sizes} {self.dtype}"
        rng = np.random.default_rng(zlib.crc32(form.encode()))
        sides = []
        for side, name in enumerate(("gather_lhs", "gather_rhs")):
            texts = [spec.split("->")[0].split(",")[side] for spec in self.specs]
            if not self.tuples[side]:
                texts = texts[:1]
            sides.append([self._array(rng, text, self.mode == name, t) for text in texts])
        return sides[0], sides[1]

    def _array(self, rng, letters, moved, t):
        shape = [
            self.sizes[letter] * (t if letter == self.letter and not moved else 1)
            for letter in letters
        ]
        return self.values(rng, (t, *shape)).astype(jnp.dtype(self.dtype))

    def values(self, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        """Small integers: every product and every sum of them is exact in every dtype."""
        largest = 11 if self.dtype.startswith(("int", "uint")) else 2
        least = 0 if self.dtype.startswith("uint") else -largest
        return rng.integers(least, largest, size=shape, endpoint=True)

    def call(self, lhs: list, rhs: list, axis_name: Any, **named: Any) -> Any:
        """The call on one device's arrays."""
        return cm.collective_einsum(
            self.spec,
            tuple(lhs) if self.tuples[0] else lhs[0],
            tuple(rhs) if self.tuples[1] else rhs[0],
            axis_name,
            **{self.mode: self.letter},
            **self.options,
            **named,
        )

    def expected(self, lhs: list[np.ndarray], rhs: list[np.ndarray], t: int) -> list[np.ndarray]:
        """What every device must hold, `[t, ...]`, one array a result."""
        exact = np.int64 if jnp.issubdtype(jnp.dtype(self.dtype), jnp.integer) else np.float64
        lhs, rhs = ([x.astype(exact) for x in side] for side in (lhs, rhs))
        return self.on_one_device(np, lhs, rhs, t)

    def on_one_device(self, xp: Any, lhs: list, rhs: list, t: int) -> list:
        """The same by plain einsums of numpy or jax.numpy, all devices' arrays side by side."""
        n = len(self.specs) if any(self.tuples) else 1
        if any(self.tuples) and len(self.specs) == 1:
            n = max(len(lhs), len(rhs))
        left, right = (
            side if is_tuple else side * n
            for side, is_tuple in zip((lhs, rhs), self.tuples, strict=True)
        )
        specs = self.specs * (n // len(self.specs))
        results = []
        for spec, a, b in zip(specs, left, right, strict=True):
            letters = spec.split("->")[0].split(",")
            if self.mode == "gather_lhs":
                a = gathered(xp, a, letters[0].index(self.letter))
            if self.mode == "gather_rhs":
                b = gathered(xp, b, letters[1].index(self.letter))
            results.append(xp.stack([xp.einsum(spec, a[i], b[i]) for i in range(t)]))
        if self.mode != "scatter":
            return results
        dim = self.specs[0].split("->")[1].index(self.letter)
        return [xp.stack(xp.split(sum(results).sum(0), t, axis=dim))]


def gathered(xp: Any, shards: Any, dim: int) -> Any:
    """`[t, ...]` of shards -> `[t, ...]` of the whole, the same for every device."""
    whole = xp.concatenate(list(shards), axis=dim)
    return xp.stack([whole] * len(shards))


def mapped(mesh, axes, cases: list[Case], backend, algorithm, refused=None):
    """A function of the cases' operands, `[t, ...]` each, that gives their results by case.

    Runs on every device of `axes`, all axes of the mesh. A case that is refused is left out, and
    the reason noted in `refused`.
    """
    axis_name = axes[0] if len(axes) == 1 else axes

    def body(operands):
        results = {}
        for case, (lhs, rhs) in zip(cases, operands, strict=True):
            lhs, rhs = ([x[0] for x in side] for side in (lhs, rhs))
            try:
                y = case.call(lhs, rhs, axis_name, backend=backend, algorithm=algorithm)
            except NotImplementedError as reason:
                if refused is None:
                    raise
                refused[str(case)] = str(reason)
                continue
            results[str(case)] = [x[None] for x in (y if isinstance(y, tuple) else (y,))]
        return results

    everywhere = P(axes)
    return jax.shard_map(body, mesh=mesh, in_specs=(everywhere,), out_specs=everywhere)


def run_cases(mesh, axes, cases: list[Case], backend, algorithm) -> tuple[dict, dict]:
    """Runs the cases in one compiled program.

    Returns:
      The results by case, each a list of `[t, ...]` arrays; and by case why it was refused.
    """
    if backend is not None and interpreted_here(backend) and len(cases) > 1:
        # Interpreted kernels wait for one another, and devices may take them in any order.
        apart = [run_cases(mesh, axes, [each], backend, algorithm) for each in cases]
        return tuple(
            {k: v for each in part for k, v in each.items()} for part in zip(*apart, strict=True)
        )
    t = math.prod(mesh.shape[name] for name in axes)
    operands = [case.operands(t) for case in cases]
    refused: dict[str, str] = {}
    function = mapped(mesh, axes, cases, backend, algorithm, refused)
    run = jax.jit(function).lower(operands).compile(compiler_options=quick())
    return jax.tree.map(np.asarray, run(operands)), refused


# Whatever the version of jax calls them: psum2, psum_invariant, all_gather_reduced, ...
PLAIN = "psum all_gather reduce_scatter all_to_all pmax pmin pbroadcast pgather"


def equations(jaxpr):
    """Every equation of a jaxpr and of the jaxprs within it."""
    for equation in (jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr).eqns:
        yield equation
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: isinstance(x, (Jaxpr, ClosedJaxpr))
        ):
            if isinstance(value, (Jaxpr, ClosedJaxpr)):
                yield from equations(value)


def named(function, *operands):
    """Equations by the names of their primitives."""
    found = {}
    for equation in equations(jax.make_jaxpr(function)(*operands)):
        found.setdefault(equation.primitive.name, []).append(equation)
    return found


def collectives(found):
    """The names of the plain collectives among them."""
    return sorted(name for name in found if name.startswith(tuple(PLAIN.split())))


def permutes(found):
    """The hops among them."""
    return found.get("ppermute", [])
