"""Many ways to compute products, each predicted once, in two processes side by side.

A way is known by its program: what the compiler is given, as text. Predictions that are known by it
are not made again, so that after a change only those programs are compiled that it changed. One of
the two processes has the compiler write schedules (`schedules`): ways with a Pallas kernel go
there, and are compiled once instead of twice.
"""

from __future__ import annotations

import dataclasses
import hashlib
import multiprocessing
import os
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any

import jax

from bench import record
from bench.predicted import schedules
from bench.predicted.comparison import tried
from bench.predicted.operations import Product
from bench.predicted.prediction import Prediction
from bench.predicted.programs import Program
from bench.predicted.slices import compile_only, tpu_slice
from collective_matmul import make_mesh

_LETTERS = 16  # of a program's name, in hexadecimal


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to compute a product.

    Args:
      topology: the slice, as `tpu_slice` takes it.
      axis_size: devices that exchange shards.
      product: what is computed.
      algorithm, backend: as in `collective_einsum`; None, None is the cost model's choice.
      bare: every device has whole operands, and nothing moves.
      options: the compiler's, (name, value).
    """

    topology: str
    axis_size: int
    product: Product
    algorithm: str | None = None
    backend: str | None = None
    bare: bool = False
    options: tuple[tuple[str, Any], ...] = ()

    def program(self) -> Program:
        """The program.

        Raises:
          ValueError, NotImplementedError: as `Product.program`.
        """
        mesh = make_mesh(data=-1, tensor=self.axis_size, devices=tpu_slice(self.topology))
        if self.bare:
            return self.product.bare(mesh)
        return self.product.program(mesh, self.algorithm, self.backend)


@dataclasses.dataclass(frozen=True)
class Figures:
    """What a way is predicted to take on a device.

    Args:
      program: the name of the program: of its text, the slice and what compiles it.
      seconds: of a run, None if it does not compile.
      compute, exposed: seconds of them that compute, and that only wait for what travels.
      temporary: bytes of HBM beside arguments and results.
      failure: why it does not compile.
    """

    program: str
    seconds: float | None = None
    compute: float | None = None
    exposed: float | None = None
    temporary: int | None = None
    failure: str | None = None


class Predictor:
    """Predicts ways, within a `with`.

    Args:
      known: figures by the name of their program, which are not predicted again.
    """

    def __init__(self, known: Mapping[str, Figures]) -> None:
        self._plain, self._writing = (
            ProcessPoolExecutor(
                max_workers=1,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_begin,
                initargs=(dict(known), writes),
            )
            for writes in (False, True)
        )

    def __enter__(self) -> Predictor:
        return self

    def __exit__(self, *_: object) -> None:
        for pool in (self._plain, self._writing):
            pool.shutdown(cancel_futures=True)

    def submit(self, way: Way, kernel: bool) -> Future[Figures | None]:
        """Begins with a way.

        Args:
          way: to predict.
          kernel: whether Pallas kernels are expected in it; a wrong guess costs time alone.

        Returns:
          Will have its figures; None if this library does not compute the product that way.
        """
        return (self._writing if kernel else self._plain).submit(predicted, way)


_known: dict[str, Figures] = {}  # of this process


def _begin(known: dict[str, Figures], writes: bool) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _known.update(known)
    compile_only()
    # A kernel's text has the lines of source that it is from: with them any edit would rename it.
    jax.config.update("jax_include_full_tracebacks_in_locations", True)
    jax.config.update("jax_traceback_in_locations_limit", 0)
    if writes:
        schedules.ask()


def _end_with_parent() -> None:
    """A process that is killed tells its pool nothing, and this one would wait for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def predicted(way: Way) -> Figures | None:
    """The figures of a way, in this process; None if there is no such way."""
    try:
        program = way.program()
    except NotImplementedError:  # a kernel whose rows do not fit on the chip, for example
        return None
    name = _name(program, way)
    if name not in _known:
        _known[name] = _figures(name, tried(name, lambda: program, dict(way.options)))
    return _known[name]


def _name(program: Program, way: Way) -> str:
    text = program.traced.lower().as_text()
    told = f"{way.topology} {way.options} {record.versions()} {text}"
    return hashlib.sha256(told.encode()).hexdigest()[:_LETTERS]


def _figures(name: str, found: Any) -> Figures:
    if not isinstance(found, Prediction):
        return Figures(name, failure=found.reason)
    if found.report is None:
        return Figures(name, failure=str(found.out_of_memory or found.failure))
    report = found.report
    return Figures(
        name, report.seconds, report.compute_seconds, report.exposed_seconds, found.temporary
    )
