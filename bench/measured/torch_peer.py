"""The same models by PyTorch and timm: one process of `python -m bench gpu`.

    python -m bench.measured.torch_peer REQUEST OUT  (as JSON, and a file; see `gpu_cases.report`)

timm's `ParallelScalingBlock` is ViT-22B's block; its attention is torch's
`scaled_dot_product_attention`. Everything is compiled by `torch.compile`.
"""

from __future__ import annotations

import functools
import importlib
import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import torch

from bench.measured.gpu_cases import Case, report


def transformers() -> Any:
    """timm's module of vision transformers.

    timm imports torchvision, whose compiled half does not load beside another build of torch. Then
    its operators are declared: its import names them, and no transformer calls them.
    """
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        signature = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        torch.library.define("torchvision::nms", signature)
        torch.library.define("torchvision::qnms", signature)
    return importlib.import_module("timm.models.vision_transformer")


def module(case: Case) -> torch.nn.Module:
    """timm's model of a case, initialised by timm."""
    theirs, config = transformers(), case.config
    activation = functools.partial(torch.nn.GELU, approximate="tanh")
    if case.whole:
        return theirs.VisionTransformer(
            img_size=config.image_shape,
            patch_size=config.patch_size,
            in_chans=config.channels,
            num_classes=config.num_classes,
            embed_dim=config.width,
            depth=config.depth,
            num_heads=config.heads,
            mlp_ratio=config.mlp_dim / config.width,
            class_token=False,
            global_pool="map",
            act_layer=activation,
        )
    norm = functools.partial(importlib.import_module("timm.layers").RmsNorm, eps=config.epsilon)
    blocks = [
        theirs.ParallelScalingBlock(
            config.width,
            config.heads,
            mlp_ratio=config.mlp_dim / config.width,
            qkv_bias=False,
            qk_norm=True,
            act_layer=activation,
            norm_layer=norm,
        )
        for _ in range(config.depth)
    ]
    return torch.nn.Sequential(*blocks, norm(config.width))


def prepare(
    case: Case, backward: bool, *, device: str, compiled: bool
) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    """The pass on arrays of random numbers, compiled at its first call.

    The backward pass computes the gradients of all parameters, and those of a stack's input.
    """
    torch.compiler.reset()
    torch.manual_seed(0)
    with torch.device(device):
        model = module(case).to(torch.bfloat16)
    shape = case.shape
    if case.whole:
        shape = (shape[0], shape[3], *shape[1:3])  # channels come first
    x = torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=not case.whole)
    run = torch.compile(model) if compiled else model
    with torch.no_grad():
        dy = torch.randn_like(model(x))

    def forward() -> Any:
        with torch.no_grad():
            return run(x)

    def both() -> Any:
        model.zero_grad(set_to_none=True)
        x.grad = None
        y = run(x)
        y.backward(dy)
        return y

    def wait(_: Any) -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    return (both if backward else forward), wait


def main(request: dict[str, Any], out: pathlib.Path) -> None:
    """Times the case of the request.

    Raises:
      RuntimeError: if a GPU is asked for, and this torch sees none.
    """
    device = {"gpu": "cuda", "cpu": "cpu"}[request["device"]]
    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"torch {torch.__version__} sees no GPU")
    chip = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    ready = functools.partial(prepare, device=device, compiled=request["compile"])
    report(request, out, ready, chip)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), pathlib.Path(sys.argv[2]))
