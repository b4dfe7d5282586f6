"""Sphinx configuration: the pages are Markdown, and reference.md is filled in from the docstrings.

Sphinx with MyST rather than MkDocs: MkDocs has had no release since 2024, its successors are young,
and `sphinx-build -W` makes every warning an error.
"""

import pathlib
import sys
import tomllib

FOLDER = pathlib.Path(__file__).parent
sys.path[:0] = [str(FOLDER), str(FOLDER.parent)]

import reference  # noqa: E402, the file beside this one

release = tomllib.loads((FOLDER.parent / "pyproject.toml").read_text())["project"]["version"]

project = "collective-matmul"
project_copyright = "the collective-matmul contributors, Apache-2.0"
extensions = ["myst_parser"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = f"collective-matmul {release}"
exclude_patterns = ["_build"]


def setup(app):
    """Fills in the names of a module wherever reference.md says {{ module }}."""

    def read(_app, page, source):
        if page == "reference":
            source[0] = reference.fill_in(source[0])

    app.connect("source-read", read)
