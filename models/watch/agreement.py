"""All processes run the same thing, or the run does not start.

Processes that compile different programs hang in their first collective, or worse, do not. So
before that, each publishes what it is about to run as named texts: the fields of its config, the
hashes of its source files, its versions, its flags; and later the hash of the program that it
lowered. Process 0 compares hashes, and asks for the texts of those that differ alone, so that the
cost does not grow with what is compared: one hash of each process, and one verdict for all.
"""

from __future__ import annotations

import base64
import collections
import hashlib
import itertools
import json
import os
import pathlib
import platform
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jaxlib.version
import numpy as np

from models.watch import status, store

Facts = dict[str, str]

SHOWN = 5  # differing processes, and facts of each, that the error names
OWN = ("watch.process",)  # fields that differ from one process to the next in every run
FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")  # and everything that starts with JAX_, but for:
PLACES = (
    "JAX_PROCESS_ID",
    "JAX_LOCAL_DEVICE_IDS",
    "JAX_COORDINATOR_ADDRESS",  # localhost for the first one, a name for the others
    "JAX_COORDINATOR_BIND_ADDRESS",
)

_numbers = itertools.count()


def check(facts: Mapping[str, str], seconds: float = 300.0, topic: str = "start") -> None:
    """Compares what this process runs with what the others do. All of them call it.

    Args:
      facts: texts by name. Nothing is compared where this process is alone.
      seconds: to wait for the others.
      topic: what is compared, for the message.

    Raises:
      Fault: in all processes, if one has other facts: names its rank and each fact, with both
        values; or if a process does not come in time.
    """
    others = store.connected()
    if others is not None:
        compare(facts, others, store.rank(), store.processes(), seconds, topic)


def compare(
    facts: Mapping[str, str],
    others: store.Store,
    rank: int,
    processes: int,
    seconds: float,
    topic: str = "start",
    number: int | None = None,
) -> None:
    """`check` among the processes of a store.

    Args:
      facts, seconds, topic: as of `check`.
      others: the store.
      rank, processes: which process this is, and how many there are.
      number: of this comparison, the same in all processes; None counts.

    Raises:
      Fault: as `check`.
    """
    # A process may train twice: the second run has names of its own.
    folder = f"agreement/{next(_numbers) if number is None else number}"
    text = json.dumps(dict(sorted(facts.items())))
    digest = hashlib.sha256(text.encode()).hexdigest()
    others.put(f"{folder}/facts/{rank}", base64.b64encode(zlib.compress(text.encode())).decode())
    others.put(f"{folder}/hash/{rank}", digest)
    if rank == 0:
        try:
            verdict = _verdict(others, folder, processes, seconds)
        except TimeoutError as error:
            verdict = str(error)
        others.put(f"{folder}/verdict", verdict or "agreed")
    try:
        # Process 0 waits for the others as long, and then needs a moment.
        verdict = others.get(f"{folder}/verdict", seconds + 10)
    except TimeoutError as error:
        raise status.Fault(
            f"process 0 did not compare the {topic} of the processes within {seconds:g} s",
            status.PEER_LOST,
        ) from error
    if verdict not in ("", "agreed"):
        lost = verdict.startswith("no answer")
        raise status.Fault(
            f"the processes do not agree on the {topic}: {verdict}",
            status.PEER_LOST if lost else status.DISAGREES,
        )


def _verdict(others: store.Store, folder: str, processes: int, seconds: float) -> str:
    """What differs in which process, or an empty text."""
    hashes = []
    for rank in range(processes):
        try:
            hashes.append(others.get(f"{folder}/hash/{rank}", seconds))
        except TimeoutError:
            return f"no answer from process {rank} of {processes} within {seconds:g} s"
    common = collections.Counter(hashes).most_common(1)[0][0]  # of equally many, the first's
    odd = [rank for rank, found in enumerate(hashes) if found != common]
    if not odd:
        return ""
    usual = _facts(others, folder, hashes.index(common))
    parts = [
        f"process {rank} has {difference(usual, _facts(others, folder, rank))}"
        for rank in odd[:SHOWN]
    ]
    if len(odd) > SHOWN:
        parts.append(f"{len(odd) - SHOWN} more of {processes} processes differ")
    return "; ".join(parts) + f" (compared with process {hashes.index(common)})"


def _facts(others: store.Store, folder: str, rank: int) -> Facts:
    packed = others.get(f"{folder}/facts/{rank}", 30.0)
    facts: Facts = json.loads(zlib.decompress(base64.b64decode(packed)))
    return facts


def difference(usual: Mapping[str, str], found: Mapping[str, str]) -> str:
    """The facts that differ: `config.batch 32 instead of 16, code.models/vit.py missing`."""
    names = [name for name in sorted({*usual, *found}) if usual.get(name) != found.get(name)]
    parts = []
    for name in names[:SHOWN]:
        if name not in found:
            parts.append(f"no {name}")
        elif name not in usual:
            parts.append(f"{name} {found[name]}, which is not elsewhere")
        else:
            parts.append(f"{name} {found[name]} instead of {usual[name]}")
    if len(names) > SHOWN:
        parts.append(f"{len(names) - SHOWN} more differences")
    return ", ".join(parts)


def settings(fields: Mapping[str, object]) -> Facts:
    """What a run was asked for: its config, the versions that it runs with, and flags.

    Args:
      fields: of the config, by name: {"optim.lr": 0.1}.
    """
    flags = {
        f"flag.{name}": value
        for name, value in os.environ.items()
        if name in FLAGS or (name.startswith("JAX_") and name not in PLACES)
    }
    versions = {
        "version.python": platform.python_version(),
        "version.jax": jax.__version__,
        "version.jaxlib": jaxlib.version.__version__,
        "version.numpy": np.__version__,
    }
    config = {f"config.{name}": str(value) for name, value in fields.items() if name not in OWN}
    return config | versions | flags


def program(lowered: Any) -> Facts:
    """A lowered program as a fact.

    Args:
      lowered: what `jax.jit(f).lower(...)` gives.
    """
    text = lowered.as_text()
    return {"program": f"{hashlib.sha256(text.encode()).hexdigest()[:16]} of {len(text)} letters"}


def code() -> Facts:
    """The hash of every source file of models and collective_matmul, committed or not."""
    import collective_matmul

    folders = [pathlib.Path(__file__).parents[1], *map(pathlib.Path, collective_matmul.__path__)]
    return {
        f"code.{folder.name}/{path.relative_to(folder).as_posix()}": hashlib.sha256(
            path.read_bytes()
        ).hexdigest()[:16]
        for folder in folders
        for path in sorted(folder.rglob("*.py"))
    }
