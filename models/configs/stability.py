"""One run of the QK-norm experiment: a small ViT-22B at a learning rate at which norms decide.

Dehghani et al. 2023 (arXiv 2302.05442) put norms on queries and keys because models of 8 billion
parameters diverged: attention logits grew without limit, until every query looked at a single key.
Wortsman et al. 2023 (arXiv 2309.14322) saw the same in small models with high learning rates. Here
it is in 51 thousand parameters. `python -m models.stability` makes all runs of the sweep, with and
without the norms, over learning rates and seeds. One of them:

    python -m models.train stability
    python -m models.train stability --model.style.qk-norm None --out runs/unnormed

Expected: a training loss of 1.2 with the norms. Without, it falls to 1.7 in 130 steps and comes
back to 2.2 (2.3 is guessing), with attention logits of 20,000 and entropies of 0. docs/stability.md
has all of them.

Cost: 7.38e+10 FLOPs of the model (predicted: counted from the jaxpr, not measured).
"""

import dataclasses
import pathlib

from models.configs import digits
from models.optim import Optim
from models.vit import VIT_22B, variant

CONFIG = dataclasses.replace(
    digits.CONFIG,
    model=variant(
        "mu/2",
        width=32,
        depth=4,
        mlp_dim=128,
        heads=4,
        image_size=8,
        channels=1,
        num_classes=10,
        parallel=True,
        style=VIT_22B,
        pool="gap",  # what follows the pooling of "map" has no norm, and would diverge first
        dtype="float32",
    ),
    # The rate rises over most of the run, so that a model has learned something before it is lost.
    optim=Optim(lr=0.2, warmup=200, timescale=100_000, cooldown=0, decay_body=0.1, decay_head=0.1),
    loss="softmax",
    steps=300,
    batch=48,
    mesh=(1, 1, 1),
    algorithm=None,
    backend=None,
    statistics=1,
    out=pathlib.Path("runs/stability"),
)
