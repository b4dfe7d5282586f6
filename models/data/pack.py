"""Packs a folder of images into ArrayRecord shards: `python -m models.data.pack IMAGES OUT`.

Labels are those of `models.data.catalogue`. The shards and what they hold are listed with their
checksums in OUT/manifest.json, which is written last. A packing that was interrupted goes on after
its last whole shard when the same command is given again.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Annotated

import rich.console
import rich.progress
import tyro
from array_record.python import array_record_module

from models.data import manifest as manifests
from models.data.catalogue import Catalogue, catalogue
from models.data.images import Sample, Unreadable, digest
from models.data.manifest import Manifest, Shard
from models.data.pictures import check
from models.files import atomically

OPTIONS = "group_size:1,uncompressed"  # each record by itself; images are compressed already
DRAFT = "packing.json"  # the shards that are whole, until there is a manifest


@dataclasses.dataclass(frozen=True)
class Packing:
    """Packs a folder of images into ArrayRecord shards."""

    images: Annotated[pathlib.Path, tyro.conf.Positional]
    """the folder of images"""
    out: Annotated[pathlib.Path, tyro.conf.Positional]
    """the folder that the shards and manifest.json go to"""
    shard_size: int = 4096
    """images of a shard"""
    labels: pathlib.Path | None = None
    """a JSON or CSV file with the labels of each image; none: class folders, if there are any"""
    hierarchy: pathlib.Path | None = None
    """a JSON or CSV file with the parents of labels, which an image is given as well"""
    leave_out: bool = False
    """leave images out that are not readable, and say so in the manifest, instead of refusing"""
    threads: int = os.cpu_count() or 1
    """threads that read and decode"""


def main(arguments: Sequence[str]) -> int:
    """Packs, and returns the exit status."""
    config = tyro.cli(
        Packing,
        prog="python -m models.data.pack",
        args=arguments,
        config=(tyro.conf.FlagConversionOff,),
    )
    try:
        manifest = pack(config)
    except ValueError as error:
        print(f"python -m models.data.pack: {error}", file=sys.stderr)
        return 1
    classes = "no labels" if manifest.classes is None else f"{len(manifest.classes)} classes"
    size = sum(shard.bytes for shard in manifest.shards) / 1e6
    print(
        f"{manifest.samples} images of {classes} in {len(manifest.shards)} shards, {size:.1f} MB, "
        f"are in {config.out}; {len(manifest.left_out)} were left out"
    )
    return 0


def pack(config: Packing) -> Manifest:
    """Packs a folder, or what an interrupted packing of it has left to do.

    Args:
      config: what and where to.

    Returns:
      What is in the folder then.

    Raises:
      ValueError: if an image is not readable, labels are not clear, or the folder holds the shards
        of something else.
    """
    if config.shard_size < 1 or config.threads < 1:
        raise ValueError(
            f"shard_size={config.shard_size} and threads={config.threads} must be at least 1"
        )
    images = catalogue(config.images, labels=config.labels, hierarchy=config.hierarchy)
    plan = digest(images.fingerprint, str(config.shard_size), str(config.leave_out))
    shards, left_out = _begun(config.out, plan)
    if (config.out / manifests.NAME).exists():
        return manifests.load(config.out)
    _note(config.out, plan, shards, left_out)
    count = -(-len(images.names) // config.shard_size)
    console = rich.console.Console(stderr=True)
    with (
        rich.progress.Progress(console=console) as line,
        concurrent.futures.ThreadPoolExecutor(config.threads) as pool,
    ):
        task = line.add_task("packing", total=len(images.names))
        for number in range(count):
            part = range(len(images.names))[number * config.shard_size :][: config.shard_size]
            if number >= len(shards):
                file = f"images-{number:05}-of-{count:05}.array_record"
                found = list(pool.map(lambda place: _read(images, place), part))
                bad = {name: reason for name, reason in found if isinstance(reason, str)}
                if bad and not config.leave_out:
                    raise ValueError(
                        f"{next(iter(bad.values()))}; nor are {len(bad) - 1} more of the "
                        f"{len(part)} images of shard {number}; remove them, or set "
                        "--leave-out True"
                    )
                samples = [sample for _, sample in found if isinstance(sample, Sample)]
                shards.append(_written(config.out / file, samples))
                left_out |= bad
                _note(config.out, plan, shards, left_out)
            line.update(task, advance=len(part))
    manifest = Manifest(
        plan,
        images.classes,
        images.multilabel,
        sum(shard.records for shard in shards),
        # That of the folder: a run may go on from its shards. But what is left out gives other
        # samples its number.
        digest(images.fingerprint, *left_out) if left_out else images.fingerprint,
        tuple(shards),
        left_out,
    )
    manifest.save(config.out)
    (config.out / DRAFT).unlink()
    return manifest


def _begun(out: pathlib.Path, plan: str) -> tuple[list[Shard], dict[str, str]]:
    """The shards of an earlier packing by the same plan, and what it left out."""
    found = [out / name for name in (manifests.NAME, DRAFT) if (out / name).exists()]
    if not found:
        if out.is_dir() and any(out.iterdir()):
            raise ValueError(f"{out} is not empty, and no packing was interrupted there")
        return [], {}
    told = json.loads(found[0].read_text("utf-8"))
    if told["plan"] != plan:
        raise ValueError(
            f"{out} holds shards of other images, labels or sizes; remove it, or choose another"
        )
    for debris in out.glob(".images-*"):  # of a packing that was killed
        debris.unlink()
    shards = [Shard(**shard) for shard in told["shards"]]
    for shard in shards:
        if complaint := manifests.complaint(out, shard):
            raise ValueError(f"{complaint}; remove {out} and pack again")
    return shards, told["left_out"]


def _note(out: pathlib.Path, plan: str, shards: list[Shard], left_out: dict[str, str]) -> None:
    told = {"plan": plan, "shards": [dataclasses.asdict(x) for x in shards], "left_out": left_out}
    with atomically(out / DRAFT) as draft:
        draft.write_text(json.dumps(told) + "\n", "utf-8")


def _read(images: Catalogue, place: int) -> tuple[str, Sample | str]:
    """An image by its name, decoded for its own sake, or the reason why it cannot be."""
    name, labels = images.names[place], images.labels[place]
    path = images.root / name
    try:
        picture = path.read_bytes()
        check(Sample(picture, labels, str(path)))
    except (OSError, Unreadable) as error:
        return name, str(error)
    return name, Sample(picture, labels, name)


def _written(path: pathlib.Path, samples: Sequence[Sample]) -> Shard:
    with atomically(path) as draft:
        try:
            writer = array_record_module.ArrayRecordWriter(str(draft), OPTIONS)
            for record, sample in enumerate(samples):
                writer.write(manifests.packed(path.name, record, sample))
            writer.close()
        except RuntimeError as error:
            raise ValueError(f"{path} cannot be written: {error}") from error
        size, digits = draft.stat().st_size, manifests.sha256(draft)
    return Shard(path.name, len(samples), size, digits)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
