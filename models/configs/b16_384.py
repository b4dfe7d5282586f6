"""Fine-tunes ViT-B/16 of `b16` on ImageNet-1k at 384 pixels; position embeddings are resampled.

Source: google-research/big_vision `configs/transfer.py`: momentum 0.9 at 0.03 with 500 steps of
warm-up and a cosine to 0, no decay, clipping at 1, batch 512, 20,000 steps, softmax, a classifier
that begins at 0. Not as there: a momentum in bfloat16.

    python -m models.train b16_384
    python -m models.train b16_384 --start.path B_16.npz

Expected: the source reports 83.27% for a B/32 of ImageNet-21k. Not run by us.

Cost: 3.40e+18 FLOPs of the model (predicted: counted from the jaxpr, not measured).
"""

import dataclasses
import pathlib

from models.checkpoint import Checkpoints
from models.config import Config
from models.configs import s16
from models.optim import Optim
from models.start import Start
from models.vit import variant

CONFIG = Config(
    model=variant("B/16", image_size=384, pool="gap", remat="products"),
    optim=Optim(
        lr=0.03,
        warmup=500,
        schedule="cosine",
        cooldown=0,
        name="momentum",
        b1=0.9,
        decay_body=0.0,
        decay_head=0.0,
    ),
    steps=20_000,
    batch=512,
    data=dataclasses.replace(s16.CONFIG.data, mixup=0.0),
    loss="softmax",
    start=Start(path=pathlib.Path("runs/b16/weights.safetensors")),
    mesh=(32, 1, 1),
    evaluate=1000,
    checkpoint=Checkpoints(every=1000),
    out=pathlib.Path("runs/b16_384"),
)
