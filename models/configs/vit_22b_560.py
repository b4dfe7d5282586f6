"""Fine-tunes ViT-22B on ImageNet-1k at 560 pixels, 40 x 40 patches: `vit_22b_384`, but larger.

The resolution is one of those at which the paper compares ViT-22B with people (model-vs-human);
the recipe is that of `vit_22b_384`, and rests on as little.

    python -m models.train vit_22b_560

Expected: no public source states what ViT-22B itself reaches so. Not run by us.

Cost: 2.24e+21 FLOPs of the model (predicted: counted from the jaxpr, not measured).
"""

import dataclasses
import pathlib

from models.configs import vit_22b_384

CONFIG = dataclasses.replace(
    vit_22b_384.CONFIG,
    model=dataclasses.replace(vit_22b_384.CONFIG.model, image_size=560),
    out=pathlib.Path("runs/vit_22b_560"),
)
