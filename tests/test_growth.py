"""`python -m bench growth` and `grid`: whole ranges of predictions, with few points here."""

import csv

import pytest

from bench.__main__ import main
from bench.commands import growth
from bench.predicted import grid
from bench.predicted.ways import Figures
from bench.record import load

from .helpers import needs_compiler

pytestmark = pytest.mark.slow


@needs_compiler
def test_curves(tmp_path, monkeypatch, capsys):
    points = tuple(growth.Point(n, (1, 2, 2), 4, "v5e:2x2", n) for n in (1, 2))
    monkeypatch.setattr(growth, "CURVES", {"depth": growth.Curve("four chips", points)})
    asked = ["--curves", "depth", "--schedules", "two_way", "gspmd", "--model", "mu/16"]
    assert main(["growth", *asked, "--out", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert "four chips" in told and "accuracy: " in told
    (table,) = load(tmp_path / "growth.json").result["tables"]
    rows = [(row["depth"], row["schedule"]) for row in table["rows"]]
    assert rows == [(1, "two_way"), (2, "two_way"), (1, "gspmd"), (2, "gspmd")]
    for row in table["rows"]:
        assert 0 < row["MFU %"] < 100 and row["compile s"] > 0 and 0 <= row["hidden %"] <= 100
    by_depth = [row["step ms"] for row in table["rows"]]
    assert by_depth[0] < by_depth[1] and by_depth[2] < by_depth[3]
    assert {plot["y"] for plot in table["plots"]} == {"MFU %", "compile s"}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["growth", "--curves", "height"], "no curve 'height'"),
        (["growth", "--schedules", "y"], "no baseline 'y'"),
        (["grid", "--chips", "v9"], "no chip 'v9'"),
        (["grid", "--axis-sizes", "1"], "are not all of 2 to 16 devices"),
    ],
)
def test_wrong_requests(arguments, told, capsys):
    assert main(arguments) == 2
    seen = capsys.readouterr().err
    assert told in seen and "Traceback" not in seen


@needs_compiler
def test_a_grid_of_one_point(tmp_path, monkeypatch, capsys):
    for size in ("WIDTH", "INTO", "OUT_OF"):
        monkeypatch.setattr(grid, size, 1024)
    asked = ["--chips", "v5p", "--axis-sizes", "2", "--tokens", "512", "--out", str(tmp_path)]
    assert main(["grid", *asked, "--forward-only"]) == 0
    assert "None of the best, worst" in capsys.readouterr().out
    summary, points = load(tmp_path / "grid.json").result["tables"]
    kinds = [(row["mode"], row["grad"]) for row in points["rows"]]
    assert kinds == [("gather", False), ("scatter", False)]
    assert len(summary["rows"]) == 2
    for row in points["rows"]:
        assert row["compute of bare"] > 0.9 and 0.5 < row["of the best"] < 1.5
    ways = _lines(tmp_path / "grid.csv")
    assert {"bare product", "None", "unfused", "unfused + XLA"} < {x["way"] for x in ways}
    assert any("pallas_tpu" in x["way"] for x in ways)
    assert all(float(x["seconds"]) > 0 for x in ways if not x["failure"])

    _pretend(tmp_path / "grid.csv", seconds="42.0")
    assert main(["grid", *asked, "--resume"]) == 0
    _, points = load(tmp_path / "grid.json").result["tables"]
    kinds = [(row["mode"], row["grad"]) for row in points["rows"]]
    assert kinds == [(mode, grad) for mode in ("gather", "scatter") for grad in (False, True)]
    for row in points["rows"]:
        assert row["grad"] == (row["None us"] < 1e6), "what is known is not predicted again"


@needs_compiler
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("mode", ["gather", "scatter"])
def test_whether_hops_fit_under_their_products(mode, grad):
    """Half a shard each way and a permute's latency, beside all but one chunk's product; in the
    gradient of a gather, twice."""
    ways = {x: Figures(x, 900e-6, 900e-6, 0.0, 0) for x in ("bare product", "None", "unfused")}
    (row,) = grid.rows({grid.Point("v5p", 8, mode, grad, 2048): ways})
    hop = 2048 // 8 * 6144 * 2 / 2 / 90e9 + 4.55e-6
    beside = 900e-6 / 8 / (3 if grad else 1) / (2 if grad and mode == "gather" else 1)
    assert row["wire of products"] == pytest.approx(hop / beside, rel=1e-3)
    (told,) = grid.summary([row])
    assert told["hops fit"] == told["and are hidden"] == (hop < beside)


def _lines(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _pretend(path, **figures):
    ways = _lines(path)
    with path.open("w", encoding="utf-8", newline="") as file:
        lines = csv.DictWriter(file, ways[0])
        lines.writeheader()
        lines.writerows(way | figures for way in ways)
