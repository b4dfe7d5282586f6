"""docs/benchmarks.md is what the results give, and says of each table what it is."""

import json
import shutil

import pytest

from bench import commands, plots, predicted_tables, report
from bench.commands.report import main
from bench.record import Record
from bench.tables import cell, markdown

ROWS = [{"schedule": "ring", "step ms": 3610.0, "note": None}, {"schedule": "a|b", "step ms": 1}]


def prediction(way, seconds, **changes):
    """As `Prediction.as_dict` gives it, of two devices with 100 TFLOP each to do."""
    told = {
        "compute_seconds": 0.8 * seconds,
        "exposed_seconds": 0.2 * seconds,
        "hidden_share": 0.75,
        "wire_bytes": 45e9,
        "ops": [
            {"opcode": "fusion", "flops": 1.2e12, "seconds": 0.01, "hbm_share": 0.5},
            {"opcode": "copy", "flops": 0, "seconds": 0.01, "hbm_share": 0.5},
        ],
    }
    return {
        "name": way, "chip": "v4", "dtype": "bfloat16", "devices": 2, "seconds": seconds,
        "mfu": 0.5, "tokens_per_chip": 4096.0, "hbm": 2**30, "notes": ["a note"],
        "model_work": {"flops": 200e12}, "overlap": told, "failure": None, "out_of_memory": None,
    } | changes  # fmt: skip


@pytest.fixture
def results(tmp_path):
    """A folder of three records, one of them in a folder of its own with a picture."""
    folder = tmp_path / "results"
    measured = {"title": "Seen", "order": 1, "rows": ROWS, "remarks": ["On a busy machine."]}
    Record("measured", "measure", "cpu", measured).save(folder / "seen.json")
    ways = [prediction("ring", 1.0), prediction("unfused", 2.0)]
    Record("predicted", "predict", "v4", {"accuracy": "5 %", "rows": ways}).save(
        folder / "compare" / "compare.json"
    )
    plots.draw(
        {"kind": "lines", "title": "", "rows": ROWS, "x": "step ms", "y": "step ms",
         "by": "schedule"},
        folder / "compare" / "timeline.png",
        "",
    )  # fmt: skip
    (folder / "compare" / "trace.json").write_text("{}")
    sweep = {"batches": {"8": ways[:1], "16": ways}}
    Record("predicted", "predict", "v4", sweep).save(folder / "sweep.json")
    return folder


def test_the_page_has_every_record_and_its_circumstances(results):
    text = report.page(report.sections(results))
    predicted, measured = text.split("## Measured")
    assert "| ring" in predicted and "**Predicted** for v4" in predicted
    assert "Accuracy: 5 %." in predicted
    assert "**Measured** for cpu" in measured and "On a busy machine." in measured
    assert "3610" in measured and "**Predicted**" not in measured
    for path in results.rglob("*.json"):
        record = json.loads(path.read_text())
        if record:
            assert f"{record['date'][:10]}, commit {record['commit'] or 'unknown'}; " in text
            assert f"jax {record['versions']['jax']}" in text


def test_writing_twice_is_writing_once_and_check_sees_a_change(results, tmp_path, capsys):
    page = tmp_path / "docs" / "benchmarks.md"
    asked = ["--results", str(results), "--page", str(page)]
    assert main([*asked, "--check"]) == 1
    assert main(asked) == 0
    first = page.read_text()
    assert main(asked) == 0 and page.read_text() == first
    assert main([*asked, "--check"]) == 0
    names = {path.name for path in page.parent.glob("*.png")}
    assert names == {
        "benchmarks-compare-compare-roofline.png",
        "benchmarks-compare-timeline.png",
        "benchmarks-sweep-mfu-against-tokens.png",
    }
    assert all(f"]({name})" in first for name in names)
    (page.parent / "benchmarks-compare-timeline.png").unlink()
    assert main([*asked, "--check"]) == 1
    main(asked)
    shutil.rmtree(results / "compare")
    assert main([*asked, "--check"]) == 1
    assert "python -m bench report" in capsys.readouterr().out


def test_the_committed_page_is_what_the_committed_results_give():
    assert main(["--check"]) == 0


def test_a_file_that_is_no_result_is_an_error_that_names_it(tmp_path):
    (tmp_path / "other.json").write_text('{"a": 1}')
    with pytest.raises(commands.UserError, match=r"other\.json"):
        main(["--results", str(tmp_path), "--check"])


def test_a_prediction_has_its_lower_bound_beside_it():
    row = predicted_tables.flat(prediction("ring", 1.0))
    assert row["step ms"] == 1000.0
    # 100 TFLOP a device at 275 TFLOP/s; 45 GB through 6 links of 45 GB/s take 167 ms.
    assert row["lower bound ms"] == pytest.approx(1e3 * 100 / 275)
    assert row["MFU %"] == 50.0 and row["hidden %"] == 75.0
    memory = {"used": 2**36, "limit": 2**35}
    failed = prediction("gspmd", 1.0, overlap=None, out_of_memory=memory) | {"seconds": None}
    assert predicted_tables.flat(failed)["note"] == "out of memory: needs 64.0 GiB of 32.0 GiB"


def test_a_roofline_has_the_intensity_of_the_instructions():
    (table,) = predicted_tables.tables({"rows": [prediction("ring", 1.0)]})
    (plot,) = table["plots"]
    (point,) = plot["rows"]  # a copy has none
    assert point[predicted_tables.INTENSITY] == pytest.approx(1.2e12 / (0.5 * 1200e9 * 0.01))
    assert point[predicted_tables.RATE] == pytest.approx(120.0)


def test_cells_and_tables():
    assert [cell(x) for x in (None, True, 12345, 0.12345, 123456.7, 1e-7, "a|b")] == [
        "-", "yes", "12,345", "0.1235", "123,457", "1.000e-07", "a\\|b",
    ]  # fmt: skip
    head, rule, first, second = markdown(ROWS).splitlines()
    assert head.split("|")[2].strip() == "step ms" and rule.split("|")[2].endswith(":")
    assert "3610" in first and second.count("|") == head.count("|") + 1  # one is escaped
