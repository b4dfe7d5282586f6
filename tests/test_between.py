"""A middle between two products: `dense.between`, its joined kernels, and how it runs again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_policies
from jax.sharding import PartitionSpec as P

from collective_matmul import Layout, dense, make_mesh
from collective_matmul.replay import replayed

from .helpers import quick

B, S, D = 8, 8, 16


def operands(dtype=np.float32):
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[0]), dtype)

    return {
        "x": normal(B, S, D),
        "kernels_in": (normal(D, 4, 6), normal(D, 8)),
        "kernels_out": (normal(4, 6, D), normal(8, D)),
        "scale": normal(8),
        "bias": normal(D),
    }


def middle(wide, scale):
    """The heads' columns as they are, the others through a sine: 24 and 8 over the tensor axis."""
    cut = wide.shape[-1] - scale.shape[0]
    return jnp.concatenate([wide[..., :cut], jnp.sin(wide[..., cut:]) * scale[None, None]], axis=-1)


def between(layout, name=None):
    def run(o):
        return dense.between(
            o["x"],
            o["kernels_in"],
            o["kernels_out"],
            (o["scale"],),
            o["bias"],
            middle=middle,
            operand_specs=lambda at: (P(at.tensor),),
            layout=layout,
            name=name,
        )

    return run


def plainly(o):
    """The same by einsums, whatever the order of the columns."""
    heads = jnp.einsum("bsd,dhk->bshk", o["x"], o["kernels_in"][0])
    units = jnp.sin(jnp.einsum("bsd,df->bsf", o["x"], o["kernels_in"][1])) * o["scale"][None, None]
    y = jnp.einsum("bshk,hkd->bsd", heads, o["kernels_out"][0])
    return y + jnp.einsum("bsf,fd->bsd", units, o["kernels_out"][1]) + o["bias"][None, None]


def with_gradients(function, o):
    def loss(o):
        y = function(o)
        return jnp.sum(jnp.sin(y)), y

    return jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=quick())(o)


LAYOUTS = {
    "one device": None,
    "tokens": ((2, 2, 2), {}),
    "rows": ((1, 2, 4), {"token_dim": 0}),
    "features": ((2, 2, 2), {"activations": "features"}),
    "fsdp alone": ((2, 4, 1), {}),
    "tensor alone": ((2, 1, 4), {"fsdp": None, "data": ("data", "fsdp")}),
}


def layout_of(name):
    if LAYOUTS[name] is None:
        return None
    sizes, options = LAYOUTS[name]
    return Layout(make_mesh(*sizes, devices=jax.devices()[:8]), **options)


@pytest.mark.parametrize("name", LAYOUTS)
def test_values_and_gradients(name):
    o = operands()
    found, wanted = (with_gradients(f, o) for f in (between(layout_of(name)), plainly))
    for ours, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(ours, other, rtol=2e-5, atol=2e-5)


def test_the_compiler_has_no_middle_of_one_device():
    layout = Layout(make_mesh(2, 2, 2, devices=jax.devices()[:8]), partitioner="gspmd")
    with pytest.raises(NotImplementedError, match="use column_parallel and row_parallel"):
        between(layout)(operands())


def test_what_is_wrong_is_refused_with_its_numbers():
    o = operands()
    with pytest.raises(ValueError, match="15"):
        between(None)(o | {"kernels_in": (jnp.zeros((15, 8)),)})
    with pytest.raises(TypeError, match="bfloat16"):
        between(None)(
            o | {"kernels_out": jax.tree.map(lambda x: x.astype(jnp.bfloat16), o["kernels_out"])}
        )
    with pytest.raises(ValueError, match="does not split over"):
        between(layout_of("rows"))(o | {"x": jnp.zeros((6, S, D))})


def residuals(policy_name, kept):
    """Names and shapes of what a checkpoint around a replayed function keeps."""
    weights = jnp.ones((D, D))

    def inner(y):
        return jnp.sin(y) @ weights

    def body(x, _):
        y = x @ weights
        return replayed(inner, kept)(y), None

    checkpointed = jax.checkpoint(
        body, policy=checkpoint_policies.save_only_these_names(policy_name), prevent_cse=False
    )

    def loss(x):
        return jnp.sum(jax.lax.scan(checkpointed, x, length=3)[0])

    return str(jax.make_jaxpr(jax.grad(loss))(jnp.ones((S, D), jnp.bfloat16).astype(jnp.float32)))


def test_what_is_kept_is_not_rounded_in_a_pass_of_its_own():
    """As `jax.checkpoint` alone does, where the forward pass uses what its policy keeps."""
    assert "reduce_precision" not in residuals("kept", "kept")
    assert "f32[3,8,16]" in residuals("kept", "kept")  # of three trips


def test_replayed_functions_have_the_gradient_of_their_function():
    o = operands()
    with_name, without = (
        with_gradients(lambda o, name=name: replayed(plainly, name)(o), o) for name in ("a", None)
    )
    wanted = with_gradients(plainly, o)
    for pair in (with_name, without):
        for ours, other in zip(jax.tree.leaves(pair), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(ours, other, rtol=1e-5, atol=1e-6)
