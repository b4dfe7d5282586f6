"""Every algorithm on every backend, in every mode, forward and with its gradient."""

from __future__ import annotations

from collections.abc import Callable

import jax
import pytest

from bench.plans import plan_name, plans
from bench.predicted.operations import MODES, Product
from bench.predicted.slices import chip_of
from bench.suites.operations import PLAIN, Problem, axis_sizes, program

# m, k, n of a device: a quarter of ViT-22B's MLP, for many tokens and for few; and small ones for
# simulated devices.
ON_ACCELERATORS = ((8192, 6144, 6144), (1024, 6144, 6144))
ON_CPUS = ((256, 128, 64), (64, 256, 128))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The problems that the devices give, each by every plan."""
    quick, on_cpu = metafunc.config.getoption("quick"), jax.default_backend() == "cpu"
    shapes, dtype = (ON_CPUS, "float32") if on_cpu else (ON_ACCELERATORS, "bfloat16")
    problems = [
        Problem(Product(mode, *sizes, dtype, grad), t)
        for t in axis_sizes(quick=quick)
        for sizes in (shapes[-1:] if quick else shapes)
        for mode in MODES
        for grad in (False, True)
    ]
    if not problems:
        alone = pytest.mark.skip(reason="one device: nothing travels; see `python -m bench gpu`")
        metafunc.parametrize("problem, plan", [pytest.param(None, None, marks=alone)])
        return
    metafunc.parametrize(
        "problem", problems, ids=lambda problem: "-".join(map(str, problem.row.values()))
    )
    metafunc.parametrize("plan", plans(chip_of(jax.devices())), ids=lambda plan: plan_name(*plan))


def test_operation(
    timed: Callable[..., None], problem: Problem, plan: tuple[str, str | None]
) -> None:
    """One plan for one problem, by turns with the plain collective."""
    try:
        ours = program(problem, *plan)
    except NotImplementedError as reason:
        pytest.skip(str(reason))
    timed(
        problem.row | {"schedule": plan_name(*plan)},
        ours,
        program(problem, *PLAIN),
        work=problem.work(),
        bound=problem.bound(),
        devices=problem.t,
        dtype=problem.product.dtype,
    )
