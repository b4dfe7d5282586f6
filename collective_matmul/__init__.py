"""Sharded matrix multiplies that do not wait for the network.

`collective_einsum` and its 2-D names work inside `jax.shard_map`; `dense` and `nn` are layers in
global view; `explain` says what a call would do, and why.
"""

from collective_matmul import algorithms, backends, dense, hardware
from collective_matmul.collectives import all_gather, reduce_scatter
from collective_matmul.compiling import compiler_options
from collective_matmul.einsum import all_gather_matmul, collective_einsum, matmul_reduce_scatter
from collective_matmul.explain import explain
from collective_matmul.layout import Layout
from collective_matmul.mesh import make_mesh

__version__ = "0.1.0"

__all__ = [
    "Layout",
    "algorithms",
    "all_gather",
    "all_gather_matmul",
    "backends",
    "collective_einsum",
    "compiler_options",
    "dense",
    "explain",
    "hardware",
    "make_mesh",
    "matmul_reduce_scatter",
    "reduce_scatter",
]
