"""Fine-tunes ViT-22B on ImageNet-1k at 384 pixels; position embeddings are resampled.

How ViT-22B was fine-tuned is not public. This is the public recipe of `b16_384`, with the least
learning rate of those that google-research/big_vision `configs/transfer.py` tries. 384 pixels do
not split into patches of 14; a convolution without padding sees the first 378, 27 x 27 patches, and
so the images are made 378 pixels large.

    python -m models.train vit_22b_384

Expected: no public source states what ViT-22B itself reaches so. The slides have ViT-G/14 at 90.45%
and ViT-e/14 at 90.9% of ImageNet. Not run by us.

Cost: 9.97e+20 FLOPs of the model (predicted: counted from the jaxpr, not measured).
"""

import dataclasses
import pathlib

from models.configs import b16_384
from models.start import Start
from models.vit import variant

CONFIG = dataclasses.replace(
    b16_384.CONFIG,
    model=variant("22B/14", image_size=378, remat="full"),
    optim=dataclasses.replace(b16_384.CONFIG.optim, lr=0.001),
    start=Start(path=pathlib.Path("runs/vit_22b/weights.safetensors")),
    mesh=(16, 8, 4),
    layout="features",
    algorithm="two_way",
    backend="xla",
    out=pathlib.Path("runs/vit_22b_384"),
)
