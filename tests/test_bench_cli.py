"""`python -m bench`: what a user sees of it, right and wrong."""

import importlib.util
import json
import math
import os
import pathlib
import subprocess
import sys

import pytest

from bench import commands, record
from bench.__main__ import main
from bench.commands import UserError
from bench.record import Record, load

from .helpers import needs_compiler

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[1]


def test_every_subcommand_says_what_it_does(capsys):
    assert main(["--help"]) == 0
    told = capsys.readouterr().out
    assert {"predict", "predict-op"} <= set(commands.names())
    for name in commands.names():
        assert commands.summary(name), f"{name} has no docstring"
        assert f"{name} " in told and commands.summary(name) in told


def test_an_unknown_subcommand_is_told_the_nearest(capsys):
    assert main(["predit"]) == 2
    assert "no subcommand 'predit'; did you mean 'predict'?" in capsys.readouterr().err
    assert main([]) == 2


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["predict", "--topology", "v9:2x2"], "no topology 'v9:2x2': write CHIP:XxY"),
        (["predict", "--topology", "v5e"], "no topology 'v5e'"),
        (["predict", "--topology", "v5e:3x5"], "knows no topology 'v5e:3x5'"),
        (["predict", "--topology", "v5e:2x2", "--mesh", "data=3"], "nearest: data=4"),
        (["predict", "--topology", "v5e:2x2", "--mesh", "model=4"], "no axis 'model'"),
        (["predict", "--topology", "v5e:2x2", "--mesh", "four"], "write data=64,fsdp=4,tensor=4"),
        (
            ["predict", "--topology", "v5e:2x2", "--mesh", "tensor=4", "--model", "X/16"],
            "no variant 'X/16'",
        ),
        (
            ["predict", "--topology", "v5e:2x2", "--mesh", "tensor=4", "--model", "Ti/16"],
            "does not split over 'tensor'=4 devices",
        ),
        (["predict", "--topology", "v5e:2x2", "--compare", "--baselines", "y"], "no baseline 'y'"),
        (["predict-op", "--m", "1001", "--topology", "v5e:2x2"], "m=1001 does not split over 4"),
        (["predict-op", "--topology", "v5e:2x2", "--axis-size", "3"], "4 devices"),
    ],
)
def test_a_wrong_request_is_a_line_and_status_2(arguments, told, capsys):
    pytest.importorskip("libtpu", reason="libtpu, the TPU compiler, is not installed")
    assert main(arguments) == 2
    seen = capsys.readouterr().err
    assert told in seen and "Traceback" not in seen


def test_a_missing_compiler_is_named_with_the_remedy(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["predict"]) == 2
    assert "pip install 'collective-matmul[aot]'" in capsys.readouterr().err


def test_the_command_line_itself():
    """As a user starts it, without the environment that the tests have."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    done = subprocess.run(
        [sys.executable, "-m", "bench", "predict", "--topology", "v5e:0x0"],
        cwd=ROOT,
        env=kept,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and "python -m bench predict: " in done.stderr, done.stderr


def test_a_record_says_what_it_is(tmp_path):
    path = tmp_path / "some" / "result.json"
    made = Record("predicted", "predict", "v4", {"seconds": 0.5, "mfu": math.nan})
    made.save(path)
    read = load(path)
    assert (read.kind, read.command, read.chip) == ("predicted", "predict", "v4")
    assert read.result == {"seconds": 0.5, "mfu": None}, "JSON has no nan"
    assert {"python", "jax", "jaxlib"} <= set(read.versions)
    assert read.date.startswith("20") and read.host["cores"] >= 1
    assert set(json.loads(path.read_text())) == {
        *("kind", "command", "chip", "result", "date", "commit", "versions", "host")
    }


def test_a_record_is_predicted_or_measured(tmp_path):
    with pytest.raises(ValueError, match="'guessed' is neither"):
        Record("guessed", "predict", "v4", {})
    path = tmp_path / "other.json"
    path.write_text('{"seconds": 1}')
    with pytest.raises(ValueError, match="holds no result of bench"):
        load(path)


def test_the_commit_is_this_checkouts():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert head.stdout.startswith(record.commit().rstrip("+")) and record.commit()


def test_a_user_error_is_a_value_error():
    assert issubclass(UserError, ValueError)


@needs_compiler
def test_all_baselines_in_one_go(tmp_path, capsys):
    """What the page shows for ViT-22B on 1,024 chips, with a model of a few rows on four."""
    step = ["--model", "mu/16", "--depth", "1", "--image-size", "64", "--classes", "8"]
    place = ["--topology", "v5e:2x2", "--mesh", "tensor=4", "--batch", "8", "--remat", "none"]
    rows = ["--baselines", "two_way", "gspmd", "fsdp"]
    assert main(["predict", *step, *place, "--compare", *rows, "--out", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert "4 x v5e" in told and "predicted" in told and "the winner" in told
    assert "accuracy: " in told
    found = load(tmp_path / "compare.json")
    assert [row["name"] for row in found.result["rows"]] == ["two_way", "gspmd", "fsdp"]
    assert all(0 < row["mfu"] < 1 for row in found.result["rows"])
    pictures = {path.name for path in tmp_path.glob("*.png")}
    assert pictures == {"compare.png", "timeline.png"}


@needs_compiler
def test_a_sweep_over_tokens_a_chip(tmp_path):
    step = ["--model", "mu/16", "--depth", "1", "--image-size", "64", "--classes", "8"]
    place = ["--topology", "v5e:2x2", "--mesh", "tensor=4", "--batch", "8", "--remat", "none"]
    rows = ["--baselines", "unfused", "--factors", "1", "2"]
    assert main(["predict", *step, *place, "--sweep", *rows, "--out", str(tmp_path)]) == 0
    batches = load(tmp_path / "sweep.json").result["batches"]
    tokens = {batch: rows[0]["tokens_per_chip"] for batch, rows in batches.items()}
    assert tokens == {"8": 32, "16": 64}
    assert (tmp_path / "sweep.png").is_file()
