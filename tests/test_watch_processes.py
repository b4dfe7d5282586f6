"""What happens to two processes when one of them is stopped, killed, told to leave, or differs.

Run as a script, this file is one of the processes, in a scenario: a function of this file.
"""

import contextlib
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[1]
PATIENCE = 120  # seconds until something that should happen counts as not happening

# ---- the processes


def calm(folder):
    """Agreement, fingerprints, copies and a preemption, one after the other."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from models.watch import agreement, fingerprint, preemption, replicas, status, store

    rank = store.rank()
    agreement.check(agreement.settings({"batch": 16}) | agreement.code(), 60)
    with contextlib.suppress(status.Fault):
        agreement.check(agreement.settings({"batch": 16 + rank}), 60)
        tell("no difference was seen")
    for scale in (1.0, 1.0 + rank):
        try:
            agreement.check(
                agreement.program(jax.jit(lambda x, s=scale: x * s).lower(jnp.zeros(3))), 60
            )
            tell("one program")
        except status.Fault as fault:
            tell(f"refused with {fault.status}: {fault}")

    mesh = mesh_of_two_processes()
    x = np.arange(24, dtype=np.float32).reshape(4, 6)
    place = NamedSharding(mesh, P(None, "t"))
    params = {"w": jax.make_array_from_callback(x.shape, place, lambda index: x[index])}
    tell(f"marks {np.asarray(fingerprint.marks(params)).tolist()}")
    compare = replicas.Replicas(params)
    compare.check(params)
    pieces = [np.array(piece.data) for piece in params["w"].addressable_shards]
    if rank == 1:
        pieces[1].view(np.uint32)[0, 0] ^= 1 << 3
    devices = [piece.device for piece in params["w"].addressable_shards]
    pieces = [jax.device_put(p, d) for p, d in zip(pieces, devices, strict=True)]
    bad = jax.make_array_from_single_device_arrays(x.shape, place, pieces)
    try:
        compare.check({"w": bad})
    except status.Fault as fault:
        tell(f"refused with {fault.status}: {fault}")

    with preemption.Preemption() as leaving:
        for step in steps():
            if leaving.reached():
                tell(f"leaves after step {step}")
                break


def train(folder):
    """Steps that need both processes, and a watchdog."""
    from models.watch import store
    from models.watch.watchdog import Watchdog

    seconds, on_stall = float(os.environ["STALL"]), os.environ["ON_STALL"]
    watched = dict(stacks=folder / "stacks", others=store.connected(), rank=store.rank())
    with Watchdog(seconds, on_stall, **watched) as dog:
        for step in steps():
            dog.beat(step)
            if (folder / "enough").exists() and agreed(folder, step):
                break


def agreed(folder, step):
    """Both processes stop after one step, which the first one names."""
    from models.watch import store

    if store.rank() == 0 and not (folder / "last").exists():
        (folder / ".last").write_text(str(step + 20))
        (folder / ".last").rename(folder / "last")
    return (folder / "last").exists() and step >= int((folder / "last").read_text())


def mesh_of_two_processes():
    import jax
    from jax.sharding import AxisType, Mesh

    devices = np.array(jax.devices()).reshape(2, 2)
    return Mesh(devices, ("d", "t"), axis_types=(AxisType.Auto,) * 2)


def steps():
    """Their numbers: each is a sum over the devices of both."""
    import jax
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    mesh = mesh_of_two_processes()
    add = jax.jit(lambda x: x + x.sum() / 4, out_shardings=NamedSharding(mesh, P(("d", "t"))))
    x = jax.make_array_from_callback(
        (4,), NamedSharding(mesh, P(("d", "t"))), lambda index: np.ones(4, np.float32)[index]
    )
    for step in range(1, 100_000):
        x = jax.block_until_ready(add(x) / 2)
        if step in (1, 5):
            tell(f"step {step}")
        threading.Event().wait(0.01)
        yield step


def tell(text):
    print(text, flush=True)


def main(scenario, folder):
    import jax

    from models.watch import distributed
    from models.watch.config import Watch

    jax.config.update("jax_num_cpu_devices", 2)
    watch = Watch(patience=int(os.environ.get("PATIENCE", "60")), heartbeat=60)
    with distributed.joined(watch) as count:
        tell(f"connected {count}")
        {"calm": calm, "train": train}[scenario](pathlib.Path(folder))


# ---- the tests


class Pair:
    """Two processes in a scenario, and what they say."""

    def __init__(self, folder, scenario, **variables):
        from models.watch.group import free_port

        self.folder = folder
        self.logs = [folder / f"{rank}.log" for rank in range(2)]
        common = {
            "JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}",
            "JAX_NUM_PROCESSES": "2",
            "PYTHONPATH": str(ROOT),
            **variables,
        }
        self.processes = []
        for rank, path in enumerate(self.logs):
            with path.open("w") as log:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, __file__, scenario, str(folder)],
                        env=os.environ | common | {"JAX_PROCESS_ID": str(rank)},
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                    )
                )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for process, path in zip(self.processes, self.logs, strict=True):
            process.kill()
            process.wait()
            print(path.read_text())  # shown if the test fails

    def until(self, rank, pattern):
        """Waits until a process says something; gives the match."""
        end = time.monotonic() + PATIENCE
        while not (found := re.search(pattern, self.logs[rank].read_text())):
            assert self.processes[rank].poll() is None or re.search(
                pattern, self.logs[rank].read_text()
            ), f"process {rank} ended without {pattern!r}"
            assert time.monotonic() < end, f"process {rank} does not say {pattern!r}"
            threading.Event().wait(0.02)
        return found

    def ended(self, rank):
        return self.processes[rank].wait(timeout=PATIENCE)

    def signal(self, rank, number):
        self.processes[rank].send_signal(number)


@pytest.fixture(scope="module")
def after_calm(tmp_path_factory):
    """What both said in the calm scenario, in which one of them is told to leave, twice."""
    with Pair(tmp_path_factory.mktemp("calm"), "calm") as pair:
        for rank in range(2):
            pair.until(rank, "step 5\n")
        for _ in range(2):
            pair.signal(1, signal.SIGTERM)
        assert [pair.ended(rank) for rank in range(2)] == [0, 0]
        return [path.read_text() for path in pair.logs]


def test_a_sigterm_to_one_of_two_lets_both_leave_after_the_same_step(after_calm):
    left = [re.search(r"leaves after step (\d+)", said)[1] for said in after_calm]
    assert left[0] == left[1] and int(left[0]) > 5


def test_two_processes_know_that_they_are_two(after_calm):
    assert all("connected 2" in said for said in after_calm)


def test_a_process_with_another_config_is_seen_by_both(after_calm):
    assert all("no difference was seen" not in said for said in after_calm)


def test_a_process_with_another_program_is_seen_by_both(after_calm):
    for said in after_calm:
        assert said.count("one program") == 1
        assert re.search(r"refused with 44: .* process 1 has program \w+ of", said)


def test_a_flipped_bit_in_another_process_is_named_by_both(after_calm):
    pattern = r"refused with 45: w on \S+ of process 1 \(d 1, t 1\) differs"
    assert all(re.search(pattern, said) for said in after_calm)


def test_two_processes_have_the_fingerprint_of_one(after_calm):
    import jax.numpy as jnp

    from models.watch import fingerprint

    x = jnp.arange(24, dtype=jnp.float32).reshape(4, 6)
    expected = f"marks {np.asarray(fingerprint.marks({'w': x})).tolist()}\n"
    assert all(expected in said for said in after_calm)


def test_a_stopped_process_is_named_and_may_go_on(tmp_path):
    with Pair(tmp_path, "train", STALL="1.0", ON_STALL="continue") as pair:
        pair.until(0, "step 5\n")
        pair.signal(1, signal.SIGSTOP)
        named = pair.until(0, r"stopped, dead or cut off: process (\d) \(pid (\d+) on (\S+)\)")
        assert named[1] == "1" and int(named[2]) == pair.processes[1].pid
        stacks = (tmp_path / "stacks" / "stacks-0.txt").read_text()
        assert "in steps" in stacks, "the stacks do not show where the main thread waits"
        pair.signal(1, signal.SIGCONT)
        pair.until(0, "the run goes on: process 0 ")
        (tmp_path / "enough").touch()
        assert [pair.ended(rank) for rank in range(2)] == [0, 0]


def test_a_stopped_coordinator_is_named_and_a_run_may_be_ended(tmp_path):
    with Pair(tmp_path, "train", STALL="1.0", ON_STALL="abort") as pair:
        pair.until(1, "step 5\n")
        pair.signal(0, signal.SIGSTOP)
        pair.until(1, "process 0 does not answer: it is stopped, dead or cut off")
        assert pair.ended(1) == 43


@pytest.mark.parametrize("victim", [0, 1])
def test_the_survivor_of_a_kill_says_why_it_ends(tmp_path, victim):
    with Pair(tmp_path, "train", STALL="60", ON_STALL="abort") as pair:
        pair.until(1 - victim, "step 5\n")
        pair.signal(victim, signal.SIGKILL)
        status = pair.ended(1 - victim)
        said = pair.logs[1 - victim].read_text()
    if victim == 0 and status == -signal.SIGABRT:  # the runtime was faster than we
        assert "distributed service detected fatal errors" in said
    else:
        assert status == 46
        assert re.search(rf"process {1 - victim} \(pid \d+ on \S+\) lost process {victim}", said)


def test_a_process_without_a_coordinator_says_what_it_waits_for(tmp_path):
    with Pair(tmp_path, "train", STALL="60", ON_STALL="abort", PATIENCE="1") as pair:
        pair.signal(0, signal.SIGKILL)
        assert pair.ended(1) == 46
        pair.until(1, r"process 1 of 2 cannot reach the coordinator at localhost:\d+ after 1 s")


if __name__ == "__main__":
    main(*sys.argv[1:])
