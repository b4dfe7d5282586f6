"""ViT-22B, by the recipe of Dehghani et al. 2023 (arXiv 2302.05442) as far as it is public.

    python -m models.train vit_22b --dry-run v4:8x8x16
    python -m models.train vit_22b --data.path SHARDS --model.num-classes CLASSES

Of public sources:

- 177,000 steps of 65 thousand images (here 65,536), some 3 epochs of 4 billion: third parties'
  notes on the paper.
- A sigmoid for each of about 30,000 labels, their hierarchy flattened: the authors' slides. 29,593
  classes: google-research/vmoe, the JFT-4B configs.
- Adam with 0.9 and 0.999, clipping at 1.0, decay 3.0 in the head, 0.03 in the body, none of norms
  and biases; peak 1e-3, 10,000 steps of warm-up, 1 / sqrt with timescale 10,000, 50,000 steps of
  cooldown: vmoe `get_optimizer_rsqrt_config`, "as in the ViT 22b paper". The paper may
  have had a cooldown of 30,000: a recollection, not checked.
- Biases of the classifier that begin at -10, 224 pixels, inception crop, flip: google-research/
  big_vision, the config of ViT-g on JFT-3B.
- Features cut over the tensor axis: the authors' slides and blog post. Rows are cut here, by which
  weights can be fetched a layer ahead; `--layout features` is the paper's way, to the same numbers,
  in steps of 11.6 s.

Not public, and so chosen here: the mesh (16 data x 16 fsdp x 4 tensor, on the paper's 1,024 TPU v4
chips), four parts of 16,384 images, bfloat16 activations with float32 parameters, and what a
step keeps in memory. JFT-4B is not public either: bring shards with labels of your own.

Expected: linear probes of 89.51% on ImageNet, 74.30% on ObjectNet (the authors' slides). Not run by
us. The dry run on v4:8x8x16 predicts steps of 10.2 s, an MFU of 76.9% and 28.6 of 32 GiB a chip;
the paper reports an MFU of 54.9%.

Cost: 3.92e+23 FLOPs of the model (predicted: counted from the jaxpr, not measured). At the paper's
54.9% of 1,024 x 275 TFLOP/s that is 29.3 days.
"""

import pathlib

from models.checkpoint import Checkpoints
from models.config import Config
from models.data import Augment, Data
from models.guard import Guard
from models.optim import Optim
from models.vit import variant

CONFIG = Config(
    model=variant("22B/14", num_classes=29_593, head_bias=-10.0, remat="products"),
    optim=Optim(
        lr=1e-3,
        warmup=10_000,
        timescale=10_000,
        cooldown=50_000,
        b1=0.9,
        b2=0.999,
        clip=1.0,
        decay_body=0.03,
        decay_head=3.0,
        accumulate=4,
    ),
    steps=177_000,
    batch=65_536,
    data=Data(
        source="records",
        path=pathlib.Path("data/labelled"),
        held_out=10_000,
        augment=Augment(crop=True, flip=True),
        workers=16,
    ),
    loss="sigmoid",
    guard=Guard(patience=5, rollbacks=10, skip_batches=200),
    statistics=100,
    mesh=(16, 16, 4),
    layout="rows",
    algorithm="two_way",
    backend="xla",
    evaluate=1000,
    checkpoint=Checkpoints(every=500, keep_every=10_000),
    out=pathlib.Path("runs/vit_22b"),
)
