"""Connecting the processes of a run.

Who they are is said by, in this order: the flags `--watch.coordinator HOST:PORT --watch.processes N
--watch.process I`; the variables JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID; the
TPU pod, Slurm or Open MPI, which jax asks. Where there is nothing of it, the process is alone.
"""

from __future__ import annotations

import contextlib
import glob
import os
import socket
import sys
import time
from collections.abc import Iterator, Mapping

import jax

from models.watch import status, store
from models.watch.config import Watch
from models.watch.ending import leave, leaving
from models.watch.peers import Peers

# What tells that a launcher which jax understands has started several of us.
SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
POD = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES", "MEGASCALE_COORDINATOR_ADDRESS")
OPEN_MPI = ("OMPI_MCA_orte_hnp_uri", "OMPI_COMM_WORLD_SIZE")
CHIPS = ("/dev/accel[0-9]*", "/dev/vfio/[0-9]*")


def connect(watch: Watch) -> int:
    """Connects this process with the others of the run, before jax is asked for devices.

    Args:
      watch: the names that the command line gave, and how long to wait.

    Returns:
      How many processes there are; 1 where none was spoken of.

    Raises:
      ValueError: if some of coordinator, processes and process are named and others are not, or
        the number of this process is not below theirs.
      Fault: if the others do not answer in time.
    """
    if jax.distributed.is_initialized():
        return store.processes()
    address, count, number = explicit(watch, os.environ)
    if count is not None and number is not None and address is not None:
        _meet(address, count, number, watch)
        return count
    launcher = detected(os.environ)
    if launcher is None:
        return 1
    try:
        jax.distributed.initialize(
            initialization_timeout=watch.patience, heartbeat_timeout_seconds=watch.heartbeat
        )
    except ValueError as error:
        if launcher == "TPU" and "should be defined" in str(error):
            return 1  # a chip, and no pod around it
        raise
    return store.processes()


def explicit(
    watch: Watch, variables: Mapping[str, str]
) -> tuple[str | None, int | None, int | None]:
    """Coordinator, how many processes, and which one this is: from flags, else from variables.

    Raises:
      ValueError: if only some of them are named, or one of them makes no sense.
    """
    address = watch.coordinator or variables.get("JAX_COORDINATOR_ADDRESS") or None
    count = watch.processes or _number(variables, "JAX_NUM_PROCESSES")
    number = watch.process if watch.process is not None else _number(variables, "JAX_PROCESS_ID")
    named = {
        "coordinator (--watch.coordinator or JAX_COORDINATOR_ADDRESS)": address,
        "how many processes (--watch.processes or JAX_NUM_PROCESSES)": count,
        "the number of this one (--watch.process or JAX_PROCESS_ID)": number,
    }
    missing = [what for what, value in named.items() if value is None]
    if missing and len(missing) < len(named) and detected(variables) is None:
        raise ValueError(f"to connect processes, say also the {' and '.join(missing)}")
    if count is not None and number is not None and number >= count:
        raise ValueError(f"process {number} of {count}: they are numbered from 0 to {count - 1}")
    if address is not None and not address.rpartition(":")[2].isdigit():
        raise ValueError(f"coordinator {address!r} is not HOST:PORT, as in node0:1234")
    return address, count, number


def detected(variables: Mapping[str, str]) -> str | None:
    """What started several processes: "Slurm", "TPU", "Open MPI", or None."""
    if all(name in variables for name in SLURM):
        return "Slurm" if int(variables["SLURM_NTASKS"]) > 1 else None
    if any(name in variables for name in OPEN_MPI):
        return "Open MPI"
    if variables.get("JAX_PLATFORMS", "tpu").split(",")[0] != "tpu":
        return None  # the user wants no chip, though there be some
    if any(name in variables for name in POD) or any(glob.glob(path) for path in CHIPS):
        return "TPU"
    return None


def _number(variables: Mapping[str, str], name: str) -> int | None:
    text = variables.get(name, "")
    if not text:
        return None
    if not text.isdigit():
        raise ValueError(f"{name}={text!r} is not a number")
    return int(text)


def _meet(address: str, count: int, number: int, watch: Watch) -> None:
    """Waits for the coordinator with a clear message, and then for all."""
    host, _, port = address.rpartition(":")
    who = f"process {number} of {count}"
    if number:
        _reachable(host.strip("[]"), int(port), who, watch.patience)
    elif _taken(int(port)):
        raise status.Fault(
            f"{who} cannot listen on {address}: the port is taken; choose another for all",
            status.PEER_LOST,
        )
    try:
        jax.distributed.initialize(
            address,
            count,
            number,
            cluster_detection_method="deactivate",
            initialization_timeout=watch.patience,
            heartbeat_timeout_seconds=watch.heartbeat,
        )
    except jax.errors.JaxRuntimeError as error:
        raise status.Fault(
            f"{who} met {address}, and not all of the {count} processes came within "
            f"{watch.patience} s: {str(error).splitlines()[0]}",
            status.PEER_LOST,
        ) from error


def _reachable(host: str, port: int, who: str, patience: float) -> None:
    """jax retries too, but ends the process from C++ when its time is over."""
    end = time.monotonic() + patience
    while True:
        try:
            socket.create_connection((host, port), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise status.Fault(
                    f"{who} cannot reach the coordinator at {host}:{port} after {patience:g} s "
                    f"({error}); is process 0 running there, and may others connect to the port?",
                    status.PEER_LOST,
                ) from error
        time.sleep(0.2)


def _taken(port: int) -> bool:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", port))
        except OSError:
            return True
    return False


@contextlib.contextmanager
def joined(watch: Watch) -> Iterator[int]:
    """`connect`, and ends the process as the run ends: with a line and a status of `status.py`.

    Where processes are connected, an error ends this one at once: the ordinary way out waits for
    all processes, minutes long, and those that are gone do not come. If another one is gone, this
    one ends too, as soon as it notices. Where that was process 0, jax notices as fast, and
    may end this one by SIGABRT first.

    Args:
      watch: as of `connect`.
    """
    with leaving():
        count = connect(watch)
        others = store.connected()
        if others is None or count == 1:
            yield count
            return
        host = store.coordinator().rpartition(":")[0].strip("[]")
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(Peers(others, store.rank(), count, host, _lost))
            except OSError as error:
                print(
                    f"{store.myself()} has no second connection to process 0 ({error}): that "
                    f"another one is gone is noticed by heartbeats alone, in {watch.heartbeat} s",
                    file=sys.stderr,
                )
            yield count


def _lost(rank: int) -> None:
    print(f"{store.myself()} lost process {rank}, which is gone", file=sys.stderr, flush=True)
    leave(status.PEER_LOST)
