"""Ray: `python docs/launch/ray_train.py --hosts 2 --gpus 8 -- CONFIG [--field value ...]`.

Submitted to a running Ray cluster, whose machines have this checkout as their working folder. One
actor for each machine takes all of its accelerators, so that no two share one, and runs a
supervised process with all of its devices; the machine of the first one coordinates.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys

import ray


@ray.remote
class Host:
    """One machine of the run."""

    def address(self) -> str:
        """HOST:PORT that others reach this machine at, and nobody listens on yet."""
        with socket.socket() as listener:
            listener.bind(("", 0))
            return f"{ray.util.get_node_ip_address()}:{listener.getsockname()[1]}"

    def train(self, coordinator: str, hosts: int, rank: int, arguments: list[str]) -> int:
        """Runs this machine's process to the end, and gives its status."""
        supervise = [sys.executable, "-m", "models.supervise", "--restarts", "10", "--"]
        variables = {
            "JAX_COORDINATOR_ADDRESS": coordinator,
            "JAX_NUM_PROCESSES": str(hosts),
            "JAX_PROCESS_ID": str(rank),
        }
        return subprocess.run(
            [*supervise, sys.executable, "-m", "models.train", *arguments],
            env=os.environ | variables,
            check=False,
        ).returncode


def main() -> int:
    """Returns the status of the first machine that failed, or 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hosts", type=int, required=True, help="how many machines")
    parser.add_argument("--gpus", type=int, default=0, help="of each machine")
    parser.add_argument("--tpus", type=int, default=0, help="chips of each machine")
    parser.add_argument("arguments", nargs="+", help="of models.train, after --")
    asked = parser.parse_args()
    ray.init()
    taken = {"num_gpus": asked.gpus} if asked.gpus else {"resources": {"TPU": asked.tpus}}
    hosts = [
        Host.options(scheduling_strategy="SPREAD", **taken).remote() for _ in range(asked.hosts)
    ]
    coordinator = ray.get(hosts[0].address.remote())
    statuses = ray.get(
        [
            host.train.remote(coordinator, asked.hosts, rank, asked.arguments)
            for rank, host in enumerate(hosts)
        ]
    )
    return next((status for status in statuses if status), 0)


if __name__ == "__main__":
    raise SystemExit(main())
