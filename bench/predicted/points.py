"""Published measurements of TPUs, as data: what was run, what it took, who says so.

Each point names a program of `reproductions` that compiles to what was measured. Where the
source leaves a detail out that the program needs, `inferred` says how it was chosen, and the
summary also counts without such points. A point with `excluded` cannot be rebuilt faithfully: it
is listed with the reason, and not counted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

_SECONDS = {"us": 1e-6, "ms": 1e-3}
_RATES = {"TFLOP/s": 1e12, "GB/s": 1e9}

RECIPES = "https://github.com/AI-Hypercomputer/tpu-recipes/blob/main/microbenchmarks"
SCALING_BOOK = "https://jax-ml.github.io/scaling-book/jax-stuff/"
MARIN = "https://github.com/marin-community/marin/issues/6736"
MAXTEXT_PR = "https://github.com/AI-Hypercomputer/maxtext/pull/534"
MAXTEXT_V4 = (
    "https://github.com/AI-Hypercomputer/maxtext/blob/main/src/maxtext/configs/tpu/v4/README.md"
)
TPU_INFERENCE = "https://github.com/vllm-project/tpu-inference/pull/703"
PALLAS = "https://docs.jax.dev/en/latest/pallas/tpu/matmul.html"
HELION = "https://github.com/pytorch/helion/pull/2632"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """One published measurement.

    Args:
      name: what was measured, in a few words.
      chip: name in `collective_matmul.hardware`.
      value: as published.
      unit: "us" or "ms"; or a rate, "TFLOP/s" or "GB/s", of one device unless `work` says else.
      work: FLOPs or bytes that a rate divides by the time.
      source: where it is published.
      topology: slice that it is compiled for.
      program: a function of `bench.predicted.reproductions`; "" if `excluded`.
      arguments: its keyword arguments.
      options: compiler options.
      repeats: how often the program does it.
      slow: compiling takes minutes.
      inferred: what the source leaves open, and how it was chosen.
      excluded: why the point is not counted.
    """

    name: str
    chip: str
    value: float
    unit: str
    work: float | None = None
    source: str
    topology: str = ""
    program: str = ""
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    options: Mapping[str, str] = dataclasses.field(default_factory=dict)
    repeats: int = 1
    slow: bool = False
    inferred: str = ""
    excluded: str = ""

    def __post_init__(self) -> None:
        if self.unit in _RATES and self.work is None:
            raise ValueError(f"{self.name}: a rate in {self.unit} needs the work it is a rate of")
        if self.unit not in _SECONDS and self.unit not in _RATES and not self.excluded:
            raise ValueError(f"{self.name}: {self.unit!r} is none of {[*_SECONDS, *_RATES]}")
        if bool(self.program) == bool(self.excluded):
            raise ValueError(f"{self.name}: give a program, or the reason why there is none")

    @property
    def seconds(self) -> float:
        """The published time."""
        if self.unit in _SECONDS:
            return self.value * _SECONDS[self.unit]
        assert self.work is not None
        return self.work / (self.value * _RATES[self.unit])


def _square(
    chip: str, topology: str, n: int, value: float, unit: str, source: str, **more: Any
) -> Point:
    """A product of two n x n matrices in bfloat16 on one device."""
    return Point(
        name=f"{n}^3 bf16 product",
        chip=chip,
        topology=topology,
        value=value,
        unit=unit,
        work=2.0 * n**3,
        source=source,
        program="product",
        arguments={"n": n},
        **more,
    )


def _ironwood(n: int, value: float) -> Point:
    return _square("7x", "7x:2x2x1", n, value, "TFLOP/s", f"{RECIPES}/ironwood/README.md")


def _gather(megabytes: float, value: float) -> Point:
    """All-gather over the 4 chips of 7x:2x2x1; the rate counts both devices of a chip."""
    rows = round(megabytes * 2**20 / 4096)
    return Point(
        name=f"all-gather of f32[{rows},8,128] over 4 chips",
        chip="7x",
        topology="7x:2x2x1",
        value=value,
        unit="GB/s",
        work=2 * 3 * rows * 4096.0,
        source=f"{RECIPES}/ironwood/collectives/all_gather.md",
        program="gather_over_chips",
        arguments={"rows": rows},
        inferred="the groups: devices of the same number on the 4 chips. The rate is that of the "
        "bytes that the two devices of a chip receive together.",
    )


def _copy(chip: str, topology: str, megabytes: int, value: float, source: str) -> Point:
    elements = megabytes * 2**19
    return Point(
        name=f"copy of {megabytes} MiB within HBM",
        chip=chip,
        topology=topology,
        value=value,
        unit="GB/s",
        work=2.0 * megabytes * 2**20,
        source=source,
        program="copy",
        arguments={"elements": elements},
    )


_REPEATS = 8  # of a permute


def _permute(chip: str, topology: str, kib: int, value: float, **more: Any) -> Point:
    return Point(
        name=f"ppermute of {kib} KiB to the next device",
        chip=chip,
        topology=topology,
        value=value,
        unit="us",
        source=MARIN,
        program="permutes",
        arguments={"kib": kib, "repeats": _REPEATS},
        repeats=_REPEATS,
        **more,
    )


_BOOK_CHIP = (
    "the chip. The printed program multiplies int32 over 2 x 4 devices, and on v5e the compiler "
    "makes the very instructions whose names the printed profiles show. A float dtype would take a "
    "tenth of the time."
)
_MAXTEXT_CHIP = (
    "the chip, one host of 4. A v5e needs 11.2 ms for the arithmetic and 4.5 ms for the gather, "
    "more than the published sum; a v5p 4.8 ms and 2.2 ms, half of it. A v4 fits."
)


def _book(name: str, value: float, program: str, more: str = "") -> Point:
    return Point(
        name=name,
        chip="v5e",
        topology="v5e:2x4",
        value=value,
        unit="us",
        source=SCALING_BOOK,
        program=program,
        inferred=_BOOK_CHIP + more,
    )


def _maxtext(name: str, value: float, program: str) -> Point:
    return Point(
        name=name,
        chip="v4",
        topology="v4:2x2x1",
        value=value,
        unit="ms",
        source=MAXTEXT_PR,
        program=program,
        inferred=_MAXTEXT_CHIP,
    )


_WALL = "measured by the host's clock around each call, and the launch is most of it"

# FLOPs of one token of ViT-22B: 6 N + 12 L H Q T, as `bench.work.closed_form` counts it.
_VIT_22B = 6 * 48 * (4 * 6144**2 + 2 * 6144 * 24576) + 12 * 48 * 6144 * 256

POINTS: tuple[Point, ...] = (
    # v6e: a device trace, with the flag that the page names.
    _square(
        "v6e",
        "v6e:2x2",
        8192,
        1.328756094,
        "ms",
        f"{RECIPES}/README.md",
        options={"xla_tpu_scoped_vmem_limit_kib": "65536"},
    ),
    _copy("v6e", "v6e:2x2", 32, 1359.5960438266143, f"{RECIPES}/README.md"),
    # 7x, one device, which is half a chip.
    *(_ironwood(n, x) for n, x in [(128, 2.589961271), (256, 18.28645367), (512, 105.0783466)]),
    *(_ironwood(n, x) for n, x in [(1024, 349.7270639), (2048, 679.284728), (4096, 892.9445127)]),
    *(_ironwood(n, x) for n, x in [(16384, 950.1286983), (32768, 956.3824592)]),
    _square("7x", "7x:2x2x1", 1024, 5.61, "us", HELION),
    _square("7x", "7x:2x2x1", 2048, 22.88, "us", HELION),
    *(
        _copy("7x", "7x:2x2x1", size, value, f"{RECIPES}/ironwood/hbm/hbm.md")
        for size, value in [(2, 1379.335), (32, 3009.836), (512, 3199.021), (8192, 3210.481)]
    ),
    *(_gather(mb, x) for mb, x in [(0.25, 71.7703034), (1, 129.1869148), (4, 161.9040742)]),
    *(_gather(mb, x) for mb, x in [(16, 174.765465), (64, 178.7714158)]),
    # v5e: XLA's own product in a tutorial.
    _square("v5e", "v5e:2x2", 8192, 6.047147869830951, "ms", PALLAS),
    Point(
        name="4096^3 bf16 product",
        chip="v5e",
        value=0.8272899803705514,
        unit="ms",
        source=PALLAS,
        excluded=f"{_WALL}: 1024^3 takes 0.119 ms by the same clock",
    ),
    # v5e: the scaling book's collective matmul, three profiles.
    _book("int32 product, nothing gathered", 224, "book_local"),
    _book("int32 all-gather, then product", 311.989, "book_plain"),
    _book(
        "int32 collective matmul",
        234.826,
        "book_collective",
        " The text says 244 us; the profile printed there, 234.826 us.",
    ),
    # v5p, v6e: permutes. The constants of `hardware` are from the same sweep.
    _permute("v5p", "v5p:2x2x1", 4, 5.0),
    _permute("v5p", "v5p:2x2x1", 1024, 16.94),
    _permute("v5p", "v5p:2x2x1", 65536, 781.98),
    _permute("v6e", "v6e:2x4", 4, 5.75),
    _permute("v6e", "v6e:2x4", 1024, 17.45),
    _permute("v6e", "v6e:2x4", 65536, 776.34),
    # v4: MaxText's example of a collective matmul, and training.
    _maxtext("einsum bsE,Ehd->bshd, the compiler's own", 13.68, "maxtext_naive"),
    _maxtext("einsum bsE,Ehd->bshd, collective matmul", 12.35, "maxtext_collective"),
    Point(
        name="MaxText 22B, 64 chips, fsdp, full remat: 56.7% MFU",
        chip="v4",
        topology="v4:4x4x4",
        value=156,
        unit="TFLOP/s",
        work=104.0 * 256 * _VIT_22B,
        source=MAXTEXT_V4,
        program="train_step",
        arguments={
            "mesh": (1, 64, 1),
            "images": 104,
            "remat": "full",
            "partitioner": "gspmd",
        },
        slow=True,
        inferred="the program: a ViT-22B on the same 26,624 tokens a chip, whose kernels have the "
        "sizes of MaxText's block, compared at the same TFLOP/s. MaxText has sequences of 2,048 "
        "tokens, a flash attention and a vocabulary; the blocks are parallel here, and the "
        "attention goes through XLA.",
    ),
    Point(
        name="ViT-22B, 1,024 chips: 1,150 tokens/s/core, 54.9% MFU",
        chip="v4",
        topology="v4:8x8x16",
        value=1150 * _VIT_22B / 1e12,
        unit="TFLOP/s",
        work=16.0 * 256 * _VIT_22B,
        source="https://arxiv.org/abs/2302.05442",
        program="train_step",
        arguments={
            "mesh": (16, 16, 4),
            "images": 16,
            "remat": "products",
            "algorithm": "two_way",
        },
        slow=True,
        inferred="the mesh, the batch of a chip, the rematerialisation and the whole program: "
        "Google's code is not public. Ours is compared with theirs, so this is no error of the "
        "predictor alone.",
    ),
    *(
        Point(
            name=f"fused kernel over XLA's all-gather matmul, m={m} n={n} k={k}",
            chip="v6e",
            value=value,
            unit="times as fast",
            source=TPU_INFERENCE,
            excluded="the ratio is that of a Pallas kernel, whose schedule the compiler does not "
            "cost, to XLA with flags that the page does not name",
        )
        for m, n, k, value in [
            (2048, 51200, 5120, 1.53),
            (2048, 57344, 8192, 1.19),
            (4096, 51200, 5120, 1.09),
        ]
    ),
    Point(
        name="all-reduce of 17408 x 17408 bf16 over 256 chips",
        chip="v6e",
        value=235.7595345022845,
        unit="GB/s of an unstated count of bytes",
        source=f"{RECIPES}/trillium/collectives/README.md",
        excluded="the page does not say which bytes the rate counts",
    ),
)
