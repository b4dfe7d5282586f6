"""Fine-tunes ViT-B/16 of `b16` on ImageNet-1k at 560 pixels: `b16_384` with 35 x 35 patches.

Source: as `b16_384`; the resolution is the largest that the evaluations of ViT-22B use.

    python -m models.train b16_560

Expected: the source states no number at this resolution. Not run by us.

Cost: 8.14e+18 FLOPs of the model (predicted: counted from the jaxpr, not measured).
"""

import dataclasses
import pathlib

from models.configs import b16_384

CONFIG = dataclasses.replace(
    b16_384.CONFIG,
    model=dataclasses.replace(b16_384.CONFIG.model, image_size=560),
    out=pathlib.Path("runs/b16_560"),
)
