"""A folder of JPEG or PNG images, with or without class folders; see `models.data.catalogue`."""

from __future__ import annotations

import dataclasses

from models.data.catalogue import Catalogue, catalogue
from models.data.config import Data
from models.data.held_out import parted
from models.data.images import Sample, Shape, Split, Unreadable, Wanted


@dataclasses.dataclass(frozen=True)
class Folder:
    """A split of image files.

    Args:
      catalogue: which files, and their labels.
      shape: height, width and channels to make of each.
      columns: see `Split`.
    """

    catalogue: Catalogue
    shape: Shape
    columns: int

    def __len__(self) -> int:
        return len(self.catalogue.names)

    @property
    def classes(self) -> int | None:
        """See `Split`."""
        return None if self.catalogue.classes is None else len(self.catalogue.classes)

    @property
    def multilabel(self) -> bool:
        """See `Split`."""
        return self.catalogue.multilabel

    @property
    def fingerprint(self) -> str:
        """See `Split`."""
        return self.catalogue.fingerprint

    def read(self, sample: int) -> Sample:
        """See `Split`."""
        path = self.catalogue.root / self.catalogue.names[sample]
        try:
            picture = path.read_bytes()
        except OSError as error:
            raise Unreadable(f"{path} cannot be read: {error.strerror}") from error
        return Sample(picture, self.catalogue.labels[sample], str(path))


def splits(config: Data, wanted: Wanted) -> tuple[Split, Split]:
    """See `sources.splits`.

    Raises:
      ValueError: if there is no path, or what is there is not clear; see `catalogue`.
    """
    if config.path is None:
        raise ValueError("the source 'folder' needs a path: the folder that holds the images")

    def folder(images: Catalogue) -> Folder:
        return Folder(images, wanted.shape, wanted.columns(len(images.classes or ())))

    train = catalogue(config.path, labels=config.labels, hierarchy=config.hierarchy)
    if config.test_path is None:
        config.refuse("test_labels")
        return parted(folder(train), config.held_out)
    test = catalogue(
        config.test_path,
        labels=config.test_labels,
        hierarchy=config.hierarchy,
        classes=train.classes,
    )
    return folder(train), folder(test)
