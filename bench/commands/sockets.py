"""Measures overlap in wall-clock time: two processes over a slow link of real sockets (root only).

    python -m bench sockets [--rate-mbit 800] [--chunks 1 2 4 8] [--rounds 9] [--json FILE]

Two network namespaces are joined by a veth pair whose rate `tc tbf` limits, one process runs in
each, on a core of its own, and XLA's CPU collectives (gloo) travel between them. It needs root on
Linux and iproute2, and takes the namespaces away whatever happens.
"""

from __future__ import annotations

import argparse
import pathlib
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from bench.commands import UserError
from bench.measured import sockets
from bench.measured.timing import Times
from bench.record import Record
from bench.tables import markdown

# m, k, n. What travels to a device is 4 MiB either way: [m/2, k] or [m/2, n] of float32.
SIZES = {"gather of rows": (2048, 1024, 2048), "scatter of rows": (2048, 4096, 1024)}
ORDER = 60  # among the tables of the report
PATIENCE = 900.0  # seconds


def main(arguments: Sequence[str]) -> int:
    """Makes the link, times, prints the table and writes the JSON that was asked for."""
    parser = argparse.ArgumentParser("python -m bench sockets", description=__doc__)
    parser.add_argument("--rate-mbit", type=int, default=800, help="of the link, each way")
    parser.add_argument("--burst-kb", type=int, default=128, help="what the bucket lets through")
    parser.add_argument("--chunks", type=int, nargs="+", default=[1, 2, 4, 8], metavar="N")
    parser.add_argument("--rounds", type=int, default=9, help="of which the median is taken")
    parser.add_argument(
        "--nice", type=int, default=0, help="of the processes; negative: before other programs"
    )
    parser.add_argument("--shrink", type=int, default=1, help="divides every size, for a trial")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="where to write a record")
    asked = parser.parse_args(arguments)
    sizes = {name: [x // asked.shrink for x in mkn] for name, mkn in SIZES.items()}
    for chunks in asked.chunks:
        if any(m % (2 * chunks) for m, _, _ in sizes.values()):
            raise UserError(f"--chunks {chunks} does not cut the rows of {sizes} on two devices")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the link is taken away
    request = {
        "products": sizes,
        "chunks": asked.chunks,
        "rounds": asked.rounds,
        "nice": asked.nice,
    }
    try:
        with (
            tempfile.TemporaryDirectory() as folder,
            sockets.link(rate_mbit=asked.rate_mbit, burst_kb=asked.burst_kb) as names,
        ):
            both = sockets.run_pair(names, request, pathlib.Path(folder), patience=PATIENCE)
    except sockets.UnavailableError as reason:
        raise UserError(f"{reason}. Without it there is no link to measure on.") from reason
    result = result_of(both, rate_mbit=asked.rate_mbit, burst_kb=asked.burst_kb, nice=asked.nice)
    print(markdown(result["rows"]), *result["remarks"], sep="\n")
    if asked.json:
        Record("measured", "sockets", "cpu", result).save(asked.json)
    return 0


def hidden(travel: float, products: float, overlapped: float) -> float:
    """`(travel + products - overlapped) / min(travel, products)`: what of the shorter was hidden.

    0 where one waits for the other, 1 where the shorter passes under the longer; noise can put it
    outside of both.
    """
    return (travel + products - overlapped) / min(travel, products)


def result_of(
    both: Sequence[Sequence[Mapping[str, Any]]], *, rate_mbit: int, burst_kb: int, nice: int
) -> dict[str, Any]:
    """The table, from the rows of both processes; a round lasts until the later one is done."""
    rows = []
    for row, other in zip(*both, strict=True):
        times = [
            Times(tuple(map(max, row[key], other[key])))
            for key in ("travel", "products", "overlapped")
        ]
        travel, products, overlapped = (x.median for x in times)
        shares = Times(
            tuple(hidden(*seconds) for seconds in zip(*(x.seconds for x in times), strict=True))
        )
        rows.append(
            {
                "product": row["product"],
                "schedule": row["schedule"],
                "chunks": row["chunks"],
                "travel alone ms": 1e3 * travel,
                "products alone ms": 1e3 * products,
                "lower bound ms": 1e3 * max(travel, products),
                "overlapped ms": 1e3 * overlapped,
                "IQR ms": 1e3 * times[-1].spread,
                "hidden": hidden(travel, products, overlapped),
                "IQR of hidden": shares.spread,
            }
        )
    return {
        "title": "Overlap in wall-clock time, two processes over real sockets",
        "order": ORDER,
        "rows": rows,
        "remarks": [
            f"The link is a veth pair limited to {rate_mbit} Mbit/s each way (tc tbf, burst "
            f"{burst_kb} KiB); each process has one core, {sockets.THREADS} threads on it and "
            "XLA's CPU collectives over gloo. 4 MiB travel to each device.",
            "hidden = (travel + products - overlapped) / min(travel, products), of the medians: 0 "
            "where one waits for the other, 1 where the shorter passes under the longer. The lower "
            "bound is the slower of the two alone, in the same run.",
            "Algorithms that are the same schedule on two devices share a row. Chunks are separate "
            "calls, each of a slice; bidirectional halves each of them once more.",
            f"Medians of {len(both[0][0]['travel'])} rounds in which the three take turns. Other "
            f"programs used the two cores at the same time (niceness here {nice}), so the spread "
            "is large.",
        ],
    }
