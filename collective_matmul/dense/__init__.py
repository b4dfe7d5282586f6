"""Dense layers in global view, every collective of them overlapped: where shard_map is entered.

`column_parallel` cuts the hidden dimension of its kernel, `row_parallel` contracts it away: a pair
of them makes an MLP or an attention block whose hidden activations never leave their device. Where
the activations lie between layers, and how the collectives run, is one value, a `Layout`;
`layout=None` is one device, and gives the same numbers.
"""

from collective_matmul.dense.linear import column_parallel, embed, row_parallel
from collective_matmul.dense.perceptron import mlp
from collective_matmul.dense.two_products import between, layers
from collective_matmul.per_device import Parts
from collective_matmul.slab import InPlace, Slab

__all__ = [
    "column_parallel",
    "row_parallel",
    "embed",
    "mlp",
    "between",
    "layers",
    "Parts",
    "InPlace",
    "Slab",
]
