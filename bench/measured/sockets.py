"""Two processes on two network namespaces, joined by a link of a known rate.

`link` makes the namespaces and the veth pair between them, and takes them away again whatever
happens. Each end sends through a token bucket (`tc tbf`), so that the wire is slow and known. The
bucket is small: what fits into it travels at once, and a bucket of some MB would hide the wire.

In a namespace of its own a process finds its host's name at 127.0.0.1, where the other process is
not, and gloo binds there. `ip netns exec` puts /etc/netns/NAME/hosts in the place of /etc/hosts, so
that file gives the name the address of the veth.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bench.record import ROOT

ADDRESSES = ("10.77.0.1", "10.77.0.2")
PORT = 9911  # in a namespace of its own, so nothing else has it
THREADS = "2"  # of a process: one that waits for the socket, and one that multiplies
HOSTS = pathlib.Path("/etc/netns")  # where ip looks for the files of a namespace


class UnavailableError(RuntimeError):
    """This machine does not let us make the link; the message says what it refused."""


def check() -> None:
    """Raises UnavailableError unless the user is root and has the programs `ip` and `tc`."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        raise UnavailableError("network namespaces need root on Linux; run it as root")
    for program in ("ip", "tc"):
        if shutil.which(program) is None:
            raise UnavailableError(f"there is no program {program!r}; install iproute2")


@contextlib.contextmanager
def link(*, rate_mbit: int, burst_kb: int) -> Iterator[tuple[str, str]]:
    """The names of two namespaces whose only link has this rate each way.

    Args:
      rate_mbit: of each direction, in Mbit/s.
      burst_kb: what the bucket holds, in KiB.

    Raises:
      UnavailableError: if the machine forbids it, with the command and what it said.
    """
    check()
    names = (f"bench{os.getpid()}a", f"bench{os.getpid()}b")
    with contextlib.ExitStack() as undo:
        if not HOSTS.exists():
            HOSTS.mkdir()
            undo.callback(HOSTS.rmdir)
        for name, address in zip(names, ADDRESSES, strict=True):
            _run("ip", "netns", "add", name)
            undo.callback(subprocess.run, ["ip", "netns", "del", name], check=False)
            (HOSTS / name).mkdir()
            undo.callback(shutil.rmtree, HOSTS / name)
            known = f"127.0.0.1 localhost\n{address} {socket.gethostname()}\n"
            (HOSTS / name / "hosts").write_text(known)
        ends = ("veth0", "veth1")
        _run("ip", "link", "add", ends[0], "netns", names[0], "type", "veth",
             "peer", "name", ends[1], "netns", names[1])  # fmt: skip
        for name, address, end in zip(names, ADDRESSES, ends, strict=True):
            _run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", end)
            _run("ip", "-n", name, "link", "set", "lo", "up")
            _run("ip", "-n", name, "link", "set", end, "up")
            _run("tc", "-n", name, "qdisc", "add", "dev", end, "root", "tbf",
                 "rate", f"{rate_mbit}mbit", "burst", f"{burst_kb}kb",
                 "latency", "50ms")  # fmt: skip
        yield names


def run_pair(
    names: Sequence[str], request: Mapping[str, Any], folder: pathlib.Path, *, patience: float
) -> list[Any]:
    """What each of two processes of `bench.measured.sockets_worker` found.

    Args:
      names: of the namespaces.
      request: what to time; as JSON it is an argument of the process.
      folder: where the processes leave their results.
      patience: seconds until both are ended.

    Raises:
      RuntimeError: if one fails, with what it wrote; or if they take longer than `patience`.
    """
    processes, logs = [], [folder / f"{rank}.log" for rank in range(2)]
    try:
        for rank, (name, log) in enumerate(zip(names, logs, strict=True)):
            told = dict(request) | {"rank": rank, "coordinator": f"{ADDRESSES[0]}:{PORT}"}
            command = [
                "ip",
                "netns",
                "exec",
                name,
                sys.executable,
                "-m",
                "bench.measured.sockets_worker",
            ]
            with log.open("w") as out:
                processes.append(
                    subprocess.Popen(
                        [*command, json.dumps(told), str(folder / f"{rank}.json")],
                        cwd=ROOT,
                        env=os.environ | {"JAX_PLATFORMS": "cpu", "NPROC": THREADS},
                        stdin=subprocess.DEVNULL,
                        stdout=out,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )
        statuses = [process.wait(timeout=patience) for process in processes]
    except subprocess.TimeoutExpired as late:
        raise RuntimeError(f"the processes took more than {patience:g} s") from late
    finally:
        for process in processes:
            process.kill()
            process.wait()
    if any(statuses):
        told_by = "\n".join(log.read_text()[-2000:] for log in logs)
        raise RuntimeError(f"the processes ended with {statuses}:\n{told_by}")
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr or done.stdout).strip()
        raise UnavailableError(f"this machine refuses `{' '.join(command)}`: {said}")
