"""ViT-g/14 by the recipe of Zhai et al. 2022, with several labels for an image.

Source: arXiv 2106.04560; google-research/big_vision `configs/proj/scaling_laws/train_vit_g.py`: a
sigmoid for each of 29,593 classes, biases that begin at -10, 1,000,000 steps of 16,384 images, peak
8e-4 after 10,000 steps, then 1 / sqrt with timescale 10,000 and 50,000 steps of cooldown, decay
0.03 and 100 times as much in the head, both multiplied by the learning rate, clipping at 1. Not as
there: Adam instead of their variant of Adafactor, whose moments take half the memory. JFT-3B is
not public: name a folder of shards with labels of your own.

    python -m models.train g14 --data.path SHARDS --model.num-classes CLASSES

Expected: linear probes of 88.51% on ImageNet (the authors' slides on ViT-22B). Not run by us.

Cost: 2.63e+22 FLOPs of the model (predicted: counted from the jaxpr, not measured).
"""

import pathlib

from models.checkpoint import Checkpoints
from models.config import Config
from models.data import Augment, Data
from models.optim import Optim
from models.vit import variant

CONFIG = Config(
    model=variant("g/14", num_classes=29_593, head_bias=-10.0, remat="products"),
    optim=Optim(lr=8e-4),
    steps=1_000_000,
    batch=16_384,
    data=Data(
        source="records",
        path=pathlib.Path("data/labelled"),
        held_out=10_000,
        augment=Augment(crop=True, flip=True),
        workers=8,
    ),
    mesh=(64, 8, 1),
    evaluate=10_000,
    checkpoint=Checkpoints(every=1000, keep_every=100_000),
    out=pathlib.Path("runs/g14"),
)
