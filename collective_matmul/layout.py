"""Where activations and parameters lie on the mesh: one frozen value that every layer takes.

The rules are Megatron's, with the parameters cut a second time (FSDP, ZeRO-3): the *tensor* axis
cuts the hidden dimension of every kernel, the *fsdp* axis its model width, and the *data* axes cut
the batch. Between layers the tensor axis cuts the activations as well, so that nothing is held
twice:

    "tokens"     [b@data, s@tensor, d]   rows are cut (sequence parallel); norms are local
    "features"   [b@data, s, d@tensor]   the model width is cut: the ViT-22B paper's layout
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

Axes = str | tuple[str, ...] | None


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh, the part that each of its axes plays, and how the collectives are to run.

    Args:
      mesh: the devices, with named axes (`collective_matmul.make_mesh`).
      activations: `"tokens"` or `"features"`, as above.
      token_dim: the dimension that the tensor axis cuts in `"tokens"`: 1, the sequence, or 0, the
        batch rows, beyond what the data axes already cut.
      data: axes that cut dimension 0 of activations. `fsdp` belongs here too: each of its devices
        has other images.
      fsdp: the axis that cuts the model width of parameters, or None to keep them whole there.
      tensor: the axis (or axes, in mesh order) that cuts hidden dimensions, heads and activations.
      algorithm, backend, wire_dtype, precision: as in `collective_einsum`.
      partitioner: `"shard_map"`, the collective matmuls of this library; or `"gspmd"`, the same
        arrays in the same places as sharding constraints alone, and every collective the compiler's
        choice: the baseline to compare with.

    Raises:
      ValueError: if an axis is not in the mesh, or plays two parts; if `"gspmd"` is given what
        only the collective matmuls know.
    """

    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh
    activations: Literal["tokens", "features"] = "tokens"
    token_dim: int = 1
    data: str | tuple[str, ...] = ("data", "fsdp")
    fsdp: str | None = "fsdp"
    tensor: str | tuple[str, ...] = "tensor"
    algorithm: str | None = None
    backend: str | None = None
    wire_dtype: Any = None
    precision: Any = None
    partitioner: Literal["shard_map", "gspmd"] = "shard_map"

    def __post_init__(self) -> None:
        if isinstance(self.data, str):
            object.__setattr__(self, "data", (self.data,))
        if self.activations not in ("tokens", "features"):
            raise ValueError(f"activations={self.activations!r} is neither 'tokens' nor 'features'")
        if self.token_dim not in (0, 1):
            raise ValueError(f"token_dim={self.token_dim}: 1 cuts the sequence, 0 the batch rows")
        if self.partitioner not in ("shard_map", "gspmd"):
            raise ValueError(f"partitioner={self.partitioner!r} is neither 'shard_map' nor 'gspmd'")
        if self.partitioner == "gspmd":
            self._check_constraints()
        named = (*self.data, *self.tensor_axes, *((self.fsdp,) if self.fsdp else ()))
        missing = sorted(set(named) - set(self.mesh.axis_names))
        if missing:
            raise ValueError(
                f"axis {missing[0]!r} is not among the mesh axes {self.mesh.axis_names}; "
                "make_mesh names them 'data', 'fsdp' and 'tensor'"
            )
        if self.fsdp and self.fsdp not in self.data:
            raise ValueError(
                f"fsdp={self.fsdp!r} must be one of the data axes {self.data} too: the devices "
                "that share the pieces of the parameters have different images"
            )
        twice = sorted(set(self.tensor_axes) & {*self.data, self.fsdp})
        if twice:
            raise ValueError(
                f"axis {twice[0]!r} cannot cut both the batch and the hidden dimensions"
            )

    def _check_constraints(self) -> None:
        """What sharding constraints alone cannot express."""
        for name in ("algorithm", "backend", "wire_dtype", "precision"):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"partitioner='gspmd' leaves the collectives to the compiler, so {name}="
                    f"{getattr(self, name)!r} has no meaning; leave it out, or use 'shard_map'"
                )
        types = self.mesh.axis_types
        if {*types} != {jax.sharding.AxisType.Auto}:
            raise ValueError(f"partitioner='gspmd' needs axes of type Auto; the mesh has {types}")

    @property
    def tensor_axes(self) -> tuple[str, ...]:
        """The tensor axis as a tuple."""
        return self.tensor if isinstance(self.tensor, tuple) else (self.tensor,)

    @property
    def gathered_axes(self) -> tuple[str, ...]:
        """The axes over which an `embed` kernel is cut, in mesh order."""
        axes = {*self.tensor_axes, *((self.fsdp,) if self.fsdp else ())}
        return tuple(name for name in self.mesh.axis_names if name in axes)

    def size(self, axes: Axes) -> int:
        """How many devices `axes` span together."""
        names = (axes,) if isinstance(axes, str) else axes or ()
        sizes = dict(zip(self.mesh.axis_names, self.mesh.axis_sizes, strict=True))
        total = 1
        for name in names:
            total *= sizes[name]
        return total

    def activation(self, ndim: int) -> P:
        """Between layers: `[b@data, s@tensor, d]` or `[b@data, s, d@tensor]`.

        Raises:
          ValueError: if `"tokens"` should cut the sequence of an array that has none.
        """
        dims: list[Any] = [self.data, *([None] * (ndim - 1))]
        if self.activations == "features":
            dims[-1] = self.tensor
        elif self.token_dim == 0:
            dims[0] = (*self.data, *self.tensor_axes)
        elif ndim < 3:
            raise ValueError(
                f"an activation of {ndim} dimensions has no sequence to cut over {self.tensor!r}; "
                "use token_dim=0 (batch rows) or activations='features'"
            )
        else:
            dims[1] = self.tensor
        return P(*dims)

    def hidden(self, ndim: int, kernel_ndim: int = 2) -> P:
        """Within a layer: `[b@data, s, f@tensor, ...]`, the kernel's hidden dimensions last."""
        first = ndim - (kernel_ndim - 1)
        return P(self.data, *([None] * (first - 1)), self.tensor, *([None] * (kernel_ndim - 2)))

    def unsharded(self, ndim: int) -> P:
        """What enters `embed`: cut as activations are, but for its features."""
        if self.activations == "features":
            return P(self.data, *([None] * (ndim - 1)))
        return self.activation(ndim)

    def column_kernel(self, ndim: int = 2) -> P:
        """`[d@fsdp, f@tensor, ...]`."""
        return P(self.fsdp, self.tensor, *([None] * (ndim - 2)))

    def row_kernel(self, ndim: int = 2) -> P:
        """`[f@tensor, ..., d@fsdp]`."""
        return P(self.tensor, *([None] * (ndim - 2)), self.fsdp)

    def embed_kernel(self, ndim: int = 2) -> P:
        """`[c, d@(fsdp, tensor)]` for `"tokens"`, `[c, d@tensor]` for `"features"`."""
        cut = self.gathered_axes if self.activations == "tokens" else self.tensor
        return P(*([None] * (ndim - 1)), cut)

    def without_fsdp(self, spec: P) -> P:
        """Where a kernel of this spec lies while it is used: whole over fsdp."""
        dims = [tuple(n for n in (d if isinstance(d, tuple) else (d,)) if n) for d in spec]
        kept = (tuple(n for n in names if n != self.fsdp) for names in dims)
        return P(*(names or None for names in kept))

    def column_bias(self, ndim: int = 1) -> P:
        """`[f@tensor, ...]`."""
        return P(self.tensor, *([None] * (ndim - 1)))

    def row_bias(self) -> P:
        """`[d]` for `"tokens"`, `[d@tensor]` for `"features"`: as the activations are cut."""
        return P(self.tensor) if self.activations == "features" else P(None)


def typed(layout: Layout, values: Any, specs: Any) -> Any:
    """The arrays as a shard_map over the layout's mesh takes them.

    Where axes are of type Explicit, the place of an array is part of its type, and it is put there.

    Args:
      layout: of the mesh.
      values: a pytree of arrays.
      specs: the same of specs.
    """
    if AxisType.Explicit not in layout.mesh.axis_types:
        return values
    return jax.tree.map(
        lambda x, at: jax.sharding.reshard(x, NamedSharding(layout.mesh, at)), values, specs
    )
