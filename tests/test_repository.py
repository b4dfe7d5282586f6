"""The rules that hold for the repository as a whole."""

import ast
import pathlib
import re
import subprocess
import sys
import tomllib
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[1]
LIBRARY = ROOT / "collective_matmul"

# The floors of the library, from the ground up. A module imports from the floors below its own, and
# nothing else of ours.
FLOORS = (
    ("lanes", "spec", "varying", "hardware", "torus", "steps", "memory"),
    ("operation", "mesh", "slab", "compiling"),
    ("product", "walk", "plain"),
    ("algorithms", "backends", "inspect"),
    ("cost",),
    ("arguments",),
    ("duality", "stepwise", "explain"),
    ("einsum", "collectives"),
    ("layout",),
    ("joined", "replay", "ahead"),
    ("per_device", "operands"),
    ("dense",),
    ("nn",),
)
FLOOR = {module: number for number, modules in enumerate(FLOORS) for module in modules}

# What of ours each folder may not import.
ABOVE = {"collective_matmul": ("models", "bench"), "models": ("bench",)}

# Committed files that are not text.
BINARY = (".png", ".npz", ".safetensors")

# {module: its files}; algorithms/ring.py belongs to the module algorithms.
MODULES: dict[str, list[pathlib.Path]] = {}
for source in sorted(LIBRARY.rglob("*.py")):
    MODULES.setdefault(source.relative_to(LIBRARY).with_suffix("").parts[0], []).append(source)
del MODULES["__init__"]


def committed():
    """Every file that is committed, or would be."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listing.returncode:
        pytest.skip("not a git checkout, so which files are committed is not known")
    return [ROOT / name for name in listing.stdout.split("\0") if name and (ROOT / name).is_file()]


def texts():
    """(path, text) of every committed file that is text."""
    for path in committed():
        try:
            yield path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            assert path.suffix in BINARY, f"{path} is neither text nor known to be binary"


def imports(path):
    """(line, dotted name) of everything that a file imports; `from a import b` is `a.b`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            here = path.relative_to(ROOT).with_suffix("").parts
            base = [*(here[: -node.level] if node.level else ()), *(node.module or "").split(".")]
            yield from ((node.lineno, ".".join([*filter(None, base), x.name])) for x in node.names)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_down(module):
    assert module in FLOOR, f"{module} has no floor: say in FLOORS what it may stand on"
    for path in MODULES[module]:
        for line, name in imports(path):
            top, *rest = name.split(".")
            if top == "collective_matmul" and rest[0] != module:
                below = FLOOR.get(rest[0], len(FLOORS)) < FLOOR[module]
                assert below, f"{path.name}:{line} imports {name}, which is not below {module}"


@pytest.mark.parametrize("folder", ABOVE)
def test_packages_depend_one_way(folder):
    for path in (ROOT / folder).rglob("*.py"):
        for line, name in imports(path):
            assert name.split(".")[0] not in ABOVE[folder], f"{path}:{line} imports {name}"


def test_only_dense_enters_shard_map():
    """Below dense, the library speaks of axis names and never sees a mesh."""
    for path in LIBRARY.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            entered = isinstance(node, ast.Attribute) and node.attr == "shard_map"
            assert path.name == "on_mesh.py" or not entered, f"{path}:{node.lineno} uses shard_map"


def test_the_wheel_holds_the_library_alone(tmp_path):
    pytest.importorskip("hatchling", reason="hatchling, which builds the wheel, is not installed")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True, stdin=subprocess.DEVNULL)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    folders = {name.split("/")[0] for name in names}
    assert folders == {"collective_matmul", f"collective_matmul-{version()}.dist-info"}
    sources = {path.relative_to(ROOT).as_posix() for path in LIBRARY.rglob("*.py")}
    assert sources | {"collective_matmul/py.typed"} <= set(names)


def version():
    with open(ROOT / "pyproject.toml", "rb") as file:
        return tomllib.load(file)["project"]["version"]


def test_versions_agree():
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^version: (\S+)$", citation, re.MULTILINE)[1] == version()
    assert re.search(r"^## \[(\d\S*)\]", changes, re.MULTILINE)[1] == version()


# Written in pieces, so that this file does not contain what it looks for.
REGISTRIES = [
    ".".join(host)
    for host in (
        ("pypi", "org"),
        ("pythonhosted", "org"),
        ("download", "pytorch", "org"),
        ("anaconda", "org"),
        ("npmjs", "org"),
        ("crates", "io"),
        ("jax-releases", "storage", "googleapis", "com"),
    )
]
FOLDERS = ("home", "opt", "root", "tmp", "Users", "work")
PERSONAL = re.compile(r"(?<![\w./:$}~-])/(" + "|".join(FOLDERS) + r")/\w")


def test_no_file_names_a_registry_or_one_persons_machine():
    for path, text in texts():
        for host in REGISTRIES:
            assert host not in text, f"{path} names the package registry {host}"
        place = PERSONAL.search(text)
        assert not place, f"{path} names a folder of one machine: {place and place[0]}"


def test_no_lock_file():
    """.ci/constraints.txt pins the versions; a lock file would name the registry they came from."""
    locks = {"uv.lock", "poetry.lock", "Pipfile.lock", "pdm.lock", "pylock.toml"}
    assert not locks & {path.name for path in committed()}


def test_scripts_are_executable_and_say_what_they_do():
    for name in ("run", "setup", "test", "train"):
        script = ROOT / ".ci" / name
        assert script.stat().st_mode & 0o111, f".ci/{name} is not executable"
        assert script.read_text(encoding="utf-8").startswith("#!/bin/sh\n# ")
