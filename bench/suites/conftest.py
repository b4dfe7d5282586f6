"""The clock of the suites: the plain collective runs before each round of what is timed."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import jax
import pytest

from bench.measured.bounds import Bound
from bench.measured.timing import once
from bench.work import Work

ROUNDS, QUICK_ROUNDS, WARMUP = 20, 5, 2


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--quick`: fewer sizes and rounds."""
    parser.addoption("--quick", action="store_true", help="fewer sizes and rounds")


@pytest.fixture
def timed(benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., None]:
    """`timed(row, ours, plain, ...)`: times `ours()`, and `plain()` by turns with it.

    What is beside the times goes to `benchmark.extra_info`, where `bench.commands.measure` finds
    it: `row` says what ran; `plain` seconds; `bound` seconds or None; `flops` of all devices.
    """
    rounds = QUICK_ROUNDS if request.config.getoption("quick") else ROUNDS

    def run(
        row: dict[str, Any],
        ours: Callable[[], Any],
        plain: Callable[[], Any],
        *,
        work: Work,
        bound: Bound | None,
        devices: int,
        dtype: str,
    ) -> None:
        taken: list[float] = []

        def before() -> None:
            taken.append(once(plain, jax.block_until_ready))

        benchmark.pedantic(
            lambda: jax.block_until_ready(ours()),
            setup=before,
            rounds=rounds,
            warmup_rounds=WARMUP,
        )
        benchmark.extra_info.update(
            row=row,
            plain=statistics.median(taken[-rounds:]),
            bound=bound.seconds if bound else None,
            flops=work.flops,
            kind=work.kind,
            convention=work.convention,
            devices=devices,
            dtype=dtype,
        )

    return run
