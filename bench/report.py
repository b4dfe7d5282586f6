"""One page of all results: every record of a folder as a table, beside what it was made with.

A record's `result` has

    "title"     of its section
    "order"     of its section among those of its kind; by default the last
    "rows"      flat dictionaries, a row of the table each; or "tables", a list of
                {"title", "rows", "remarks", "plots"}
    "remarks"   sentences that go below
    "plots"     pictures to draw of the rows; see `bench.plots.draw`

and records of whole predictions are read by `bench.predicted_tables`. A record that has a folder of
its own brings the pictures in it along, such as its timeline.
"""

from __future__ import annotations

import dataclasses
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

from bench import plots, predicted_tables
from bench.record import Record, load
from bench.tables import markdown

HEAD = """# Benchmarks

This page is made of the files in `bench/results` by `python -m bench report`; nothing in it is
written by hand. A *measured* time is that of a clock beside a device that ran. A *predicted* time
is a model's: the TPU compiler's cycles and a model of the links, for chips that were not there.
[Accounting](accounting.md) says what an MFU divides.
"""
KINDS = {
    "predicted": "## Predicted\n\nNothing in this part ran on the chips that it names.\n",
    "measured": "## Measured\n\nOn the devices that are named, by wall-clock time.\n",
}
ORDER = {"predict": 10, "predict-op": 30}  # of a command's records that say none
LAST = 100
PREFIX = "benchmarks-"  # of the pictures' files


@dataclasses.dataclass(frozen=True)
class Section:
    """A record, where it is from, and what it shows."""

    path: pathlib.Path
    folder: pathlib.Path
    record: Record

    @property
    def name(self) -> str:
        """Of its pictures: the file's, and that of its folder if it has one of its own."""
        return "-".join(self.path.relative_to(self.folder).with_suffix("").parts)

    @property
    def title(self) -> str:
        """What it is about: its own words, or the command with what it was asked for."""
        options = self.record.result.get("options", {})
        flags = "".join(f" --{x}" for x in ("compare", "sweep") if options.get(x) == "True")
        asked = ", ".join(options[x] for x in ("model", "mode", "topology") if x in options)
        named = f"{self.record.command}{flags}: {asked or self.name}"
        return str(self.record.result.get("title") or named)

    @property
    def order(self) -> tuple[int, str]:
        """Its place on the page."""
        first = 20 if "batches" in self.record.result else ORDER.get(self.record.command, LAST)
        own = self.record.result.get("order", first)
        return own, self.path.relative_to(self.folder).as_posix()

    @property
    def tables(self) -> list[dict[str, Any]]:
        """The tables, each with its rows.

        Raises:
          ValueError: if the record has none.
        """
        result = self.record.result
        found = predicted_tables.tables(result) or result.get("tables")
        if not found and "rows" in result:
            found = [{"rows": result["rows"], "plots": result.get("plots", ())}]
        if not found:
            raise ValueError(
                f"{self.path} has neither rows nor tables, so there is nothing to show"
            )
        return list(found)

    def drawn(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Every plot with its file's name."""
        for table in self.tables:
            for plot in table.get("plots", ()):
                yield f"{PREFIX}{self.name}-{plot['name']}.png", {"rows": table["rows"]} | plot

    def copied(self) -> Iterator[tuple[str, pathlib.Path]]:
        """Every picture that is there already, with its file's name on the page."""
        if self.path.parent != self.folder:
            first = "-".join(self.path.parent.relative_to(self.folder).parts)
            for picture in sorted(self.path.parent.glob("*.png")):
                yield f"{PREFIX}{first}-{picture.name}", picture


def sections(folder: pathlib.Path) -> list[Section]:
    """The records under a folder, in the page's order; traces beside them are no records.

    Raises:
      ValueError: if a file is no record.
    """
    paths = [x for x in folder.rglob("*.json") if "trace" not in x.stem]
    found = [Section(path, folder, load(path)) for path in paths]
    return sorted(found, key=lambda section: section.order)


def page(found: list[Section]) -> str:
    """The Markdown page: the same for the same records."""
    parts = [HEAD]
    for kind, head in KINDS.items():
        of_kind = [x for x in found if x.record.kind == kind]
        parts += [head, *map(_text, of_kind)] if of_kind else []
    return "\n".join(parts)


def pictures(found: list[Section], folder: pathlib.Path) -> list[pathlib.Path]:
    """Draws and copies every picture of the page into `folder`."""
    made = []
    for section in found:
        record = section.record
        about = f"{record.kind}, {record.chip}, {record.date[:10]}, commit {record.commit or '-'}"
        for name, plot in section.drawn():
            plots.draw(plot, folder / name, about)
            made.append(folder / name)
        for name, source in section.copied():
            shutil.copyfile(source, folder / name)
            made.append(folder / name)
    return made


def _text(section: Section) -> str:
    record, result = section.record, section.record.result
    versions = ", ".join(f"{name} {version}" for name, version in record.versions.items())
    lines = [
        f"### {section.title}\n",
        f"**{record.kind.capitalize()}** for {record.chip} by `python -m bench {record.command}`, "
        f"{record.date[:10]}, commit {record.commit or 'unknown'}; {versions}. "
        f"From `bench/results/{section.path.relative_to(section.folder).as_posix()}`.\n",
    ]
    if "options" in result:
        asked = (f"{key} {value}" for key, value in result["options"].items() if key != "out")
        lines.append(f"Asked for: {', '.join(x for x in asked if not x.endswith('None'))}.\n")
    for table in section.tables:
        if "title" in table:
            lines.append(f"{table['title']}, {record.kind}:\n")
        lines.append(markdown(table["rows"]) + "\n")
        lines += [f"{remark}\n" for remark in table.get("remarks", ())]
    if "accuracy" in result:
        lines.append(f"Accuracy: {result['accuracy']}.\n")
    lines += [f"{remark}\n" for remark in result.get("remarks", ())]
    named = [*section.drawn(), *section.copied()]
    lines += [f"![{section.title}, {record.kind}]({name})\n" for name, _ in named]
    return "\n".join(lines)
