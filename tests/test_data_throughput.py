"""The decoding benchmark: what it decodes, what it compares with, and what it says."""

import argparse
import io
import json

import numpy as np
import pytest
from PIL import Image

from bench import commands, record
from bench.commands.data import appetite, main
from models.data import Data
from models.data.throughput import Rate, alone, photographs, reading, streamed

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory):
    root = tmp_path_factory.mktemp("jpegs")
    return root, photographs(root, 4, (120, 90))


def test_generated_images_are_like_photographs(jpegs):
    """As large as JPEGs of that quality are, and smooth: neighbours are alike, as nothing else is.

    ImageNet's 500 x 400 pixels in 110 kB are 4.4 bits a pixel.
    """
    root, size = jpegs
    paths = sorted(root.glob("photograph/*.jpg"))
    assert size == sum(path.stat().st_size for path in paths) and len(paths) == 4
    assert 2 < 8 * size / (4 * 120 * 90) < 6
    for path in paths:
        with Image.open(io.BytesIO(path.read_bytes())) as opened:
            assert (opened.format, opened.mode, opened.size) == ("JPEG", "RGB", (120, 90))
            pixels = np.asarray(opened.convert("L"), float)
        beside = np.corrcoef(pixels[:, :-1].ravel(), pixels[:, 1:].ravel())[0, 1]
        apart = np.corrcoef(pixels[:, :-30].ravel(), pixels[:, 30:].ravel())[0, 1]
        assert 20 < pixels.std() < 60 and beside > 0.85 > apart


def test_what_is_timed_is_what_a_run_reads(jpegs):
    split, config = reading(jpegs[0], 16, Data(threads=2))
    assert (len(split), split.shape, split.classes) == (3, (16, 16, 3), 1)
    assert (config.augment.crop, config.augment.flip, config.threads) == (True, True, 2)
    for rate in (alone(split, config, 2, 3), streamed(split, config, 2, 3)):
        assert rate.images == 6 and rate.seconds > 0
    assert Rate(6, 1.5).images_per_second == 4


def asked(**changes):
    options = dict(appetite=None, model="S/16", chip="v5e", mfu=0.4, resolution=224)
    return argparse.Namespace(**options | changes)


def test_the_appetite_is_that_of_the_flops():
    """4.6 G multiply-adds forward, as is published for S/16, twice that backward."""
    eaten, said = appetite(asked())
    assert eaten == pytest.approx(0.4 * 197e12 / (6 * 4.6e9), rel=0.02)
    assert "predicted, not measured" in said and "assumed MFU of 40%" in said
    assert appetite(asked(appetite=5000.0)) == (5000.0, "5,000 images/s, as was asked for")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"appetite": -1.0}, "must be more than 0"),
        ({"model": "S16"}, "S16"),
        ({"chip": "v5x"}, "unknown chip 'v5x'"),
        ({"mfu": 1.5}, "mfu 1.5"),
    ],
)
def test_no_such_appetite(changes, message):
    with pytest.raises(commands.UserError, match=message):
        appetite(asked(**changes))


def test_the_command(tmp_path, capsys):
    small = "--size 60x40 --resolution 16 --images 4 --batch 2 --batches 3 --appetite 100"
    file = tmp_path / "data.json"
    arguments = [*small.split(), "--threads", "1", "--workers", "1", "--json", str(file)]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "a plain loop" in shown and "100 images/s, as was asked for" in shown
    saved = record.load(file)
    assert (saved.kind, saved.command, saved.chip) == ("measured", "data", "cpu")
    rows = saved.result["rows"]
    assert [(row["read by"], row["number"]) for row in rows] == [
        ("a plain loop", 1),
        ("threads", 1),
        ("workers", 1),
    ]
    for row in rows:
        assert row["of the appetite"] == pytest.approx(row["images/s"] / 100)
        needed = 100 / (row["images/s"] / row["number"])
        assert needed <= row["enough"] < needed + 1
    assert json.loads(file.read_text())["result"]["appetite"] == 100
    for wrong in (["--size", "60"], ["--images", "1"], ["--batch", "0"]):
        with pytest.raises(commands.UserError):
            main(wrong)
