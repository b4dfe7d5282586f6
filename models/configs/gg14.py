"""ViT-G/14 by the recipe of Zhai et al. 2022: `g14` with another model.

Source: arXiv 2106.04560; google-research/big_vision `configs/proj/scaling_laws/train_vit_g.py`,
which says so. The file is not called G14, since some file systems take that for g14.

    python -m models.train gg14 --data.path SHARDS --model.num-classes CLASSES

Expected: linear probes of 88.98% on ImageNet (the authors' slides on ViT-22B). Not run by us.

Cost: 4.75e+22 FLOPs of the model (predicted: counted from the jaxpr, not measured).
"""

import dataclasses
import pathlib

from models.configs import g14
from models.vit import variant

CONFIG = dataclasses.replace(
    g14.CONFIG,
    model=variant("G/14", num_classes=29_593, head_bias=-10.0, remat="products"),
    mesh=(64, 16, 1),
    out=pathlib.Path("runs/gg14"),
)
