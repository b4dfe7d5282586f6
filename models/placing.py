"""Which rows of a batch a process brings, and how they come to its devices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from collective_matmul import Layout
from models.config import Config
from models.data import Batch

Placed = dict[str, jax.Array]


def rows_held(layout: Layout | None, batch: int) -> np.ndarray:
    """Which rows of a global batch this process has to bring: their numbers, [rows].

    Raises:
      ValueError: if the batch does not split: over the data axes, and in the classifier over the
        tensor axis as well.
    """
    if layout is None:
        return np.arange(batch)
    data, tensor = layout.size(layout.data), layout.size(layout.tensor)
    if batch % (data * tensor):
        raise ValueError(
            f"batch={batch} does not split over data x tensor = {data} x {tensor} devices, as the "
            f"classifier cuts it; choose a multiple of {data * tensor}"
        )
    place = NamedSharding(layout.mesh, P(layout.data))
    held = place.addressable_devices_indices_map((batch,)).values()
    return np.unique(np.concatenate([np.arange(batch)[index] for index in held if index]))


def place(batch: Batch, layout: Layout | None) -> Placed:
    """A batch on the devices, its rows over the data axes.

    Args:
      batch: {name: [rows, ...]}, the rows that `rows_held` says.
      layout: where arrays lie, or None for one device.
    """
    if layout is None:
        return {name: jax.device_put(rows) for name, rows in batch.items()}
    over = NamedSharding(layout.mesh, P(layout.data))
    # It asks for this transfer, though not by a name that jax's guard against hidden ones knows.
    with jax.transfer_guard_host_to_device("allow"):
        return {
            name: jax.make_array_from_process_local_data(over, rows) for name, rows in batch.items()
        }


def described(config: Config, layout: Layout | None) -> dict[str, jax.ShapeDtypeStruct]:
    """What `place` makes of a training batch, without its numbers.

    Labels are targets for each class where images are mixed or drawn with several labels; of
    photographs it is known only when they are read, and one label an image is assumed.

    Args:
      config: the run.
      layout: where arrays lie, or None for one device.
    """
    over = None if layout is None else NamedSharding(layout.mesh, P(layout.data))
    shape = (config.batch, *config.model.image_shape, config.model.channels)
    label = jax.ShapeDtypeStruct((config.batch,), jnp.int32, sharding=over)
    if config.data.mixup or config.data.targets > 1:
        targets = (config.batch, config.model.num_classes or 1)
        label = jax.ShapeDtypeStruct(targets, jnp.float32, sharding=over)
    return {
        "image": jax.ShapeDtypeStruct(shape, jnp.float32, sharding=over),
        "label": label,
    }
