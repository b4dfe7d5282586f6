"""ViT-B/16 on ImageNet-21k in 300 epochs, by the recipe of Steiner et al. 2022.

Source: arXiv 2106.10270; google-research/big_vision `configs/vit_i21k.py`: sigmoid loss over 21,843
classes whose biases begin at -10, Adam at 1e-3 with 10,000 steps of warm-up and a cosine to 0,
decay of 1e-4 that is not multiplied by the learning rate (0.1 where it is, as here), clipping at 1,
batch 4096, MixUp 0.2, mean pooling. Not as there: RandAugment, and a first moment in bfloat16.

    python -m models.data.pack imagenet21k data/imagenet21k
    python -m models.train b16

Expected: the source states no number for this run. Not run by us.

Cost: 4.45e+20 FLOPs of the model (predicted: counted from the jaxpr, not measured).
"""

import pathlib

from models.checkpoint import Checkpoints
from models.config import Config
from models.data import Augment, Data
from models.optim import Optim
from models.vit import variant

IMAGES = 14_197_122 - 51_200  # all but those that the source tests with

CONFIG = Config(
    model=variant("B/16", pool="gap", num_classes=21_843, head_bias=-10.0, remat="products"),
    optim=Optim(
        lr=1e-3, warmup=10_000, schedule="cosine", cooldown=0, decay_body=0.1, decay_head=0.1
    ),
    steps=300 * IMAGES // 4096,
    batch=4096,
    data=Data(
        source="records",
        path=pathlib.Path("data/imagenet21k"),
        held_out=250,
        augment=Augment(crop=True, flip=True),
        mixup=0.2,
        workers=8,
    ),
    mesh=(32, 1, 1),
    evaluate=5000,
    checkpoint=Checkpoints(every=1000, keep_every=100_000),
    out=pathlib.Path("runs/b16"),
)
