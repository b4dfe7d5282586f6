"""The QK-norm experiment: a small one is run, and the page tells what the large one found."""

import dataclasses
import itertools
import json
import pathlib

import numpy as np
import pytest
from matplotlib.image import imread

from models import configs
from models.stability import __main__ as command
from models.stability.figure import draw
from models.stability.sweep import sweep

pytestmark = pytest.mark.slow

DOCS = pathlib.Path(__file__).parents[1] / "docs"
RUNS = json.loads((DOCS / "stability.json").read_text(encoding="utf-8"))
BASE = configs.load("stability")
SHORT = dataclasses.replace(
    BASE,
    model=dataclasses.replace(BASE.model, width=16, mlp_dim=32, depth=2),
    optim=dataclasses.replace(BASE.optim, warmup=20),
    batch=16,
)
OPTIONS = command.Options(lrs=(0.01, 0.3), seeds=(0, 1), steps=50, show=0.3)


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """The runs of a small sweep, which the command left in a folder: {(norm, rate, seed): run}."""
    out = tmp_path_factory.mktemp("stability")
    command.main(dataclasses.replace(OPTIONS, out=out), SHORT)
    assert {path.name for path in out.iterdir()} == {"stability.json", "stability.png"}
    runs = json.loads((out / "stability.json").read_text(encoding="utf-8"))
    return {(run["qk_norm"], round(run["lr"], 3), run["seed"]): run for run in runs}


def test_every_combination_is_a_run(short):
    assert set(short) == set(itertools.product((None, "rms"), OPTIONS.lrs, OPTIONS.seeds))


@pytest.mark.parametrize("seed", OPTIONS.seeds)
def test_logits_grow_and_entropy_vanishes_without_the_norms(short, seed):
    without, norms = short[None, 0.3, seed], short["rms", 0.3, seed]
    assert without["logit_max"] > 10 * norms["logit_max"]
    assert without["entropy_min"] < norms["entropy_min"] / 3
    assert without["logit_max"] > 10 * short[None, 0.01, seed]["logit_max"], "the rate does it"
    assert without["logits"][-1] > 10 * without["logits"][0], "it grows"


def test_runs_differ_in_nothing_but_what_is_swept(short):
    """The classifier begins as zeros, so the first loss is that of guessing, everywhere."""
    np.testing.assert_allclose([run["loss"][0] for run in short.values()], np.log(10), rtol=1e-3)
    first = {key: run["logits"][0] for key, run in short.items()}
    assert first[None, 0.01, 0] == first[None, 0.3, 0], "parameters depend on the seed alone"
    assert first[None, 0.3, 0] != first[None, 0.3, 1]


def test_a_rate_to_show_that_is_not_swept_is_refused():
    with pytest.raises(SystemExit, match=r"--show 0\.5 is none of --lrs \(0\.01, 0\.3\)"):
        command.main(dataclasses.replace(OPTIONS, show=0.5), SHORT)


def test_curves_need_as_many_steps():
    with pytest.raises(ValueError, match=r"steps=51 do not split into points=50"):
        sweep(dataclasses.replace(SHORT, steps=51), lrs=(0.1,), seeds=(0,))


def of(norm, lr, name):
    found = [run[name] for run in RUNS if (run["qk_norm"], run["lr"]) == (norm, lr)]
    assert len(found) == 3, "seeds"
    return np.array(found)


def test_training_diverges_without_the_norms_and_not_with_them():
    """In the committed results, for every seed: the loss falls and rises again, or goes on."""
    without, norms = of(None, 0.2, "loss"), of("rms", 0.2, "loss")
    half = without.shape[1] // 2
    assert (without[:, :half].min(1) + 0.3 < of(None, 0.2, "final_loss")).all()
    assert (norms[:, :half].min(1) > of("rms", 0.2, "final_loss")).all()
    assert of("rms", 0.2, "final_loss").max() < 1.3 < 2.1 < of(None, 0.2, "final_loss").min()
    assert of(None, 0.2, "logit_max").min() > 10_000
    assert of("rms", 0.2, "logit_max").max() < 100
    assert not any(run["skipped"] for run in RUNS)


def test_the_page_has_the_results():
    """Each row of its table, from the committed numbers."""
    page = (DOCS / "stability.md").read_text(encoding="utf-8")
    for lr in (0.01, 0.03, 0.1, 0.2, 0.3):
        (row,) = [line for line in page.splitlines() if line.startswith(f"| {lr:g} |")]
        losses = [of(norm, lr, "final_loss") for norm in (None, "rms")]
        texts = [f"{x.min():.2f} to {x.max():.2f}" for x in losses]
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert cells[1:3] == texts
        numbers = [float(cell.replace(",", "")) for cell in cells[3:]]
        wanted = [of(norm, lr, "logit_max").max() for norm in (None, "rms")]
        wanted += [of(norm, lr, "entropy_min").min() for norm in (None, "rms")]
        np.testing.assert_allclose(numbers, wanted, rtol=0.05, atol=1e-6)


def test_the_figure_is_drawn_from_the_results(tmp_path):
    draw(RUNS, tmp_path / "stability.png", show=0.2)
    drawn, kept = imread(tmp_path / "stability.png"), imread(DOCS / "stability.png")
    assert (DOCS / "stability.png").stat().st_size < 200_000
    assert drawn.shape == kept.shape
    draw(RUNS[:15], tmp_path / "half.png", show=0.2)
    assert (imread(tmp_path / "half.png") != drawn).mean() > 0.01
