"""Where the parameters of a module lie on the mesh.

The modules know, not the parameters: `nnx.update` replaces a parameter together with its metadata,
so a PartitionSpec kept there is lost whenever a checkpoint is loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from collective_matmul.layout import Layout

Module = TypeVar("Module", bound=nnx.Module)


def partition_specs(module: nnx.Module) -> nnx.State:
    """The `PartitionSpec` of every variable, in the tree of `nnx.state(module)`.

    Layers of this package say where their parameters lie; what else a module holds (norms,
    position embeddings) is replicated. Dimensions in front of a layer's own, as `nnx.vmap` stacks
    them, are not cut.

    Args:
      module: a module whose layers have a layout, or None, which gives `P()` everywhere. Its
        parameters may be abstract, as `nnx.eval_shape` makes them.

    Returns:
      A state with a `PartitionSpec` in place of every variable's value.
    """
    known: dict[Any, P] = {}
    for path, node in nnx.iter_graph(module):
        if hasattr(node, "partition_specs"):
            known |= {(*path, name): spec for name, spec in node.partition_specs().items()}

    def placed(path: Any, variable: nnx.Variable) -> Any:
        spec = known.get(path, P())
        stacked = len(variable.shape) - len(spec) if len(spec) else 0
        return variable.replace(P(*([None] * stacked), *spec))

    flat = nnx.to_flat_state(nnx.state(module))
    return nnx.from_flat_state((path, placed(path, variable)) for path, variable in flat)


def shard(module: Module) -> Module:
    """Moves every parameter of a module to where its layout wants it, in place.

    Args:
      module: a module whose layers have layouts on one mesh; without any, nothing moves.

    Returns:
      The module.

    Raises:
      ValueError: if the layouts name several meshes.
    """
    shardings = _shardings(module)
    if shardings is not None:
        nnx.update(module, jax.device_put(nnx.state(module), shardings))
    return module


def create(make: Callable[[], Module]) -> Module:
    """A new module, every parameter of it initialised in place, so that no device holds one whole.

    Args:
      make: makes the module, with layouts on one mesh, for example
        `lambda: MLP(512, 2048, layout=layout, rngs=nnx.Rngs(0))`.

    Returns:
      What `make` returns, with the same values on every mesh, but for rounding.

    Raises:
      ValueError: if the layouts name several meshes.
    """
    abstract = nnx.eval_shape(make)
    init = jax.jit(lambda: nnx.state(make()), out_shardings=_shardings(abstract))
    return nnx.merge(nnx.graphdef(abstract), init())


def _shardings(module: nnx.Module) -> nnx.State | None:
    """A `NamedSharding` for every variable, or None where there is no mesh."""
    layouts = {
        node.layout
        for _, node in nnx.iter_graph(module)
        if isinstance(getattr(node, "layout", None), Layout)
    }
    meshes = {layout.mesh for layout in layouts}
    if len(meshes) > 1:
        raise ValueError(f"the layers of one module lie on {len(meshes)} meshes: {meshes}")
    if not meshes:
        return None
    (mesh,) = meshes
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), partition_specs(module))
