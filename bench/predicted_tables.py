"""Tables and plots of the records that `predict` and `predict-op` leave, one row a schedule.

Such a record holds whole predictions: of one program ("prediction"), of several ways ("rows"), or
of several ways at several batches ("batches"). What is no prediction has no table here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from collective_matmul import hardware

GIB = 2.0**30
TOKENS, MFU = "tokens per chip", "MFU %"
INTENSITY, RATE = "FLOP per HBM byte", "TFLOP/s"
DRAWN = 8  # of the costliest instructions of a schedule, in a roofline

Found = Mapping[str, Any]  # a Prediction, or a failure, as JSON


def tables(record_result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The tables of a record of predictions, with their plots; [] for any other record."""
    if "batches" in record_result:
        return _sweep(record_result["batches"])
    found = record_result.get("rows") or [record_result.get("prediction")]
    if not all(isinstance(x, Mapping) and _is_prediction(x) for x in found):
        return []
    ran = [x for x in found if x.get("seconds")]
    plots = [_roofline(ran)] if ran else []
    fastest = sorted(found, key=lambda x: x.get("seconds") or float("inf"))
    return [{"rows": [flat(x) for x in fastest], "plots": [x for x in plots if x["rows"]]}]


def flat(found: Found) -> dict[str, Any]:
    """One prediction as a row; times in us where the whole is below 10 ms."""
    row: dict[str, Any] = {"schedule": found["name"]}
    seconds, told = found.get("seconds"), found.get("overlap")
    if not seconds or not told:
        return row | {"note": _failure(found)}
    unit, factor = ("us", 1e6) if seconds < 1e-2 else ("ms", 1e3)
    mfu, least, used = found.get("mfu"), bound(found), found.get("hbm")
    return row | {
        f"step {unit}": factor * seconds,
        f"lower bound {unit}": None if least is None else factor * least,
        MFU: None if mfu is None else 100 * mfu,
        f"compute {unit}": factor * told["compute_seconds"],
        f"exposed {unit}": factor * told["exposed_seconds"],
        "hidden %": 100 * told["hidden_share"],
        "HBM GiB": None if used is None else used / GIB,
        "note": "; ".join(found.get("notes", ())),
    }


def bound(found: Found) -> float | None:
    """Seconds: the longer of the model FLOPs at the chips' peak, and a device's bytes at its links.

    The bytes are shared by all links of the chip, as if the mesh used every one of them.
    """
    chip = hardware.chip(found["chip"])
    peak = hardware.peak(chip, found["dtype"])
    if peak is None:
        return None
    links = chip.links * chip.link_bandwidth / chip.devices_per_chip
    compute = found["model_work"]["flops"] / (found["devices"] * peak)
    return float(max(compute, found["overlap"]["wire_bytes"] / links))


def _sweep(batches: Mapping[str, Sequence[Found]]) -> list[dict[str, Any]]:
    rows = []
    for images, ways in batches.items():
        for way in ways:
            row = {"images": int(images), TOKENS: way.get("tokens_per_chip")} | flat(way)
            rows.append({name: value for name, value in row.items() if name != "hidden %"})
    told = [row for row in rows if row.get(MFU) is not None]
    plot = {
        "kind": "lines",
        "name": "mfu-against-tokens",
        "title": "MFU against tokens per chip",
        "x": TOKENS,
        "y": MFU,
        "by": "schedule",
        "log": True,
        "rows": told,
    }
    return [{"rows": rows, "plots": [plot] if told else []}]


def _roofline(ways: Sequence[Found]) -> dict[str, Any]:
    """The costliest instructions with products: FLOPs of a byte of memory, and FLOP/s."""
    chip, rows = hardware.chip(ways[0]["chip"]), []
    for found in ways:
        told = found.get("overlap") or {}
        ops = [op for op in told.get("ops", ()) if op["flops"] and op["hbm_share"]]
        for op in ops[:DRAWN]:
            moved = op["hbm_share"] * chip.hbm_bandwidth * op["seconds"]
            rate = op["flops"] / op["seconds"] / 1e12
            rows.append({"schedule": found["name"], INTENSITY: op["flops"] / moved, RATE: rate})
    return {
        "kind": "roofline",
        "name": "roofline",
        "title": f"The costliest products of each schedule on {chip.name}",
        "x": INTENSITY,
        "y": RATE,
        "by": "schedule",
        "peak": (hardware.peak(chip, ways[0]["dtype"]) or 0.0) / 1e12,
        "bandwidth": chip.hbm_bandwidth / 1e9,
        "rows": rows,
    }


def _is_prediction(found: Mapping[str, Any]) -> bool:
    return "name" in found and ("overlap" in found or "failure" in found)


def _failure(found: Found) -> str:
    memory = found.get("out_of_memory")
    if memory:
        used, limit = memory["used"] / GIB, memory["limit"] / GIB
        return f"out of memory: needs {used:.1f} GiB of {limit:.1f} GiB"
    return f"failed: {found.get('failure')}"
