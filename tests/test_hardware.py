"""The table of chips: lookups, sources, and agreement with numbers that others publish."""

import inspect
import re

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import tpu as pltpu

from collective_matmul import hardware

PUBLISHED = ("v4", "v5e", "v5p", "v6e", "7x", "H100", "H200")


def test_names():
    assert hardware.names() == (*PUBLISHED, "cpu", "unknown")


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_chip_is_found_by_name_and_by_every_kind(name):
    chip = hardware.chip(name)
    assert chip.name == name
    assert chip.device_kinds
    for kind in chip.device_kinds:
        assert hardware.from_device_kind(kind) is chip
        assert hardware.chip(kind.upper()) is chip


def test_the_device_at_hand_is_known():
    assert hardware.from_device_kind(jax.devices("cpu")[0].device_kind).name == "cpu"


def test_no_kind_is_listed_twice():
    kinds = [kind for name in hardware.names() for kind in hardware.chip(name).device_kinds]
    assert len(kinds) == len(set(kinds))


@pytest.mark.parametrize(("wrong", "meant"), [("v6", "'v6e'"), ("h20", "'H200'"), ("TPU7", "'7x'")])
def test_an_unknown_name_is_refused_with_the_nearest(wrong, meant):
    with pytest.raises(ValueError, match=f"unknown chip '{wrong}'.*Did you mean .*{meant}"):
        hardware.chip(wrong)


def test_an_unknown_kind_falls_back_and_has_no_peak():
    chip = hardware.from_device_kind("NVIDIA H100 PCIe")
    assert chip is hardware.UNKNOWN
    assert chip.assumed
    assert hardware.peak(chip, jnp.bfloat16) is None


def test_a_peak_is_for_one_device_and_one_dtype():
    peak, chip = hardware.peak, hardware.chip
    assert peak(chip("v4"), jnp.bfloat16) == 275e12
    assert peak(chip("v4"), "float8_e4m3fn") is None
    assert peak(chip("v6e"), jnp.int8) == peak(chip("v6e"), jnp.uint8) == 1836e12
    assert peak(chip("7x"), jnp.bfloat16) == 2307e12 / 2
    assert peak(chip("7x"), jnp.float8_e5m2) == 4614e12 / 2
    assert peak(chip("H100"), jnp.float16) == peak(chip("H200"), jnp.bfloat16) == 989e12
    assert peak(chip("H200"), jnp.float32) == 494e12
    assert peak(chip("H200"), jnp.float64) is None
    assert peak(chip("cpu"), jnp.float32) is None


@pytest.mark.parametrize("name", hardware.names())
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float64, jnp.int8, jnp.int32])
def test_there_is_always_a_rate_to_plan_by(name, dtype):
    chip = hardware.chip(name)
    rate = hardware.planning_rate(chip, dtype)
    assert rate == (hardware.peak(chip, dtype) or rate) > 0


def test_every_number_of_the_table_has_a_source():
    source = inspect.getsource(hardware)
    table = source[source.index("_TABLE = (") : source.index("_BY_NAME =")].splitlines()
    lines = [(i, line) for i, line in enumerate(table) if re.match(r" +\w+=\d", line)]
    assert len(lines) > 70
    for i, line in lines:
        beside = line if "#" in line else table[i - 1]
        assert "https://" in beside or "assumed" in beside, line


@pytest.mark.parametrize(
    ("name", "version", "cores"),
    [("v4", "v4", 2), ("v5e", "v5e", 1), ("v5p", "v5p", 2), ("v6e", "v6e", 1), ("7x", "7x", 1)],
)
def test_agrees_with_the_table_inside_jax(name, version, cores):
    chip = hardware.chip(name)
    info = pltpu.get_tpu_info_for_chip(pltpu.ChipVersion(version), cores)
    assert chip.bf16 == pytest.approx(info.bf16_ops_per_second * cores, rel=0.005)
    assert chip.hbm_bytes == pytest.approx(info.hbm_capacity_bytes * cores, rel=0.02)
    # jax has 2.46 TB/s for v5p, which its vendor gives as 2,765 GB/s.
    assert chip.hbm_bandwidth == pytest.approx(info.mem_bw_bytes_per_second * cores, rel=0.13)
    if info.int8_ops_per_second:
        assert chip.int8 == pytest.approx(info.int8_ops_per_second * cores, rel=0.005)


@pytest.mark.parametrize(
    ("name", "flops_per_cycle"),
    [("v4", 262144), ("v5e", 131072), ("v5p", 262144), ("v6e", 524288), ("7x", 524288)],
)
def test_the_clock_reaches_the_peak(name, flops_per_cycle):
    chip = hardware.chip(name)
    assert chip.clock * flops_per_cycle == pytest.approx(chip.bf16, rel=0.005)


@pytest.mark.parametrize(("name", "seconds"), [("v5p", 781.98e-6), ("v6e", 776.34e-6)])
def test_the_permute_model_meets_the_measured_64_mib(name, seconds):
    # https://github.com/marin-community/marin/issues/6736
    chip = hardware.chip(name)
    model = chip.permute_latency + 2**26 / chip.link_bandwidth
    assert 0.95 * seconds < model <= seconds
