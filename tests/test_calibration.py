"""Published measurements, their rebuilt programs, and the sums over their errors."""

import importlib.metadata
import json
import re

import pytest

from bench.commands import UserError, calibrate, regress
from bench.commands.calibrate import BEGIN, END, PAGE, PATH, replaced
from bench.predicted import reproductions
from bench.predicted.calibration import Result, Summary, key, page, predict, restored, summary
from bench.predicted.points import POINTS, Point
from bench.predicted.regression import CASES, TOLERANCE, changes, explain
from bench.predicted.regression import predict as predict_case
from bench.record import Record, load
from collective_matmul import hardware

from .helpers import needs_compiler

pytestmark = pytest.mark.slow

COUNTED = [point for point in POINTS if point.program]


def point(**changes):
    fields = dict(name="x", chip="v5e", value=2.0, unit="ms", source="https://a", program="product")
    return Point(**(fields | changes))


def result(error, **changes):
    return Result(point(**changes), 2e-3 * (1 + error), 0.0, 0)


def test_every_point_has_a_source_a_chip_and_a_program_or_a_reason():
    for each in POINTS:
        assert each.source.startswith("https://")
        assert hardware.chip(each.chip).name == each.chip
        assert each.excluded or callable(getattr(reproductions, each.program))
        assert each.excluded or each.seconds > 0
    assert len({key(x) for x in COUNTED}) == len(COUNTED)
    assert {x.chip for x in COUNTED} == {"v4", "v5e", "v5p", "v6e", "7x"}


def test_a_rate_is_a_time():
    """8192^3 at the published 827.474 TFLOP/s is the published 1.328756 ms."""
    rate = point(value=827.474382048629, unit="TFLOP/s", work=2.0 * 8192**3)
    assert rate.seconds == pytest.approx(1.328756094e-3, rel=1e-6)
    assert point(value=311, unit="us").seconds == pytest.approx(311e-6)


def test_vit_22b_is_its_mfu():
    """1,150 tokens/s on a v4 are 3.56 s for 4,096 tokens, and 54.93% of the peak."""
    (vit,) = (x for x in POINTS if x.name.startswith("ViT-22B"))
    assert vit.seconds == pytest.approx(16 * 256 / 1150)
    assert vit.work / vit.seconds / 275e12 == pytest.approx(0.5493, abs=5e-5)
    (maxtext,) = (x for x in POINTS if x.name.startswith("MaxText 22B"))
    assert maxtext.work / maxtext.seconds / 275e12 == pytest.approx(0.567, abs=5e-4)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(unit="TFLOP/s"), "needs the work"),
        (dict(unit="fortnights"), "'fortnights' is none of"),
        (dict(program=""), "give a program, or the reason"),
        (dict(excluded="no"), "give a program, or the reason"),
    ],
)
def test_a_point_that_is_none_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        point(**changes)


def test_a_summary_ignores_signs_but_the_bias_does_not():
    told = Summary.of([result(0.1), result(-0.3), result(-0.05)])
    assert told.points == 3
    assert told.median_error == pytest.approx(0.1)
    assert told.worst_error == pytest.approx(0.3)
    assert told.bias == pytest.approx(-0.05)
    assert Summary.of([]) is None


def test_a_summary_by_chip_and_without_what_was_inferred():
    told = summary([result(0.1), result(0.3, chip="v4", inferred="the chip")])
    assert told["chips"]["v5e"]["median_error"] == pytest.approx(0.1)
    assert told["chips"]["v4"]["worst_error"] == pytest.approx(0.3)
    assert told["overall"]["points"] == 2 and told["stated"]["points"] == 1


def test_results_are_restored_for_points_that_are_the_same():
    before = result(0.1)
    rows = json.loads(json.dumps([before.as_dict()]))
    assert restored([before.point], rows) == [before]
    assert restored([point(value=3.0)], rows) == []
    assert restored([point(arguments={"n": 1})], rows) == []


def test_the_page_says_errors_inferences_and_exclusions():
    results = [result(-0.1), result(0.2, chip="v4", inferred="the chip is a guess")]
    excluded = point(program="", excluded="nobody knows it")
    record = Record("predicted", "calibrate", "TPU", {})
    text = page(results, [*(x.point for x in results), excluded], record)
    assert "predicted for TPU" in text and "the chip is a guess" in text
    assert re.search(r"\| v5e +\| +1 \| +10 \|", text)
    assert "nobody knows it" in text and "<https://a>" in text


def test_only_what_is_between_the_marks_is_replaced():
    text = f"a\n{BEGIN}\nold\n{END}\nz\n"
    assert replaced(text, "new") == f"a\n{BEGIN}\n\nnew\n\n{END}\nz\n"
    assert replaced(replaced(text, "x"), "new") == replaced(text, "new")
    with pytest.raises(UserError, match="no line"):
        replaced("a", "new")


def test_the_page_and_the_results_are_of_the_points_as_they_are():
    record = load(PATH)
    assert record.kind == "predicted"
    rows = record.result["points"]
    assert {row["key"] for row in rows} == {key(x) for x in COUNTED}
    again = json.loads(json.dumps(summary(restored(COUNTED, rows))))
    assert again == {name: record.result[name] for name in again}
    assert record.date in PAGE.read_text(encoding="utf-8")


@needs_compiler
def test_a_point_is_compiled_and_predicted():
    """As in the file, by the same compiler. Its products alone take 8 ms at the peak."""
    record = load(PATH)
    installed = importlib.metadata.version("libtpu")
    if record.versions["libtpu"] != installed:
        pytest.skip(f"the file is of libtpu {record.versions['libtpu']}, this is {installed}")
    (found,) = (x for x in COUNTED if x.program == "maxtext_collective")
    (row,) = (row for row in record.result["points"] if row["key"] == key(found))
    told = predict(found)
    assert told.uncosted == 0
    assert told.predicted > 8.0e-3
    assert told.predicted == pytest.approx(row["predicted_seconds"], rel=TOLERANCE)


FIGURES = {
    "seconds": 1.0,
    "compute": 0.9,
    "exposed": 0.1,
    "flops": 10,
    "wire_bytes": 5.0,
    "hbm_peak": 100,
    "parts": {"compute: a": 0.5, "compute: b": 0.4, "exposed: c": 0.1},
    "versions": {"libtpu": "1"},
}


def test_a_change_beyond_the_tolerance_is_found_and_explained():
    assert changes(FIGURES, FIGURES) == {} == changes(FIGURES, {**FIGURES, "seconds": 1.019})
    slower = {**FIGURES, "seconds": 1.2, "parts": {"compute: a": 0.7, "compute: b": 0.4}}
    assert changes(FIGURES, slower) == {"seconds": pytest.approx(0.2)}
    first, second = explain(FIGURES, slower)
    assert first["part"] == "compute: a" and first["change us"] == pytest.approx(0.2e6)
    assert second["part"] == "exposed: c" and second["now us"] == 0.0


def test_what_is_exposed_is_judged_beside_the_step():
    assert changes(FIGURES, {**FIGURES, "exposed": 0.11}) == {}
    assert changes(FIGURES, {**FIGURES, "exposed": 0.13}) == {"exposed": pytest.approx(0.03)}


def test_another_compiler_is_not_judged():
    slower = {**FIGURES, "seconds": 2.0}
    assert regress.verdict("x", FIGURES, slower)[1]
    text, judged = regress.verdict("x", FIGURES, {**slower, "versions": {"libtpu": "2"}})
    assert not judged and "not judged" in text and "seconds +100.0%" in text
    assert regress.verdict("x", None, slower)[1] is False


def test_a_program_that_this_jax_cannot_read_is_not_judged(monkeypatch, capsys, tmp_path):
    def unread(case):
        raise ValueError("jax 0.10.2 cannot read what the compiler wrote")

    monkeypatch.setattr(regress, "predict", unread)
    golden = tmp_path / "golden.json"
    golden.write_text('{"7x gather two_way": {"seconds": 1.0}}')
    asked = ["--only", "^7x gather two_way$", "--golden", str(golden)]
    assert regress.main(asked) == 0
    told = capsys.readouterr().out
    assert told == "7x gather two_way: not judged: jax 0.10.2 cannot read what the compiler wrote\n"
    assert regress.main([*asked, "--update"]) == 0
    assert json.loads(golden.read_text()) == {"7x gather two_way": {"seconds": 1.0}}


@needs_compiler
@pytest.mark.parametrize("name", ["v4 gather two_way", "v6e scatter unfused"])
def test_golden_figures_hold(name):
    golden = json.loads(regress.PATH.read_text(encoding="utf-8"))[name]
    installed = importlib.metadata.version("libtpu")
    if golden["versions"]["libtpu"] != installed:
        pytest.skip(f"the golden figures are of libtpu {golden['versions']['libtpu']}")
    new = predict_case(CASES[name])
    assert changes(golden, new) == {}, explain(golden, new)


@needs_compiler
def test_the_commands(capsys):
    assert calibrate.main(["--only", "7x copy of 2 MiB"]) == 0
    assert re.fullmatch(r"7x copy of 2 MiB .*, published 3.041 us: .*%\n", capsys.readouterr().out)
    assert regress.main(["--only", "^v5e gather two_way$"]) == 0
    assert "v5e gather two_way: " in capsys.readouterr().out
    with pytest.raises(UserError, match="matches none of"):
        regress.main(["--only", "nothing"])
