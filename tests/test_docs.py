"""What the README and the pages say is true: code runs, commands work, links lead somewhere."""

import ast
import importlib.util
import inspect
import os
import pathlib
import pkgutil
import re
import subprocess
import sys

import pytest

import collective_matmul

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[1]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
    if "_build" not in path.parts
)
specification = importlib.util.spec_from_file_location("reference", ROOT / "docs" / "reference.py")
reference = importlib.util.module_from_spec(specification)
specification.loader.exec_module(reference)

# Every command that a page shows, and what runs it: HERE (this file: it takes seconds), CI (it is
# in a script of .ci/), another command (which it is, with other variables or arguments), a test
# (file::name), or READER: it changes the reader's machine or needs a network, so nothing runs it.
HERE, CI, READER = "here", "ci", "reader"
COMMANDS = {
    ".ci/run": CI,
    ".ci/test": CI,
    ".ci/test -k lanes": ".ci/test",
    ".ci/train": CI,
    "PYTHON=python3.13 VENV=.venv-newest .ci/test": ".ci/test",
    "mypy": CI,
    "pre-commit run --all-files": READER,
    "python -m bench calibrate": "tests/test_calibration.py::test_the_commands",
    "python -m bench gpu --json runs/gpu.json": (
        "tests/test_measure.py::test_gpu_runs_on_a_cpu_and_claims_nothing"
    ),
    "python -m bench grid --chips v5e --axis-sizes 4 --tokens 2048 --out runs/grid": (
        "tests/test_growth.py::test_a_grid_of_one_point"
    ),
    "python -m bench growth --out runs/growth": "tests/test_growth.py::test_curves",
    "python -m bench kernels runs/step.txt --chip v4": (
        "tests/test_kernels.py::test_the_command_lists_kernels"
    ),
    "python -m bench measure --quick": (
        "tests/test_measure.py::test_measure_runs_the_suites_and_reports_ratios"
    ),
    "python -m bench predict --compare --mesh data=16,fsdp=16,tensor=4 --batch 16384 "
    "--remat products --out runs/vit22b-v4": (
        "tests/test_bench_cli.py::test_all_baselines_in_one_go"
    ),
    "python -m bench predict --model B/16 --topology v5e:2x4 --mesh data=2,tensor=4 --sweep "
    "--baselines two_way gspmd fsdp": "tests/test_bench_cli.py::test_a_sweep_over_tokens_a_chip",
    "python -m bench predict --model vit_22b --topology v4:8x8x16 --mesh "
    "data=16,fsdp=16,tensor=4 --batch 16384 --remat products": (
        "tests/test_predict.py::test_a_training_step_is_predicted"
    ),
    "python -m bench predict-op --topology v5e:2x4 --m 8192 --k 6144 --n 24576": (
        "tests/test_predict.py::test_predict_op_tells_whether_the_cost_model_is_right"
    ),
    "python -m bench regress": "tests/test_calibration.py::test_the_commands",
    "python -m bench report": (
        "tests/test_report.py::test_writing_twice_is_writing_once_and_check_sees_a_change"
    ),
    "python -m bench sockets --json runs/sockets.json": (
        "tests/test_sockets.py::test_a_small_measurement"
    ),
    "python -m bench data --json runs/data.json": "tests/test_data_throughput.py::test_the_command",
    "python -m models.configs diff mu digits": (
        "tests/test_reporting.py::test_configs_are_listed_shown_and_compared"
    ),
    "python -m models.configs list": HERE,
    "python -m models.configs show digits --optim.lr 3e-3": HERE,
    "python -m models.data.pack photographs shards": (
        "tests/test_data_records.py::test_the_manifest_says_what_was_packed"
    ),
    "python -m models.data.verify shards": (
        "tests/test_data_records.py::test_verify_names_what_is_damaged"
    ),
    "python -m models.features digits --weights runs/digits/weights.safetensors --images digits "
    "--out runs/features": "tests/test_features.py::test_two_processes_write_what_one_does",
    "python -m models.supervise --processes 2 --restarts 10 -- python -m models.train digits "
    "--checkpoint.every 100": (
        "tests/test_faults.py::test_a_sigterm_to_one_of_two_processes_saves_and_loses_nothing"
    ),
    "python -m models.supervise --processes 2 --restarts 100 --healthy 5 --chaos 20 -- python -m "
    "models.train digits --checkpoint.every 25": (
        "tests/test_faults.py::test_a_run_whose_processes_are_killed_at_random_ends_as_unbroken"
    ),
    "python -m models.supervise --restarts 10 -- python -m models.train digits --checkpoint.every "
    "100": "tests/test_watch.py::test_what_fails_is_started_again",
    "python -m models.stability": "tests/test_stability.py::test_every_combination_is_a_run",
    "python -m models.train b16_384 --start.path B_16.npz": READER,
    "python -m models.train digits": "tests/test_train.py::test_the_readmes_command",
    "python -m models.train digits --dry-run": (
        "tests/test_reporting.py::test_a_dry_run_compiles_for_this_machine_and_leaves_nothing"
    ),
    "python -m models.train digits --dry-run v5e:2x4": (
        "tests/test_reporting.py::test_a_dry_run_predicts_for_a_slice_and_refuses_another_mesh"
    ),
    "python -m models.train mu": HERE,
    "python -m models.train mu --checkpoint.every 50 --steps 100 --out runs/again": (
        "tests/test_faults.py::test_an_interrupted_run_has_the_chain_of_an_unbroken_one"
    ),
    "python -m models.train mu --checkpoint.every 50 --steps 200 --out runs/again": (
        "tests/test_faults.py::test_an_interrupted_run_has_the_chain_of_an_unbroken_one"
    ),
    "python -m models.train digits --help": HERE,
    "python -m models.train digits --mesh 1,2,4 --layout features --algorithm bidirectional "
    "--steps 10 --out runs/features": HERE,
    "python -m models.train digits --mesh 1,1,1 --model.dtype bfloat16 --optim.lr 3e-3 "
    "--loss softmax --steps 10 --out runs/bfloat16": HERE,
    "python -m models.train digits --mesh 1,1,1 --data.source synthetic --data.samples 512 "
    "--steps 10 --out runs/synthetic": HERE,
    "python -m models.train stability --model.style.qk-norm None --out runs/unnormed": (
        "tests/test_stability.py::test_every_combination_is_a_run"
    ),
    "ruff check .": CI,
    "ruff format .": READER,
    "ruff format --check .": CI,
    "sphinx-build -E -W -q docs docs/_build": HERE,
}


def blocks(page, *languages):
    """(first line's number, text) of every fenced block of a page in one of the languages."""
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    found, start = [], None
    for number, line in enumerate(lines, 1):
        fence = re.match(r"\s*```+\s*([\w{}-]*)", line)
        if fence and start is None:
            start, wanted = number + 1, fence[1] in languages
        elif fence:
            if wanted:
                found.append((start, "\n".join(lines[start - 1 : number - 1]) + "\n"))
            start = None
    return found


def commands(page):
    """The command lines of a page, without prompts, comments and the output of console blocks."""
    found = []
    for _, text in blocks(page, "sh", "bash", "shell"):
        found += text.replace("\\\n", " ").splitlines()
    for _, text in blocks(page, "console"):
        found += [line[2:] for line in text.splitlines() if line.startswith("$ ")]
    stripped = [re.sub(r"(^|\s+)#.*$", "", line).strip() for line in found]
    return [" ".join(line.split()) for line in stripped if line]


SCRIPTS = [
    line
    for name in ("run", "setup", "test", "train")
    for line in (ROOT / ".ci" / name).read_text(encoding="utf-8").splitlines()
    if not line.lstrip().startswith("#")
]


def run(*command, **variables):
    """Runs a command in the checkout, with this environment activated and 8 simulated devices."""
    variables |= {"PATH": os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]}
    result = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "8"} | variables,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, f"{command} failed:\n{result.stdout}\n{result.stderr}"


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_python_blocks_run(page, tmp_path):
    """The blocks of a page, top to bottom, are one script; a failure shows the line of the page."""
    script = tmp_path / "blocks.py"
    parts = [
        f"exec(compile({chr(10) * (line - 1) + text!r}, {page!r}, 'exec'), names)\n"
        for line, text in blocks(page, "python")
    ]
    script.write_text("names = {'__name__': '__main__'}\n" + "".join(parts))
    run(sys.executable, str(script), PYTHONPATH=str(ROOT))


@pytest.mark.parametrize("page", PAGES)
def test_something_runs_every_command(page):
    for command in commands(page):
        assert command in COMMANDS, f"{page} shows `{command}`: say in COMMANDS what runs it"


@pytest.mark.parametrize("command", COMMANDS)
def test_the_table_of_commands_is_true(command):
    assert any(command in commands(page) for page in PAGES), f"no page shows `{command}`"
    place = COMMANDS[command]
    if place == HERE:
        run("sh", "-c", command)
    elif place == CI:
        assert command == ".ci/run" or any(command in line for line in SCRIPTS), (
            f"no script in .ci/ runs `{command}`"
        )
    elif "::" in place:
        path, name = place.split("::")
        defined = ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8")))
        assert any(isinstance(f, ast.FunctionDef) and f.name == name for f in defined), place
    elif place != READER:
        assert re.sub(r"^(\w+=\S+ )*", "", command).startswith(place) and place in COMMANDS, place


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page):
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) + re.findall(r'src="([^"]+)"', text)
    for target in targets:
        if not re.match(r"[a-z]+:", target):
            assert (ROOT / page).parent.joinpath(target).exists(), f"{page} links to {target}"


def library():
    """Every module of the library."""
    found = pkgutil.walk_packages(collective_matmul.__path__, "collective_matmul.")
    return [collective_matmul, *(importlib.import_module(module.name) for module in found)]


def public_functions():
    """(name, function) of the functions that the library, dense and nn offer."""
    for module in library():
        if module.__name__ in (
            "collective_matmul",
            "collective_matmul.dense",
            "collective_matmul.nn",
        ):
            for name, value in reference.public(module).items():
                if inspect.isfunction(value):
                    yield pytest.param(name, value, id=f"{module.__name__}.{name}")


@pytest.mark.parametrize("module", library(), ids=lambda module: module.__name__)
def test_every_public_name_is_documented(module):
    """reference.docstring raises where there is nothing to read."""
    assert reference.docstring(module, module.__name__)
    for name, value in reference.public(module).items():
        assert reference.docstring(value, name)
        methods = inspect.getmembers(value, inspect.isfunction) if inspect.isclass(value) else []
        for method, function in methods:
            if not method.startswith("_") and function.__module__ == module.__name__:
                assert reference.docstring(function, f"{name}.{method}")


@pytest.mark.parametrize("name, function", list(public_functions()))
def test_args_are_the_arguments(name, function):
    """Args lists the parameters that there are, in order: none is missing, none is a leftover."""
    _, sections = reference.sections(reference.docstring(function, name))
    documented = [arg for names in reference.entries(sections["Args"]) for arg in names.split(", ")]
    assert documented == list(inspect.signature(function).parameters)
    assert sections["Returns"]
