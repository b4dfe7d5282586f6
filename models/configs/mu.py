"""The smallest ViT-22B on drawn textures of 32 x 32 pixels: it runs anywhere, in half a minute.

Parallel blocks, QK-norm and attention pooling of Dehghani et al. 2023 (arXiv 2302.05442), with the
shape of their recipe; nothing is downloaded. It is the run to try a change or a machine with:

    python -m models.train mu
    python -m models.train mu --mesh 2,2,2 --statistics 1

Expected: more than 99% of the 512 test images.

Cost: 1.54e+11 FLOPs of the model (predicted: counted from the jaxpr, not measured).
"""

import math
import pathlib

from models.config import Config
from models.data import Data
from models.optim import Optim
from models.vit import VIT_22B, variant

CONFIG = Config(
    model=variant(
        "mu/8",
        image_size=32,
        num_classes=10,
        parallel=True,
        style=VIT_22B,
        head_bias=-math.log(9),
        dtype="float32",
    ),
    optim=Optim(lr=3e-3, warmup=20, timescale=100, cooldown=100),
    steps=200,
    batch=64,
    data=Data(source="synthetic", samples=4096),
    evaluate=50,
    out=pathlib.Path("runs/mu"),
)
