"""A frozen model as a feature extractor: tokens, pooled features or any activation with a name.

tower = features.Tower(params, config, layers=("pooled", "block_5/output"), layout=layout)
for names, arrays in features.extract(tower, split, Data(source="digits"), batch=64):
    ...                               # arrays["pooled"]: [images, d], arrays["label"], ["index"]
names, arrays = features.read(folder) # what `python -m models.features` wrote
"""

from __future__ import annotations

from models.features.extraction import extract, names_of
from models.features.folder import Folder, read
from models.features.tower import Tower

__all__ = ["Tower", "extract", "names_of", "Folder", "read"]
