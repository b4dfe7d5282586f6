"""What one device does in a dense layer: its shards in, its shards out.

The bodies of `dense`'s shard_maps. With `layout=None` the one device holds everything.

calls     which operation of the primitive a layout makes of an x and a kernel
linear    one product: columns, rows, the first layer
between   two, and what is between them
layers    many of those, one after another
"""

from collective_matmul.per_device.between import between
from collective_matmul.per_device.calls import column_spec
from collective_matmul.per_device.layers import Parts, layers
from collective_matmul.per_device.linear import columns, embedding, rows

__all__ = ["Parts", "between", "column_spec", "columns", "embedding", "layers", "rows"]
