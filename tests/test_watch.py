"""Watching a run, one part at a time, in one process."""

import contextlib
import dataclasses
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from models.watch import (
    agreement,
    distributed,
    ending,
    fingerprint,
    preemption,
    replicas,
    status,
    store,
)
from models.watch.config import Watch
from models.watch.peers import Peers
from models.watch.supervisor import Supervision, supervise
from models.watch.watchdog import Watchdog

# ---- fingerprints


def flipped(x, element, bit):
    """An array with one bit of one element changed."""
    y = np.array(x)
    words = y.reshape(-1).view(f"uint{8 * y.dtype.itemsize}")
    words[element] ^= np.array(1 << bit, words.dtype)
    return y


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32", "uint8"])
def test_every_single_bit_changes_the_fingerprint(dtype):
    x = np.arange(-6, 6).astype(np.int8).reshape(3, 4).astype(jnp.dtype(dtype))
    bits = [(e, b) for e in range(x.size) for b in range(8 * x.dtype.itemsize)]
    variants = jnp.stack([x, *(flipped(x, element, bit) for element, bit in bits)])
    marks = np.asarray(jax.jit(jax.vmap(fingerprint.mark))(variants))
    assert not (marks[1:] == marks[0]).any()
    assert len(set(marks.tolist())) == len(marks)


def test_moved_elements_change_the_fingerprint():
    x = jnp.arange(12.0, dtype=jnp.float32).reshape(3, 4)
    same = [fingerprint.mark(y) for y in (x.at[0].set(x[1]).at[1].set(x[0]), x[:, ::-1])]
    assert fingerprint.mark(x) not in same
    assert fingerprint.mark(jnp.float32(0.0)) != fingerprint.mark(jnp.float32(-0.0))


def test_eight_bytes_booleans_and_keys_have_fingerprints(x64):
    x = np.array([1.0, 2.0])
    assert fingerprint.mark(jnp.array(x)) != fingerprint.mark(jnp.array(flipped(x, 1, 0)))
    assert fingerprint.mark(jnp.array(x)) != fingerprint.mark(jnp.array(flipped(x, 1, 63)))
    assert fingerprint.mark(jnp.array([True])) != fingerprint.mark(jnp.array([False]))
    keys = jax.random.key(0), jax.random.key(1)
    assert fingerprint.mark(keys[0]) != fingerprint.mark(keys[1])


def test_the_fingerprint_does_not_depend_on_the_mesh(mesh_of):
    x = np.random.default_rng(0).normal(size=(8, 6, 4)).astype(np.float32)
    tree = {"a": jnp.array(x), "b": jnp.array(x[0], jnp.bfloat16)}
    expected = np.asarray(fingerprint.marks(tree))
    assert expected.dtype == np.uint32 and expected.shape == (2,)
    for sizes, spec in (((8, 1), P("d")), ((2, 4), P("d", None, "t")), ((4, 2), P(("t", "d")))):
        mesh = mesh_of(*sizes, names=("d", "t"))
        places = {"a": NamedSharding(mesh, spec), "b": NamedSharding(mesh, P())}
        np.testing.assert_array_equal(fingerprint.marks(jax.device_put(tree, places)), expected)


def test_a_chain_tells_steps_samples_and_parameters_apart():
    def chain(*links, start=""):
        one = fingerprint.Chain(start)
        for link in links:
            one.add(*link)
        return one.value

    a, b = np.array([1, 2], np.uint32), np.array([2, 1], np.uint32)
    unbroken = chain((1, a, b), (2, b, a))
    assert len(unbroken) == 64
    assert chain((2, b, a), start=chain((1, a, b))) == unbroken
    others = [
        chain((1, a, b), (3, b, a)),
        chain((1, a, b), (2, a, a)),
        chain((1, a, b), (2, b, b)),
        chain((1, b, b), (2, b, a)),
        chain((1, a), (2, b, a)),
        chain((2, b, a), (1, a, b)),
    ]
    assert unbroken not in others and len(set(others)) == len(others)


# ---- replicas


def params_on(mesh):
    """A cut and a whole parameter."""
    x = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)
    return {
        "block": {"kernel": jax.device_put(x, NamedSharding(mesh, P(None, "t")))},
        "norm": {"scale": jax.device_put(x[0], NamedSharding(mesh, P()))},
    }


def damaged(x, device, element=3, bit=7):
    """The array, with one bit flipped in the memory of one device."""
    pieces = [
        jax.device_put(
            flipped(piece.data, element, bit) if piece.device == device else piece.data,
            piece.device,
        )
        for piece in x.addressable_shards
    ]
    return jax.make_array_from_single_device_arrays(x.shape, x.sharding, pieces)


def test_a_flipped_bit_in_one_copy_is_found_and_named(mesh_of):
    mesh = mesh_of(4, 2, names=("d", "t"))
    params = params_on(mesh)
    compare = replicas.Replicas(params)
    assert compare.odd(compare.start(params)) == []
    compare.check(params)
    device = mesh.devices[2, 1]
    params["block"]["kernel"] = damaged(params["block"]["kernel"], device, bit=0)
    (odd,) = compare.odd(compare.start(params))
    assert (odd.parameter, odd.device) == ("block.kernel", str(device))
    assert (odd.place, odd.copies, odd.sure) == ({"d": 2, "t": 1}, 4, True)
    with pytest.raises(status.Fault, match=r"block.kernel on .* of process 0 \(d 2, t 1\)") as one:
        compare.check(params)
    assert one.value.status == status.CORRUPTED


def test_of_two_copies_neither_is_in_the_majority(mesh_of):
    mesh = mesh_of(2, 1, names=("d", "t"))
    params = params_on(mesh)
    params["norm"]["scale"] = damaged(params["norm"]["scale"], mesh.devices[1, 0])
    with pytest.raises(status.Fault, match=r"norm.scale .* \(or the other copy"):
        replicas.Replicas(params).check(params)


def test_many_damaged_copies_are_counted(mesh_of):
    mesh = mesh_of(8, 1, names=("d", "t"))
    params = params_on(mesh)
    for device in mesh.devices.flat[:3]:
        for name, leaf in (("block", "kernel"), ("norm", "scale")):
            params[name][leaf] = damaged(params[name][leaf], device)
    with pytest.raises(status.Fault, match="and 1 more"):
        replicas.Replicas(params).check(params)


def test_where_nothing_is_copied_nothing_is_compared(mesh_of):
    mesh = mesh_of(1, 2, names=("d", "t"))
    cut = jax.device_put(np.zeros((2, 2), np.float32), NamedSharding(mesh, P("t")))
    for tree in ({"a": cut}, {"a": jnp.zeros(3)}):
        compare = replicas.Replicas(tree)
        assert compare.start(tree) is None and compare.odd(None) == []


# ---- agreement


class Texts:
    """The store of several processes that are threads here."""

    def __init__(self):
        self.texts = {}
        self.changed = threading.Condition()

    def put(self, key, value):
        with self.changed:
            self.texts[key] = value
            self.changed.notify_all()

    def get(self, key, seconds):
        with self.changed:
            if not self.changed.wait_for(lambda: key in self.texts, seconds):
                raise TimeoutError(key)
            return self.texts[key]

    def folder(self, prefix, seconds):
        with self.changed:
            return {k[len(prefix) + 1 :]: v for k, v in self.texts.items() if k.startswith(prefix)}


def verdicts(all_facts, seconds=20.0):
    """What `compare` says in each of several processes."""
    texts, found = Texts(), {}

    def one(rank, facts):
        try:
            agreement.compare(facts, texts, rank, len(all_facts), seconds, number=0)
            found[rank] = None
        except status.Fault as fault:
            found[rank] = fault

    threads = [
        threading.Thread(target=one, args=item)
        for item in enumerate(all_facts)
        if item[1] is not None
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_equal_processes_agree():
    facts = agreement.settings({"batch": 16}) | agreement.code()
    assert verdicts([facts] * 3) == {0: None, 1: None, 2: None}


@pytest.mark.parametrize("odd", [0, 1, 3])
def test_a_process_with_another_config_is_named_in_all(odd):
    """Also if it is the first: the usual facts are those of most."""
    facts = [agreement.settings({"batch": 16 + 16 * (rank == odd)}) for rank in range(4)]
    message = f"process {odd} has config.batch 32 instead of 16"
    for fault in verdicts(facts).values():
        assert message in str(fault) and fault.status == status.DISAGREES


def test_a_process_with_other_code_is_named():
    facts = agreement.code()
    other = {**facts, "code.models/vit.py": "abc", "code.models/new.py": "def"}
    del other["code.models/step.py"]
    (fault, _) = verdicts([facts, other]).values()
    for part in ("process 1 has", "code.models/vit.py abc instead of", "no code.models/step.py"):
        assert part in str(fault)
    assert "code.models/new.py def, which is not elsewhere" in str(fault)


def test_a_process_that_does_not_come_is_named():
    (fault,) = verdicts([{"a": "b"}, None], seconds=0.2).values()
    assert "no answer from process 1 of 2" in str(fault) and fault.status == status.PEER_LOST


def test_more_differences_than_fit_are_counted():
    many = {str(number): "a" for number in range(9)}
    assert "4 more differences" in agreement.difference(many, {})
    facts = [{"a": str(rank)} for rank in range(8)]
    assert "2 more of 8 processes differ" in str(verdicts(facts)[0])


def test_facts_name_fields_files_versions_and_flags(monkeypatch):
    monkeypatch.setenv("JAX_DEFAULT_MATMUL_PRECISION", "highest")
    monkeypatch.setenv("JAX_PROCESS_ID", "3")
    facts = agreement.settings({"watch.processes": 2}) | agreement.code()
    assert facts["config.watch.processes"] == "2" and facts["version.jax"] == jax.__version__
    assert facts["flag.JAX_DEFAULT_MATMUL_PRECISION"] == "highest"
    assert "flag.JAX_PROCESS_ID" not in facts
    assert {"code.models/vit.py", "code.collective_matmul/einsum.py"} <= facts.keys()


def test_the_number_of_a_process_is_its_own():
    one, two = (
        agreement.settings({"watch.process": rank, "watch.processes": 2}) for rank in range(2)
    )
    assert one == two and "config.watch.processes" in one


def test_the_program_is_a_fact():
    def lowered(scale):
        return agreement.program(jax.jit(lambda x: x * scale).lower(jnp.zeros(3)))

    assert lowered(2.0) == lowered(2.0) != lowered(3.0)


# ---- watchdog


class Said(list):
    """Lines, which can be waited for."""

    def __call__(self, text):
        self.append(text)

    def until(self, part, seconds=20.0):
        end = time.monotonic() + seconds
        while not any(part in line for line in self):
            assert time.monotonic() < end, f"{part!r} was not said, but {list(self)}"
            threading.Event().wait(0.01)


def test_a_stall_dumps_all_stacks_and_the_run_may_go_on(tmp_path):
    said = Said()
    with Watchdog(0.2, stacks=tmp_path, say=said) as dog:
        dog.beat(7)
        said.until("is at step 7")
        dog.beat(8)
        said.until("the run goes on")
    text = (tmp_path / "stacks-0.txt").read_text()
    assert "test_a_stall_dumps_all_stacks" in text and "_watch" in text
    assert len(said) == 2, "a stall is told once"


def test_before_the_first_step_and_while_resting_nothing_is_a_stall(tmp_path):
    said, looked = Said(), threading.Event()
    counts = Texts()

    class Counting(Watchdog):
        def _publish(self):
            super()._publish()
            if self.count == 20:
                looked.set()

    with Counting(0.04, stacks=tmp_path, others=counts, say=said) as dog:
        dog.beat(1)
        dog.rest()
        assert looked.wait(20)
    assert said == []


def test_an_aborting_watchdog_ends_the_process(tmp_path):
    ended = Said()
    said = Said()
    with Watchdog(0.1, "abort", stacks=tmp_path, say=said, end=lambda code: ended(str(code))) as d:
        d.beat(1)
        ended.until("43")
    assert "status 43" in said[-1]


@pytest.mark.parametrize(
    "state, message",
    [
        ({"count": 5, "step": 9}, r"stopped, dead or cut off: process 1 (pid 12 on there) at"),
        (None, "all 1 processes run, and hang at step 9"),
    ],
)
def test_whoever_does_not_count_is_named(tmp_path, state, message):
    said, texts = Said(), Texts()
    if state is not None:
        texts.put("watchdog/1", json.dumps({**state, "pid": 12, "host": "there"}))
    with Watchdog(0.1, stacks=tmp_path, others=texts, say=said) as dog:
        dog.beat(9)
        said.until(message)


def test_whoever_is_behind_is_named(tmp_path):
    said, texts = Said(), Texts()
    with (
        Watchdog(0.3, stacks=tmp_path, others=texts, say=Said(), rank=1) as behind,
        Watchdog(0.3, stacks=tmp_path, others=texts, say=said) as dog,
    ):
        behind.beat(4)
        dog.beat(5)
        said.until("behind the others: process 1 ")


def test_a_store_that_does_not_answer_is_process_0(tmp_path, monkeypatch):
    class Silent(Texts):
        def folder(self, prefix, seconds):
            raise TimeoutError

    said = Said()
    with Watchdog(0.1, stacks=tmp_path, others=Silent(), say=said, rank=1) as dog:
        dog.beat(1)
        said.until("process 0 does not answer")


def test_a_call_that_hangs_is_left_behind():
    with pytest.raises(TimeoutError):
        store.within(0.05, threading.Event().wait)
    assert store.within(5.0, lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        store.within(5.0, lambda: 1 // 0)


# ---- peers


@pytest.fixture
def three():
    """Three processes' connections, and by rank whom each of them lost."""
    texts, lost = Texts(), {rank: Said() for rank in range(3)}
    with contextlib.ExitStack() as stack:
        peers = [
            stack.enter_context(
                Peers(texts, rank, 3, "localhost", lambda gone, r=rank: lost[r](str(gone)))
            )
            for rank in range(3)
        ]
        end = time.monotonic() + 20
        while len(peers[0]._lines) < 2:
            assert time.monotonic() < end
            threading.Event().wait(0.01)
        yield texts, peers, lost
    for one in peers:
        one._thread.join(20)


def test_whoever_is_gone_is_noticed_by_all(three):
    _, peers, lost = three
    peers[1]._lines[0].shutdown(socket.SHUT_RDWR)  # as the kernel does for a process that died
    lost[0].until("1")
    lost[2].until("1")
    assert lost[0] == lost[2] == ["1"]


def test_whoever_says_goodbye_is_not_lost(three):
    _, peers, lost = three
    for one in reversed(peers):
        one.__exit__(None, None, None)
        one._thread.join(20 if one.rank == 0 else 0)
    assert not any(lost.values())


def test_a_stranger_is_not_listened_to(three):
    texts, peers, lost = three
    with socket.create_connection(("localhost", int(texts.get("peers/port", 1)))) as stranger:
        stranger.sendall(b"GET / HTTP/1.1")
        stranger.settimeout(20)
        assert stranger.recv(1) == b""
    assert len(peers[0]._lines) == 2 and not any(lost.values())


# ---- preemption


def test_sigterm_is_a_flag_that_the_loop_reads():
    before = signal.getsignal(signal.SIGTERM)
    with preemption.Preemption() as leaving:
        assert not leaving.reached()
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
            assert leaving.reached()
    assert signal.getsignal(signal.SIGTERM) == before


def test_preemption_outside_of_the_main_thread_listens_to_nothing():
    found = []

    def work():
        with preemption.Preemption() as leaving:
            found.append(leaving.reached())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [False]


# ---- connecting


@pytest.mark.parametrize(
    "watch, variables, message",
    [
        (dict(coordinator="a:1"), {}, r"how many processes .* and the number of this one"),
        (dict(processes=2, process=0), {}, r"say also the coordinator"),
        (dict(), {"JAX_PROCESS_ID": "1"}, r"say also the coordinator .* and how many"),
        (dict(), {"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES='two' is not a number"),
        (dict(coordinator="a:1", processes=2, process=2), {}, "process 2 of 2: .* from 0 to 1"),
        (
            dict(processes=2, process=0),
            {"JAX_COORDINATOR_ADDRESS": "a"},
            "coordinator 'a' is not HOST:PORT",
        ),
    ],
)
def test_half_a_connection_is_refused(watch, variables, message):
    with pytest.raises(ValueError, match=message):
        distributed.explicit(Watch(**watch), variables)


def test_flags_come_before_variables():
    variables = {
        "JAX_COORDINATOR_ADDRESS": "b:2",
        "JAX_NUM_PROCESSES": "4",
        "JAX_PROCESS_ID": "3",
    }
    assert distributed.explicit(Watch(), variables) == ("b:2", 4, 3)
    assert distributed.explicit(Watch(process=0), variables) == ("b:2", 4, 0)
    assert distributed.explicit(Watch(), {}) == (None, None, None)


def test_launchers_are_detected(monkeypatch):
    slurm = dict.fromkeys(distributed.SLURM, "2")
    assert distributed.detected(slurm) == "Slurm"
    assert distributed.detected({**slurm, "SLURM_NTASKS": "1"}) is None
    assert distributed.detected({"OMPI_COMM_WORLD_SIZE": "2"}) == "Open MPI"
    assert distributed.detected({"TPU_WORKER_HOSTNAMES": "a,b"}) == "TPU"
    assert distributed.detected({"TPU_WORKER_HOSTNAMES": "a,b", "JAX_PLATFORMS": "cpu"}) is None
    monkeypatch.setattr(distributed, "CHIPS", ("no such file",))
    assert distributed.detected({}) is None


def test_a_process_of_its_own_connects_with_none(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "JAX_COORD", "JAX_NUM_PROC", "JAX_PROCESS")):
            monkeypatch.delenv(name)
    assert distributed.connect(Watch()) == 1
    assert store.connected() is None and store.rank() == 0 and store.processes() == 1


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(stall=0.0), "watch.stall=0.0 must be more than 0"),
        (dict(processes=0), "watch.processes=0"),
        (dict(process=-1), "watch.process=-1"),
        (dict(coordinator="node0"), "watch.coordinator='node0' is not HOST:PORT"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Watch(**changes)


def test_a_lone_process_ends_with_the_status_of_its_fault(capsys):
    with pytest.raises(SystemExit) as ended, ending.leaving():
        raise status.Fault("the copies differ", status.CORRUPTED)
    assert ended.value.code == 45 and capsys.readouterr().err == "the copies differ\n"
    with pytest.raises(KeyError), ending.leaving():
        raise KeyError("an ordinary error")


def test_statuses_are_described():
    assert status.describe(-9) == "killed by SIGKILL"
    assert status.describe(43).startswith("status 43: no step for too long")
    assert status.describe(1) == "status 1"


# ---- supervision


QUICK = Supervision(restarts=3, backoff=0.0, grace=5.0)


def python(code, *arguments):
    return [sys.executable, "-c", code, *map(str, arguments)]


FAILS_TWICE = """
import os, pathlib, sys
path = pathlib.Path(sys.argv[1]); tries = len(path.read_text()) if path.exists() else 0
path.write_text("x" * (tries + 1))
if tries < 2: os.kill(os.getpid(), 9) if tries else sys.exit(46)
"""


def test_what_fails_is_started_again(tmp_path):
    said = Said()
    assert supervise(python(FAILS_TWICE, tmp_path / "tries"), QUICK, said) == 0
    assert (tmp_path / "tries").read_text() == "xxx"
    assert "status 46: another process is gone; restart 1 of 3" in said[0]
    assert "killed by SIGKILL; restart 2 of 3" in said[1] and len(said) == 2


@pytest.mark.parametrize("code", [1, 75])
def test_restarts_are_bounded(tmp_path, code):
    said = Said()
    script = "import pathlib, sys; open(sys.argv[1], 'a').write('x'); sys.exit(int(sys.argv[2]))"
    command = python(script, tmp_path / "tries", code)
    assert supervise(command, QUICK, said) == code
    assert (tmp_path / "tries").read_text() == "xxxx"
    assert said[-1].endswith("giving up after 3 restarts")


@pytest.mark.parametrize("code", [2, 42, 44])
def test_what_does_not_get_better_is_not_started_again(code):
    said = Said()
    assert supervise(python(f"raise SystemExit({code})"), QUICK, said) == code
    assert len(said) == 1 and said[0].endswith("not started again")


TOGETHER = """
import os, pathlib, sys, time
rank, folder = os.environ["JAX_PROCESS_ID"], pathlib.Path(sys.argv[1])
host = os.environ["JAX_COORDINATOR_ADDRESS"]
with open(folder / rank, "a") as file: file.write(host + "\\n")
if len((folder / rank).read_text().split()) == 1:
    if rank == "1": os.kill(os.getpid(), 9)
    time.sleep(60)
"""


def test_the_processes_of_a_machine_are_started_again_together(tmp_path):
    said = Said()
    how = dataclasses.replace(QUICK, processes=2, grace=0.2)
    assert supervise(python(TOGETHER, tmp_path), how, said) == 0
    assert "process 1 of 2 after" in said[0] and "SIGKILL" in said[0] and len(said) == 1
    first, second = ((tmp_path / rank).read_text().split() for rank in "01")
    assert first == second and len(set(first)) == 2, "each start has a port of its own"


def test_chaos_kills_at_random_and_says_so():
    said = Said()
    how = dataclasses.replace(QUICK, processes=2, grace=0.1, chaos=0.3, restarts=1)
    assert supervise(python("import time; time.sleep(60)"), how, said) == 137
    assert sum("chaos: killed process" in line for line in said) == 2
    assert "SIGKILL; giving up after 1 restarts" in said[-1]


def test_a_sigterm_goes_on_to_the_processes_and_ends_the_supervision(tmp_path):
    code = (
        "import signal, sys, pathlib\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
        "pathlib.Path(sys.argv[1]).write_text('ready')\nsignal.pause()"
    )
    run = subprocess.Popen(
        [sys.executable, "-m", "models.supervise", "--", *python(code, tmp_path / "ready")],
        stderr=subprocess.PIPE,
        text=True,
    )
    end = time.monotonic() + 60
    while not (tmp_path / "ready").exists():
        assert time.monotonic() < end and run.poll() is None
        threading.Event().wait(0.05)
    run.terminate()
    _, said = run.communicate(timeout=60)
    assert run.returncode == 75 and "saved; not started again" in said


def test_the_supervisor_says_how_it_is_called(capsys):
    from models import supervise as command

    assert command.split(["--restarts", "3", "--", "a", "--", "b"]) == (
        ["--restarts", "3"],
        ["a", "--", "b"],
    )
    assert command.main([]) == 2
    assert "say what to run after --" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        command.main(["--restart", "3", "--", "a"])
    assert ended.value.code == 2 and "--restarts" in capsys.readouterr().err
    with pytest.raises(ValueError, match="processes=0 must be at least 1"):
        Supervision(processes=0)


def test_a_healthy_run_counts_restarts_anew(tmp_path):
    said = Said()
    how = dataclasses.replace(QUICK, restarts=1, healthy=0.0)
    assert supervise(python(FAILS_TWICE, tmp_path / "tries"), how, said) == 0
    assert [line[-23:] for line in said] == ["; restart 1 of 1 in 0 s"] * 2


def test_the_chaos_is_repeatable():
    from models.watch import supervisor

    how = Supervision(chaos=20.0)
    draws = [supervisor._next(how, random.Random(3)) - time.monotonic() for _ in range(2)]
    assert abs(draws[0] - draws[1]) < 1.0 and 9.0 < draws[0] < 31.0
