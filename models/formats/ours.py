"""Our own: safetensors with flat names, each array as an ordinary Dense layer has it, cut nowhere.

The blocks' are stacked over layers. The config is in the header, so the file says what it is.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from models.arrays.format import PLAIN, Entry, Format, Shape
from models.arrays.reading import Source
from models.vit_config import Config, Style

RUN = ("dtype", "remat", "unroll")
"""Fields that say how a model runs, not what it is."""


def _entries(_: Config, shapes: Mapping[str, Shape]) -> list[Entry]:
    return [Entry(name, (name,)) for name in shapes]


def _metadata(config: Config) -> dict[str, str]:
    fields = dataclasses.asdict(config)
    return {"vit": json.dumps({name: x for name, x in fields.items() if name not in RUN})}


def _describe(source: Source) -> tuple[dict[str, Any], dict[str, Any]]:
    if "vit" in source.metadata:
        stated = json.loads(source.metadata["vit"])
        for name in ("style", "head_style"):
            stated[name] = Style(**stated[name])
        if isinstance(stated["image_size"], list):
            stated["image_size"] = tuple(stated["image_size"])
        return stated, {}
    return {}, {}


FORMAT = Format(
    suffix=".safetensors",
    arrangement=PLAIN,
    entries=_entries,
    recognises=lambda names: "embedding.kernel" in names,
    unsupported=lambda _: None,
    describe=_describe,
    metadata=_metadata,
)
