"""Parameter counts, exactly: nothing is allocated."""

import pytest

from models import vit
from models.params import count

# (matmul, encoder, with_map, with_head for 29,593 classes), computed by hand from the sizes; None
# where the exact number is published nowhere else. The comments say which of them the paper's table
# rounds: it mixes three conventions.
COUNTS = {
    "Ti/16": (5_308_416, 5_524_032, 5_968_704, 11_680_153),
    "B/32": (84_934_656, 87_453_696, None, None),  # 87 M: encoder
    "B/16": (84_934_656, 85_797_120, None, None),  # 86 M: encoder
    "L/16": (301_989_888, 303_299_584, None, None),  # 303 M: encoder
    "g/14": (1_009_254_400, 1_011_199_616, 1_036_448_384, 1_078_144_921),  # 1011 M: encoder
    "G/14": (1_840_250_880, 1_842_772_352, None, 1_930_404_761),  # 1843 M: encoder
    "e/14": (3_802_136_576, 3_805_417_728, 3_873_342_720, 3_926_402_969),  # 3926 M: with_head
    "22B/14": (21_743_271_936, 21_750_546_432, 22_203_604_992, 22_385_453_977),  # 21743 M: matmul
}

# The golden counts of google-research/vision_transformer, vit_jax/models_test.py: class token or
# mean of the tokens, 1000 classes.
WITH_CLS = {
    "Ti/16": 5_717_416,
    "S/16": 22_050_664,
    "S/32": 22_878_952,
    "B/8": 86_576_872,
    "B/16": 86_567_656,
    "B/32": 88_224_232,
    "L/16": 304_326_632,
    "L/32": 306_535_400,
    "H/14": 632_045_800,
}
WITH_GAP = {"S/16": 22_049_896, "S/32": 22_878_184, "B/16": 86_566_120, "B/32": 88_222_696}


def by_formula(config):
    """The four counts, from the sizes alone."""
    d, layers, mlp, p = config.width, config.depth, config.mlp_dim, config.patch_size
    tokens = config.grid[0] * config.grid[1]
    matmul = layers * (4 * d * d + 2 * d * mlp)
    norms_and_biases = 4 * d + mlp + d + 4 * d
    last_norm = 2 * d
    if config.parallel:
        norms_and_biases = d + mlp + d + d + 2 * config.head_dim
        last_norm = d
    encoder = matmul + layers * norms_and_biases + 3 * p * p * d + d + tokens * d + last_norm
    with_map = encoder + d + 4 * d * d + 4 * d + 2 * d + 2 * d * mlp + mlp + d
    return matmul, encoder, with_map, with_map + config.num_classes * (d + 1)


CONVENTIONS = ("matmul", "encoder", "with_map", "with_head")


@pytest.mark.parametrize("name", [*COUNTS, "S/32", "S/16", "H/14", "mu/16"])
def test_counts(name):
    config = vit.variant(name, num_classes=29_593)
    got = tuple(count(config, convention) for convention in CONVENTIONS)
    assert got == by_formula(config)
    for number, known in zip(got, COUNTS.get(name, ()), strict=False):
        assert known in (None, number)


def test_the_paper_prints_three_conventions():
    def millions(name, convention):
        return round(count(vit.variant(name, num_classes=29_593), convention) / 1e6)

    assert millions("22B/14", "matmul") == 21_743
    assert millions("G/14", "encoder") == 1843
    assert millions("g/14", "encoder") == 1011
    assert millions("e/14", "with_head") == 3926


@pytest.mark.parametrize("name", WITH_CLS)
def test_counts_with_a_class_token(name):
    assert count(vit.variant(name, pool="cls"), "with_head") == WITH_CLS[name]


@pytest.mark.parametrize("name", WITH_GAP)
def test_counts_with_the_mean_of_the_tokens(name):
    assert count(vit.variant(name, pool="gap"), "with_head") == WITH_GAP[name]


def test_what_is_not_there_is_not_counted():
    config = vit.variant("mu/16", pool="gap", num_classes=None)
    assert count(config, "encoder") == by_formula(vit.variant("mu/16"))[1]
    with pytest.raises(ValueError, match="pool='gap' has no attention pooling head"):
        count(config, "with_map")
    with pytest.raises(ValueError, match="num_classes=None has no classifier"):
        count(config, "with_head")
    with pytest.raises(ValueError, match="'all' is none of"):
        count(config, "all")
