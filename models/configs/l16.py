"""ViT-L/16 on ImageNet-21k in 300 epochs, by the recipe of Steiner et al. 2022.

Source: arXiv 2106.10270; google-research/big_vision `configs/vit_i21k.py:variant=L/16`: as `b16`,
with MixUp 0.5.

    python -m models.train l16

Expected: the source states no number for this run. Not run by us.

Cost: 1.56e+21 FLOPs of the model (predicted: counted from the jaxpr, not measured).
"""

import dataclasses
import pathlib

from models.configs import b16
from models.vit import variant

CONFIG = dataclasses.replace(
    b16.CONFIG,
    model=variant("L/16", pool="gap", num_classes=21_843, head_bias=-10.0, remat="products"),
    data=dataclasses.replace(b16.CONFIG.data, mixup=0.5),
    mesh=(64, 1, 1),
    out=pathlib.Path("runs/l16"),
)
