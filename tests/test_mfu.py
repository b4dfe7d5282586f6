"""MFU: the numbers that others published, the readings of them that fit, and those that do not."""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
import pytest

from bench.flops import count
from bench.mfu import utilisation
from bench.work import Work, closed_form, model_work
from collective_matmul import hardware


class Decoder(NamedTuple):
    """The sizes of a language model as published; `matrices` is what every token meets."""

    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    mlp_matrices: int  # 3 if gated, 2 if not
    vocabulary: int
    length: int  # tokens of a sequence in the published run

    @property
    def matrices(self):
        attention = 2 * self.width * self.head_dim * (self.heads + self.kv_heads)
        block = attention + self.mlp_matrices * self.width * self.mlp
        return self.layers * block + self.width * self.vocabulary

    def work(self, attention):
        return closed_form(
            self.matrices,
            layers=self.layers,
            heads=self.heads,
            head_dim=self.head_dim,
            length=self.length,
            attention=attention,
        )


# Sizes: Touvron et al. 2023, arXiv 2307.09288; Llama team 2024, arXiv 2407.21783;
# Brown et al. 2020, arXiv 2005.14165. Lengths: those of the runs below.
LLAMA2_70B = Decoder(8192, 80, 64, 8, 128, 28_672, 3, 32_000, 4096)
LLAMA31_8B = Decoder(4096, 32, 32, 8, 128, 14_336, 3, 128_256, 8192)
LLAMA31_70B = Decoder(8192, 80, 64, 8, 128, 28_672, 3, 128_256, 8192)
LLAMA31_405B = Decoder(16_384, 126, 128, 8, 128, 53_248, 3, 128_256, 8192)
GPT3_175B = Decoder(12_288, 96, 96, 96, 128, 49_152, 2, 50_257, 2048)

# TFLOP/s and tokens/s of one chip, both as printed, so their ratio is what the authors counted:
# https://github.com/AI-Hypercomputer/tpu-recipes, training on Trillium (v6e) and on Ironwood (7x).
PUBLISHED = {
    "Llama2-70B on v6e": (LLAMA2_70B, "full", 402.274, 905.021),
    "Llama3.1-8B on v6e": (LLAMA31_8B, "full", 417.397, 7207.3),
    "GPT3-175B on v6e": (GPT3_175B, "full", 384.891, 357.58),
    "Llama3.1-70B on 7x": (LLAMA31_70B, "causal", 1207.05, 2686.98),
    "Llama3.1-405B on 7x": (LLAMA31_405B, "causal", 1261.40, 499.77),
}


@pytest.mark.parametrize("row", PUBLISHED)
def test_published_flops_of_a_token(row):
    """One closed form gives all rows, some with full and some with causal attention."""
    model, attention, tflops, tokens = PUBLISHED[row]
    other = {"full": "causal", "causal": "full"}[attention]
    published = tflops * 1e12 / tokens
    assert model.work(attention).flops == pytest.approx(published, rel=1e-3)
    assert model.work(other).flops != pytest.approx(published, rel=1e-2)


def test_a_convention_is_worth_five_points():
    """The published 45.5% of Llama3.1-8B on v6e is 40.4% under the rule of the Ironwood rows."""
    v6e = hardware.chip("v6e")
    shares = {
        attention: utilisation(LLAMA31_8B.work(attention), 1 / 7207.3, devices=1, chip=v6e).value
        for attention in ("full", "causal")
    }
    assert shares == pytest.approx({"full": 0.455, "causal": 0.404}, abs=5e-4)


def test_palm():
    """46.2%, and 45.7% without attention: Chowdhery et al. 2022, arXiv 2204.02311.

    540.35e9 parameters, 118 layers, 48 heads of 256, sequences of 2048, 238.3k tokens/s on 6144 v4.
    """
    shares = {}
    for attention in ("full", "none"):
        work = closed_form(
            540_350_000_000, layers=118, heads=48, head_dim=256, length=2048, attention=attention
        )
        share = utilisation(work, 1 / 238.3e3, devices=6144, chip=hardware.chip("v4"))
        shares[attention] = share.value
    assert shares == pytest.approx({"full": 0.462, "none": 0.457}, abs=5e-4)


def vit(width, layers, mlp, attention="full", extra=0):
    """A ViT of heads * head_dim = width on 256 tokens."""
    matrices = layers * (4 * width**2 + 2 * width * mlp) + extra
    sizes = {"layers": layers, "heads": 1, "head_dim": width, "length": 256}
    return closed_form(matrices, **sizes, attention=attention)


def v4(work, tokens, **changes):
    chip = dataclasses.replace(hardware.chip("v4"), **changes)
    return utilisation(work, 1 / tokens, devices=1, chip=chip)


def test_vit_e():
    """44.0% of a v4 is 5,233 tokens/s; sizes: Chen et al. 2023, arXiv 2209.06794."""
    work = vit(1792, 56, 15_360)
    assert work.flops == pytest.approx(23.12e9, rel=1e-3)
    assert v4(work, 5233).value == pytest.approx(0.440, abs=5e-5)


def test_vit_22b_is_54_9_percent_where_a_core_is_a_chip():
    """Cited: 1.15k tokens/s/core, 54.9% (Dehghani et al. 2023, arXiv 2302.05442). One reading fits.

    A core is a jax device: a v4 chip in megacore mode, 275 TFLOP/s.
    """
    work = vit(6144, 48, 24_576)
    assert work.flops == pytest.approx(131.366e9, rel=1e-5)
    assert v4(work, 1150).value == pytest.approx(0.5493, abs=5e-5)
    # 1,150 is itself rounded, and its ends do not leave the reading in doubt.
    assert v4(work, 1145).value == pytest.approx(0.5470, abs=5e-5)
    assert v4(work, 1155).value == pytest.approx(0.5517, abs=5e-5)
    assert v4(work, 1149.3).value == pytest.approx(0.5490, abs=5e-5)


def test_readings_of_vit_22b_that_do_not_fit():
    without = v4(vit(6144, 48, 24_576, "none"), 1150)
    assert without.value == pytest.approx(0.5456, abs=5e-5)
    assert v4(without.work, 1155).value < 0.5485  # rounds to 54.8 at best
    # Every token charged with the pooling head and the embeddings: 22,203,604,992 parameters.
    with_map = v4(vit(6144, 48, 24_576, extra=22_203_604_992 - 21_743_271_936), 1150)
    assert with_map.value == pytest.approx(0.5609, abs=5e-5)
    # A TensorCore, of which a v4 chip has two.
    core = v4(vit(6144, 48, 24_576), 1150, bf16=137.5e12)
    assert core.value == pytest.approx(1.099, abs=5e-4)
    assert "IMPOSSIBLE" in str(core) and "IMPOSSIBLE" not in str(without)


@pytest.mark.parametrize(
    "name, dtype", [("cpu", "bfloat16"), ("unknown", "bfloat16"), ("v4", "float8_e4m3fn")]
)
def test_without_a_published_peak_there_is_no_mfu(name, dtype):
    work = Work(1e12, "model", "full attention")
    share = utilisation(work, 1.0, devices=1, chip=hardware.chip(name), dtype=jnp.dtype(dtype))
    assert share.value is None
    assert str(share) == f"no MFU: no peak is published for {dtype} on the chip {name!r}"


def test_a_peak_is_of_a_device_and_a_7x_chip_has_two():
    work = LLAMA31_405B.work("causal")
    share = utilisation(work, 1 / 499.77, devices=2, chip=hardware.chip("7x"))
    assert share.value == pytest.approx(0.547, abs=5e-4)


def test_every_number_says_its_convention():
    full = v4(vit(6144, 48, 24_576), 1150)
    assert str(full) == (
        "MFU 54.93% of 275 TFLOP/s (v4, bfloat16, 1 device), 131.366 GFLOP (model FLOPs; "
        "6 N + 12 L H Q T a token, full attention)"
    )
    assert "6 L H Q T a token, causal attention" in str(v4(vit(64, 2, 256, "causal"), 1))
    assert "6 N a token, no attention" in str(v4(vit(64, 2, 256, "none"), 1))
    assert str(v4(Work(1.0, "hardware", "the step"), 1)).startswith("HFU ")


def test_a_count_that_is_not_whole_says_so_beside_the_number():
    x = jnp.ones((8, 8))
    work = model_work(count(lambda x: jnp.linalg.inv(x @ x), x))
    assert work.flops == 3 * 2 * 8**3
    assert "full attention" in work.convention and "NOT counted: lu" in work.convention
    assert work.convention in str(v4(work, 1))


@pytest.mark.parametrize("seconds, devices", [(0.0, 1), (-1.0, 1), (float("nan"), 1), (1.0, 0)])
def test_impossible_measurements_are_refused(seconds, devices):
    with pytest.raises(ValueError, match=r"seconds=.* and devices=.* must be more than 0"):
        utilisation(Work(1.0, "model", ""), seconds, devices=devices, chip=hardware.chip("v4"))


def test_an_unknown_convention_is_refused():
    with pytest.raises(ValueError, match="attention='half' is none of"):
        closed_form(1, layers=1, heads=1, head_dim=1, length=1, attention="half")
