"""Images packed into ArrayRecord shards by `python -m models.data.pack`: few large files."""

from __future__ import annotations

import bisect
import collections
import dataclasses
import itertools
import logging
import pathlib
import threading
from typing import Any

from array_record.python import array_record_module

from models.data import manifest as manifests
from models.data.config import Data
from models.data.held_out import parted
from models.data.images import Sample, Shape, Split, Unreadable, Wanted
from models.data.manifest import Manifest

LOG = logging.getLogger(__name__)
OPEN = 128  # shards that are held open by a process
OPTIONS = "readahead_buffer_size:0"  # records are read one by one, from anywhere


class Records:
    """A split of records.

    Args:
      root: the folder of the shards.
      manifest: what they hold.
      shape: height, width and channels to make of each image.
      columns: see `Split`.
      renumbered: the class that each number of a label stands for; None: its own.
    """

    def __init__(
        self,
        root: pathlib.Path,
        manifest: Manifest,
        shape: Shape,
        columns: int,
        renumbered: tuple[int, ...] | None = None,
    ) -> None:
        self.root = root
        self.manifest = manifest
        self.shape = shape
        self.columns = columns
        self.renumbered = renumbered
        self.classes = None if manifest.classes is None else len(manifest.classes)
        self.multilabel = manifest.multilabel
        self.fingerprint = manifest.fingerprint
        self._ends = list(itertools.accumulate(shard.records for shard in manifest.shards))
        self._readers: collections.OrderedDict[int, Any] = collections.OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self.manifest.samples

    def __getstate__(self) -> dict[str, Any]:
        # Open files and locks stay with their process.
        return self.__dict__ | {"_readers": collections.OrderedDict(), "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state | {"_lock": threading.Lock()}

    def read(self, sample: int) -> Sample:
        """See `Split`."""
        number = bisect.bisect_right(self._ends, sample)
        shard = self.manifest.shards[number]
        record = sample - self._ends[number] + shard.records
        where = f"record {record} of the shard {self.root / shard.file}"
        try:
            (data,) = self._reader(number).read([record])
            found = manifests.unpacked(data, shard.file, record)
        except Unreadable as error:
            raise Unreadable(f"{where} cannot be read: {error}") from error
        except Exception as error:  # the reader raises whatever C++ gave it
            raise Unreadable(f"{where} is damaged: {error}") from error
        labels = found.labels
        if self.renumbered is not None:
            labels = tuple(self.renumbered[label] for label in labels)
        return Sample(found.picture, labels, f"{where} ({found.name})")

    def _reader(self, number: int) -> Any:
        """An open shard. A reader is closed when nobody holds it any more."""
        with self._lock:
            if number in self._readers:
                self._readers.move_to_end(number)
                return self._readers[number]
            shard = self.manifest.shards[number]
            if complaint := manifests.complaint(self.root, shard):
                raise Unreadable(complaint)
            path = str(self.root / shard.file)
            reader = array_record_module.ArrayRecordReader(path, options=OPTIONS)
            # Of a file that is no ArrayRecord, a reader says that it has no records.
            if reader.num_records() != shard.records:
                raise Unreadable(
                    f"the shard {path} has {reader.num_records()} records that can be found, and "
                    f"not {shard.records}"
                )
            self._readers[number] = reader
            if len(self._readers) > OPEN:
                self._readers.popitem(last=False)
            return reader


def splits(config: Data, wanted: Wanted) -> tuple[Split, Split]:
    """See `sources.splits`.

    Raises:
      ValueError: if there is no path, no manifest, or a shard is missing or cut off; or if the test
        images have a class that the training images have not.
    """
    if config.path is None:
        raise ValueError("the source 'records' needs a path: the folder that holds the shards")
    config.refuse("labels", "test_labels", "hierarchy")  # they were packed
    manifest = manifests.load(config.path)
    classes = manifest.classes or ()
    width = wanted.columns(len(classes))
    train = Records(config.path, manifest, wanted.shape, width)
    _check(train, config)
    if config.test_path is None:
        return parted(train, config.held_out)
    others = manifests.load(config.test_path)
    if strange := sorted(set(others.classes or ()) - set(classes)):
        raise ValueError(
            f"{config.test_path} has the class {strange[0]!r} and {len(strange) - 1} more that "
            f"{config.path} has not"
        )
    number = {name: place for place, name in enumerate(classes)}
    renumbered = tuple(number[name] for name in others.classes or ())
    others = dataclasses.replace(others, classes=manifest.classes)
    test = Records(config.test_path, others, wanted.shape, width, renumbered)
    _check(test, config)
    return train, test


def _check(records: Records, config: Data) -> None:
    """Whether all shards are there in their sizes, before the first step and not in the middle."""
    for shard in records.manifest.shards:
        if complaint := manifests.complaint(records.root, shard):
            if not config.skip_bad_records:
                raise ValueError(f"{complaint}; restore it, or set skip_bad_records to go without")
            LOG.warning("%s; a run goes without its %d records", complaint, shard.records)
