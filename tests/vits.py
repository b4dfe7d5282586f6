"""Vision transformers for tests: random parameters and images, and what a model makes of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models import vit

from .helpers import quick


# What is cached is numpy's: an array of jax belongs to the mesh that it was first made under, which
# may be another test's.
def images(config, batch=8, seed=1):
    shape = (batch, *config.image_shape, config.channels)
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@functools.cache
def parameters(config, spread=0.2):
    """Random ones, the classifier's and all biases' too, which start as zeros."""
    abstract = nnx.eval_shape(lambda: vit.ViT(config, layout=None, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(5)

    def random(path, variable):
        values = spread * rng.normal(size=variable.shape) + (path[-1] == "scale")
        return path, variable.replace(np.asarray(values, np.float32))

    flat = nnx.to_flat_state(nnx.state(abstract))
    return nnx.from_flat_state(random(*entry) for entry in flat)


def apply(config, layout=None, **options):
    """`(parameters, images) -> model(images)`, not compiled."""
    abstract = nnx.eval_shape(lambda: vit.ViT(config, layout=layout, rngs=nnx.Rngs(0)))
    graph = nnx.graphdef(abstract)
    return lambda state, x: nnx.merge(graph, state)(x, **options)


def with_gradients(config, layout=None):
    """`(parameters, images) -> (logits, gradients of both)`, not compiled."""
    model = apply(config, layout)

    def loss(state, x):
        logits = model(state, x)
        return jnp.mean(jnp.square(logits - 1)), logits

    def both(state, x):
        (_, logits), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(state, x)
        return logits, gradients

    return both


def compiled(function):
    """Quicker to compile than by default, which is where a test's time goes."""
    return jax.jit(function, compiler_options=quick())
