"""Draws docs/overlap.png: one device's time in a gather matmul, plain and by lanes, as predicted.

python docs/figure.py
"""

from __future__ import annotations

import pathlib

import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.pyplot as plt

from collective_matmul import explain
from collective_matmul.cost import Estimate
from collective_matmul.lanes import rounds

COMPUTE, WIRE = "#2b6cb0", "#dd6b20"
TOKENS, WIDTH, HIDDEN, T = 2048, 6144, 7 * 6144, 8  # ViT-22B: queries, keys, values and MLP at once


def main() -> None:
    """Draws the bars of the plain collective, the ring and two_way, over one another."""
    matplotlib.use("agg")
    lhs = jax.ShapeDtypeStruct((TOKENS // T, WIDTH), jnp.bfloat16)
    rhs = jax.ShapeDtypeStruct((WIDTH, HIDDEN // T), jnp.bfloat16)
    told = explain("mk,kn->mn", lhs, rhs, axis_size=T, chip="v4", gather_lhs="m")
    options = {x.plan.algorithm or "plain": x for x in (told.chosen, *told.alternatives)}
    names = ["plain", "ring", "two_way"]
    figure, axes = plt.subplots(figsize=(9, 2.9), layout="constrained")
    for row, name in enumerate(names):
        hops, products = _bars(options[name])
        axes.broken_barh(hops, (-row + 0.02, 0.26), color=WIRE, edgecolor="white")
        axes.broken_barh(products, (-row - 0.30, 0.30), color=COMPUTE, edgecolor="white")
        end = products[-1][0] + products[-1][1]
        axes.text(end + 6, -row - 0.15, f"{end:.0f} us", va="center", fontsize=10)
    labels = ["all-gather, then multiply", "ring", "two_way"]
    axes.set_yticks([-row for row in range(3)], labels, fontsize=10)
    axes.set_xlim(0, 1.12 * max(sum(_bars(options[name])[1][-1]) for name in names))
    axes.set_xlabel("microseconds on one TPU v4, predicted by the cost model")
    axes.set_title(
        f"ViT-22B, into the block: [{TOKENS}, {WIDTH}] x [{WIDTH}, {HIDDEN}] over tensor={T}",
        fontsize=11,
        loc="left",
    )
    for color, label in ((WIRE, "a shard travels"), (COMPUTE, "a shard is multiplied")):
        axes.barh([0], [0], color=color, label=label)
    axes.legend(loc="lower right", frameon=False, fontsize=9)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False)
    figure.savefig(pathlib.Path(__file__).parent / "overlap.png", dpi=130)


def _bars(option: Estimate) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """`(start, length)` in us of every hop and of every product, each as early as it can be."""
    if not option.plan.lanes:
        wire, compute = option.wire * 1e6, option.compute * 1e6
        return [(0.0, wire)], [(wire, compute)]
    hop, product = option.wire * 1e6 / option.steps, option.compute * 1e6 / T
    hops, products, free = [], [(0.0, product)], product
    for number, moving in rounds(option.plan.lanes):
        hops.append(((number - 1) * hop, hop))
        for _ in moving:
            start = max(free, number * hop)
            products.append((start, product))
            free = start + product
    return hops, products


if __name__ == "__main__":
    main()
