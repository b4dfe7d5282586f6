"""The small ViT-22B on handwritten digits: 8 x 8 pixels, ten classes, in a minute on two cores.

Parallel blocks, QK-norm, attention pooling and the shape of the recipe are those of Dehghani et al.
2023 (arXiv 2302.05442); its numbers are scaled to 1,437 images. Every linear layer that an image
passes through is a collective matmul by the ring, forward and backward. Algorithm and backend are
named because `None` lets the cost model choose, and for products as small as these it would choose
the plain collective.

    python -m models.train digits

Expected: 98% to 99.5% of the 360 test images, by the seed and by how the machine rounds.

Cost: 1.17e+12 FLOPs of the model (predicted: counted from the jaxpr, not measured).
"""

import math
import pathlib

from models.config import Config
from models.data import Augment, Data
from models.optim import Optim
from models.vit import VIT_22B, variant

CONFIG = Config(
    model=variant(
        "mu/2",
        image_size=8,
        channels=1,
        num_classes=10,
        parallel=True,
        style=VIT_22B,
        head_bias=-math.log(9),
        dtype="float32",
    ),
    optim=Optim(lr=6e-3, warmup=40, timescale=400, cooldown=400),
    steps=900,
    batch=120,
    data=Data(augment=Augment(pixels=1, share=0.5)),
    mesh=(2, 1, 4),
    algorithm="ring",
    backend="xla",
    out=pathlib.Path("runs/digits"),
)
