"""Two processes train as one does: the same losses, and the same weights at the end.

Run as a script, this file is one of the processes.
"""

import dataclasses
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[1]
PATIENCE = 300  # seconds until a process that hangs is ended

# What lies across the two processes, of two devices each: the batch, or every linear layer.
MESHES = {"data": (2, 1, 2), "tensor": (1, 1, 4)}


def run_of(mesh, out):
    """Two steps of a small model."""
    from models import configs
    from models.optim import Optim

    digits = configs.load("digits")
    return dataclasses.replace(
        digits,
        model=dataclasses.replace(digits.model, width=32, mlp_dim=64),
        optim=Optim(lr=1e-2, warmup=0, timescale=10, cooldown=0),
        steps=2,
        batch=16,
        mesh=mesh,
        out=out,
    )


def one_of_two(number, port, folder):
    """Joins the other process, and trains on both meshes."""
    import jax

    from models import train

    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(f"localhost:{port}", 2, int(number), initialization_timeout=120)
    for name, mesh in MESHES.items():
        train.train(run_of(mesh, pathlib.Path(folder) / name))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the two processes left, after both ended well."""
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    logs = [(folder / f"{number}.log").open("w+") for number in range(2)]
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(number), str(port), str(folder)],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        for number, log in enumerate(logs)
    ]
    try:
        statuses = [process.wait(timeout=PATIENCE) for process in processes]
    finally:
        for process, log in zip(processes, logs, strict=True):
            process.kill()
            process.wait()
            log.seek(0)
            print(log.read())  # shown if the test fails
            log.close()
    assert statuses == [0, 0]
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process leaves that trains the same on one device."""
    from models import train

    out = tmp_path_factory.mktemp("one")
    train.train(run_of((1, 1, 1), out))
    return out


@pytest.mark.parametrize("mesh", MESHES)
def test_two_processes_have_the_losses_of_one(folder, alone, mesh):
    from models.reporting import metrics

    one, two = (metrics.read(out / "metrics.jsonl") for out in (alone, folder / mesh))
    assert len(one) == len(two) == 3
    for expected, found in zip(one, two, strict=True):
        assert set(found) == set(expected)
        for name in ("loss", "gradient_norm", "learning_rate", "test_loss", "test_accuracy"):
            if name in expected:
                np.testing.assert_allclose(found[name], expected[name], rtol=2e-6, err_msg=name)


@pytest.mark.parametrize("mesh", MESHES)
def test_two_processes_write_the_weights_of_one(folder, alone, mesh):
    """Adam divides by the gradient's size, so parameters whose gradient is noise differ most."""
    from safetensors.numpy import load_file

    one, two = (load_file(out / "weights.safetensors") for out in (alone, folder / mesh))
    assert one.keys() == two.keys()
    for name, expected in one.items():
        np.testing.assert_allclose(two[name], expected, atol=2e-4, err_msg=name)


if __name__ == "__main__":
    one_of_two(*sys.argv[1:])
