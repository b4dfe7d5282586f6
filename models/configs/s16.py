"""ViT-S/16 on ImageNet-1k in 90 epochs, by the plain recipe of Beyer et al. 2022.

Source: arXiv 2205.01580; google-research/big_vision `configs/vit_s16_i1k.py`: Adam at 1e-3 with
10,000 steps of warm-up and a cosine to 0, decay of 1e-4 that is not multiplied by the learning rate
(0.1 where it is, as here), clipping at 1, batch 1024, MixUp 0.2, softmax, mean pooling. Not as
there: RandAugment, and position embeddings that are fixed sines. These are learned ones.

    python -m models.data.pack imagenet/train data/imagenet/train
    python -m models.data.pack imagenet/val data/imagenet/val
    python -m models.train s16

Expected: the source reports 76.5% of the validation images, with RandAugment. Not run by us.

Cost: 3.13e+18 FLOPs of the model (predicted: counted from the jaxpr, not measured).
"""

import pathlib

from models.checkpoint import Checkpoints
from models.config import Config
from models.data import Augment, Data
from models.optim import Optim
from models.vit import variant

IMAGES = 1_268_355  # 99% of the 1,281,167, as the source takes them

CONFIG = Config(
    model=variant("S/16", pool="gap"),
    optim=Optim(
        lr=1e-3, warmup=10_000, schedule="cosine", cooldown=0, decay_body=0.1, decay_head=0.1
    ),
    steps=90 * IMAGES // 1024,
    batch=1024,
    data=Data(
        source="records",
        path=pathlib.Path("data/imagenet/train"),
        test_path=pathlib.Path("data/imagenet/val"),
        augment=Augment(crop=True, flip=True),
        mixup=0.2,
        workers=8,
    ),
    loss="softmax",
    mesh=(8, 1, 1),
    evaluate=2500,
    checkpoint=Checkpoints(every=1000),
    out=pathlib.Path("runs/s16"),
)
