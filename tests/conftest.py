"""What every test runs under: 16 simulated devices, and jax and Python at their strictest."""

import os

# Read when jax and libtpu are first imported, and inherited by the processes that tests start.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
os.environ["MPLBACKEND"] = "agg"
# XLA:CPU has one thread for each simulated device. Collectives that do not depend on one another
# may then be taken in another order on every device, and wait for ever (jaxlib 0.10.2).
os.environ["NPROC"] = "64"
# 16 simulated devices share what may be two busy cores; by default XLA gives up after 40 s. Most of
# the tests' time is compilation, which takes half as long without LLVM's optimisations.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_cpu_collective_call_terminate_timeout_seconds=600 --xla_backend_optimization_level=0 "
    "--xla_cpu_enable_concurrency_optimized_scheduler=false",  # for the same reason as NPROC
)

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

jax.config.update("jax_num_cpu_devices", 16)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# A first call compiles, which no deadline should judge. The examples are the same on every run.
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def mesh_of() -> Callable[..., Mesh]:
    """Meshes of Auto axes over the first devices: mesh_of(4), mesh_of(2, 4, names=("d", "t"))."""

    def make(*sizes: int, names: tuple[str, ...] = ("t",)) -> Mesh:
        devices = np.array(jax.devices()[: int(np.prod(sizes))])
        return Mesh(devices.reshape(sizes), names, axis_types=(AxisType.Auto,) * len(sizes))

    return make


@pytest.fixture
def x64() -> Iterator[None]:
    """float64 and int64 exist within the test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def timm() -> Any:
    """The module timm, or a skip where the crosscheck extra is not installed."""
    for package in ("torch", "torchvision", "timm"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} of the crosscheck extra is not installed")
    from bench.measured import torch_peer

    torch_peer.transformers()  # timm imports torchvision, which need not load: see there
    return importlib.import_module("timm")
