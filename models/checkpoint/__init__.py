"""Checkpoints that are whole, checked and the run's own: nothing that was saved is lost silently.

A `Folder` saves a state asynchronously, by shard, with checksums of its values, and restores the
newest one that is good, on any mesh.
"""

from models.checkpoint.alone import alone
from models.checkpoint.config import Checkpoints
from models.checkpoint.damage import Damage, Damaged, Mismatch
from models.checkpoint.folder import Folder
from models.checkpoint.lock import Held, Lock
from models.checkpoint.walking import Restored

__all__ = [
    "Checkpoints",
    "Damage",
    "Damaged",
    "Folder",
    "Held",
    "Lock",
    "Mismatch",
    "Restored",
    "alone",
]
