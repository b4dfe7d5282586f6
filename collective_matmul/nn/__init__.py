"""Flax modules of the dense layers, and what places their parameters on the mesh.

A module takes a `Layout`, or None for one device, and holds its parameters as flax's own layers
do: an ordinary Dense checkpoint fits, and one written here fits anywhere else. `column` and `row`
run several modules in one collective; `dot_general` serves flax's layers instead of replacing them.
"""

from collective_matmul.nn.hook import DotGeneral, dot_general
from collective_matmul.nn.linear import (
    ColumnParallel,
    InputProjection,
    RowParallel,
    column,
    row,
)
from collective_matmul.nn.mlp import MLP
from collective_matmul.nn.placing import create, partition_specs, shard

__all__ = [
    "ColumnParallel",
    "RowParallel",
    "InputProjection",
    "MLP",
    "column",
    "row",
    "dot_general",
    "DotGeneral",
    "partition_specs",
    "shard",
    "create",
]
