"""Overlap over real sockets: the programs are right, the link is taken away, refusals say why.

The measurement itself needs root and two quiet cores: `BENCH_SOCKETS=1` runs a small one here.
"""

import os
import subprocess

import jax
import numpy as np
import pytest

import collective_matmul as cm
from bench import commands
from bench.commands.sockets import hidden, main, result_of
from bench.measured import sockets, sockets_worker
from bench.measured.sockets_worker import PRODUCTS, compiled, schedules
from collective_matmul import algorithms

pytestmark = pytest.mark.slow

SIZES = (16, 8, 8)


@pytest.fixture(scope="module")
def mesh():
    return cm.make_mesh(tensor=2, devices=jax.devices()[:2])


def operands(program):
    rng = np.random.default_rng(0)
    return [rng.normal(size=shape).astype(np.float32) for shape in program.shapes]


@pytest.mark.parametrize("chunks", [1, 4])
@pytest.mark.parametrize("name", schedules())
@pytest.mark.parametrize("product", PRODUCTS)
def test_chunks_and_schedules_give_the_product(mesh, product, name, chunks):
    programs = PRODUCTS[product](SIZES, chunks, schedules()[name])
    lhs, rhs = operands(programs["overlapped"])
    m, k, n = SIZES
    whole = np.asarray(compiled(programs["overlapped"], mesh)())
    travelled = np.asarray(compiled(programs["travel"], mesh)())
    alone = np.asarray(compiled(programs["products"], mesh)())
    if product == "gather of rows":  # each device has all of it, one after the other
        np.testing.assert_allclose(whole, np.concatenate([lhs @ rhs] * 2), rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(travelled, np.concatenate([lhs] * 2))
        np.testing.assert_allclose(alone, lhs @ rhs, rtol=1e-4, atol=1e-4)
    else:
        np.testing.assert_allclose(whole, lhs @ rhs, rtol=1e-4, atol=1e-4)
        (addend,) = operands(programs["travel"])
        np.testing.assert_allclose(travelled, addend[:, :n] + addend[:, n:], rtol=1e-5, atol=1e-5)
        halves = lhs.reshape(m, 2, k // 2), rhs.reshape(2, k // 2, n)
        partial = np.einsum("mdk,dkn->mdn", *halves).reshape(m, 2 * n)
        np.testing.assert_allclose(alone, partial, rtol=1e-4, atol=1e-4)


def test_what_travels_is_as_large_alone():
    """The partial sums of a scatter and the shards of a gather, each cut as in the product."""
    for product, sizes in {"gather of rows": (16, 4, 8), "scatter of rows": (16, 8, 4)}.items():
        programs = PRODUCTS[product](sizes, 2, schedules()["plain collective"])
        (shape,) = programs["travel"].shapes
        m, k, n = sizes
        assert shape == ((m, k) if product == "gather of rows" else (m, 2 * n))


def test_every_algorithm_has_a_row():
    names = [name for row in schedules() for name in row.split(", ")]
    assert sorted(names) == sorted(["plain collective", *algorithms.names()])


def test_time_all_times_each_in_rounds(mesh):
    request = {"products": {"gather of rows": SIZES}, "chunks": [2], "rounds": 3}
    rows = sockets_worker.time_all(request, mesh)
    assert [row["schedule"] for row in rows] == list(schedules())
    for row in rows:
        assert all(len(row[key]) == 3 for key in ("overlapped", "travel", "products"))


def test_the_hidden_fraction():
    assert hidden(4.0, 2.0, 6.0) == 0.0
    assert hidden(4.0, 2.0, 4.0) == 1.0
    assert hidden(4.0, 2.0, 5.0) == 0.5


def test_a_round_lasts_until_the_later_process_is_done():
    row = {"product": "p", "schedule": "ring", "chunks": 2}
    first = row | {"travel": [0.1, 0.1], "products": [0.2, 0.2], "overlapped": [0.25, 0.25]}
    second = row | {"travel": [0.2, 0.2], "products": [0.1, 0.1], "overlapped": [0.3, 0.3]}
    (found,) = result_of([[first], [second]], rate_mbit=800, burst_kb=128, nice=0)["rows"]
    assert found["travel alone ms"] == found["products alone ms"] == found["lower bound ms"] == 200
    assert found["overlapped ms"] == 300 and found["hidden"] == pytest.approx(0.5)


def test_not_root_is_refused(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(commands.UserError, match="root"):
        main([])


def test_missing_programs_are_named(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(sockets.shutil, "which", lambda name: None if name == "tc" else "/bin/ip")
    with pytest.raises(commands.UserError, match="'tc'; install iproute2"):
        main([])


def test_chunks_have_to_cut_the_rows():
    with pytest.raises(commands.UserError, match="--chunks 3"):
        main(["--chunks", "3"])


@pytest.mark.parametrize("fails", ["tbf", None])
def test_the_link_is_taken_away_whatever_happens(monkeypatch, tmp_path, fails):
    """What was made is deleted, also where a later command is refused."""
    ran = []

    def run(command, **_):
        ran.append(" ".join(command))
        refused = fails is not None and fails in command
        return subprocess.CompletedProcess(command, int(refused), "", "not permitted")

    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(sockets.shutil, "which", lambda name: name)
    monkeypatch.setattr(sockets.subprocess, "run", run)
    monkeypatch.setattr(sockets, "HOSTS", tmp_path / "netns")
    try:
        with sockets.link(rate_mbit=800, burst_kb=128) as names:
            assert not fails
            for name, address in zip(names, sockets.ADDRESSES, strict=True):
                assert f"{address} " in (sockets.HOSTS / name / "hosts").read_text()
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails is None
    except sockets.UnavailableError as reason:
        assert fails and "not permitted" in str(reason)
    made = [line.split()[-1] for line in ran if line.startswith("ip netns add")]
    assert len(made) == 2
    assert sorted(ran[-2:]) == sorted(f"ip netns del {name}" for name in made)
    assert not sockets.HOSTS.exists()


@pytest.mark.skipif(
    "BENCH_SOCKETS" not in os.environ, reason="needs root and time: BENCH_SOCKETS=1 runs it"
)
def test_a_small_measurement(capsys):
    assert main(["--shrink", "8", "--rounds", "3", "--chunks", "2"]) == 0
    assert "bidirectional" in capsys.readouterr().out
    listed = subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout
    assert "bench" not in listed
