"""The two blocks of the family. Both have the same attention and the same MLP.

    standard    y = x + Attention(N1(x));  z = y + MLP(N2(y))       two gathers, two scatters
    parallel    y = N(x);  z = x + Attention(y) + MLP(y)            one gather, one scatter

In the parallel block one gather feeds query, key, value and the MLP's first layer, and one scatter
takes the sum of the attention's output and the MLP's second layer.

Reference: Dehghani et al. 2023 (arXiv 2302.05442) for the parallel block.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from collective_matmul import Layout, dense, nn
from collective_matmul.nn.linear import compute_dtype, parameters_of, sum_of
from models.attend import scales_of
from models.attend.beside import middle
from models.attend.pallas_tpu import Kernel
from models.attention import PRODUCT, Attention, gathered, kernel_init
from models.capture import Capture
from models.norm import Norm
from models.vit_config import Config

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
}


def make_mlp(config: Config, layout: Layout | None, rngs: nnx.Rngs) -> nn.MLP:
    """The MLP of a block or a head, initialised as in big_vision."""
    return nn.MLP(
        config.width,
        config.mlp_dim,
        activation=ACTIVATIONS[config.activation],
        layout=layout,
        dtype=jnp.dtype(config.dtype),
        kernel_init=kernel_init,
        bias_init=nnx.initializers.normal(1e-6),
        rngs=rngs,
    )


class StandardBlock(nnx.Module):
    """`y = x + Attention(N1(x)); z = y + MLP(N2(y))`.

    Args:
      config: sizes and style.
      layout: where arrays lie, or None for one device.
      rngs: keys of the initialisers.
    """

    def __init__(self, config: Config, *, layout: Layout | None, rngs: nnx.Rngs) -> None:
        self.attention_norm = make_norm(config)
        self.attention = Attention(
            config, config.style, layout=layout, query_layout=layout, rngs=rngs
        )
        self.mlp_norm = make_norm(config)
        self.mlp = make_mlp(config, layout, rngs)

    def __call__(self, x: jax.Array, capture: Capture) -> jax.Array:
        """From and to `[b@data, s@tensor, d]` or `[b@data, s, d@tensor]`."""
        x = x + self.attention(self.attention_norm(x), capture)
        x = capture("after_attention", checkpoint_name(x, PRODUCT))
        (hidden,) = gathered(self.mlp_norm(x), self.mlp.up)
        hidden = self.mlp.activation(capture("mlp_hidden", hidden))
        return capture("output", x + self.mlp.down(hidden))


class ParallelBlock(nnx.Module):
    """`y = N(x); z = x + Attention(y) + MLP(y)`.

    Args:
      config, layout, rngs: as in `StandardBlock`.
    """

    def __init__(self, config: Config, *, layout: Layout | None, rngs: nnx.Rngs) -> None:
        self.norm = make_norm(config)
        self.attention = Attention(
            config, config.style, layout=layout, query_layout=layout, rngs=rngs
        )
        self.mlp = make_mlp(config, layout, rngs)

    def __call__(self, x: jax.Array, capture: Capture) -> jax.Array:
        """From and to `[b@data, s@tensor, d]` or `[b@data, s, d@tensor]`."""
        attention, mlp = self.attention, self.mlp
        y = self.norm(x)
        kernel = self.kernel_for(y, capture)
        if kernel is not None:
            return capture("output", x + self._beside(y, kernel))
        query, key, value, hidden = gathered(
            y, attention.query, attention.key, attention.value, mlp.up
        )
        heads = attention.attend(query, key, value, capture)
        hidden = mlp.activation(capture("mlp_hidden", hidden))
        return capture("output", x + nn.row((heads, hidden), attention.out, mlp.down))

    def kernel_for(self, y: jax.Array, capture: Capture) -> Kernel | None:
        """The attention's, if all between the two products may lie side by side."""
        attention, layout = self.attention, self.mlp.up.layout
        unseen = not any(map(capture.wanted, ("value", "attention_output", "mlp_hidden")))
        cut = layout is None or layout.partitioner == "shard_map"
        if attention.query.bias is not None or not (unseen and cut):
            return None
        heads = jax.ShapeDtypeStruct((*y.shape[:2], *attention.query.out_features), y.dtype)
        return attention.kernel_for(heads, heads, capture)

    def parts(self, y: Any) -> dense.Parts:
        """What the products and what is between them take, in the dtype that y is cast to."""
        attention, mlp = self.attention, self.mlp
        heads = (attention.query, attention.key, attention.value)
        modules = (*heads, mlp.up, attention.out, mlp.down)
        dtype = compute_dtype(y, *modules)
        (query, _), (key, _), (value, _), (up, bias), (out, out_bias), (down, down_bias) = (
            parameters_of(module, dtype) for module in modules
        )
        return dense.Parts(
            kernels_in=(jnp.concatenate((query, key, value), axis=-1), up),
            kernels_out=(out, down),
            bias=sum_of([down_bias, out_bias]),
            before=nnx.to_pure_dict(nnx.state(self.norm)),
            middle=(bias, scales_of(attention.norms)),
        )

    def _beside(self, y: jax.Array, kernel: Kernel) -> jax.Array:
        """Attention and MLP by one product in and one out, and nothing put together between."""
        parts = self.parts(y)
        _, scales = parts.middle
        return dense.between(
            y.astype(parts.kernels_in[0].dtype),
            parts.kernels_in,
            parts.kernels_out,
            (parts.middle,),
            parts.bias,
            middle=middle(kernel, self.mlp.activation).apart(),
            operand_specs=lambda at: ((at.column_bias(), jax.tree.map(lambda _: P(), scales)),),
            layout=self.mlp.up.layout,
            name=PRODUCT,
            check_vma=not kernel.interpret,
        )


def make_norm(config: Config) -> Norm:
    """A norm over the model width, in the encoder's style."""
    style = config.style
    return Norm(style.norm, config.width, use_bias=style.norm_bias, epsilon=config.epsilon)
