"""ViT-e/14 by the recipe of ViT-g: `g14` with another model.

Source: Chen et al. 2023, arXiv 2209.06794, for the model; 1,000,000 steps of 16,384 images by third
parties' notes on the ViT-22B paper; the rest is the recipe of ViT-g, as far as is public.

    python -m models.train e14 --data.path SHARDS --model.num-classes CLASSES

Expected: linear probes of 89.26% on ImageNet (the authors' slides on ViT-22B). Not run by us.

Cost: 9.72e+22 FLOPs of the model (predicted: counted from the jaxpr, not measured).
"""

import dataclasses
import pathlib

from models.configs import g14
from models.vit import variant

CONFIG = dataclasses.replace(
    g14.CONFIG,
    model=variant("e/14", num_classes=29_593, head_bias=-10.0, remat="products"),
    mesh=(64, 8, 2),
    out=pathlib.Path("runs/e14"),
)
