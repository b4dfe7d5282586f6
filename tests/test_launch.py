"""The launch recipes, as far as they can be tried without a cluster: two processes on this machine.

What a cluster brings (srun, scontrol, ssh, ray) is played by a few lines, which pass on what the
real ones do. The processes train a small model for two steps, connected by what the recipe told
them.
"""

import json
import math
import os
import pathlib
import shlex
import subprocess
import sys
import textwrap

import pytest

from models import configs
from models.supervise import split
from models.watch import status
from models.watch.group import free_port

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[1]
LAUNCH = ROOT / "docs" / "launch"
PATIENCE = 300  # seconds until a recipe that hangs is ended

# A small model for two steps, on a mesh that two processes of one device each have.
SMALL = shlex.split(
    "digits --steps 2 --batch 16 --evaluate 2 --mesh 2,1,1 --model.width 16 --model.mlp-dim 32 "
    "--model.depth 1 --model.heads 2"
)


def script(path, text):
    path.write_text("#!/bin/sh\n" + textwrap.dedent(text))
    path.chmod(0o755)


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """All recipes train the same, so it is compiled once, and kept in a folder."""
    return {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("programs")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


@pytest.fixture
def cluster(tmp_path, programs):
    """Runs a recipe with a folder of stand-ins first on PATH; gives the finished process."""
    stand_ins = tmp_path / "bin"
    stand_ins.mkdir()
    script(stand_ins / "python", f'exec {shlex.quote(sys.executable)} "$@"\n')

    def run(*command, code=0, **variables):
        common = {
            "PATH": f"{stand_ins}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": f"{stand_ins}{os.pathsep}{ROOT}",
            "JAX_NUM_CPU_DEVICES": "1",
            "NPROC": "16",
        }
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=os.environ | common | programs | variables,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE,
        )
        assert done.returncode == code, f"{done.stdout}\n{done.stderr}"
        return done

    run.folder = stand_ins
    return run


def trained(out):
    """The steps that a run made, by its metrics."""
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [record["step"] for record in map(json.loads, lines) if "loss" in record]


# As many tasks as asked for, here, with the variables that Slurm sets.
SRUN = """
    set -- "$@"
    pids=
    for task in 0 1; do
        SLURM_JOB_ID={job} SLURM_STEP_NODELIST=localhost SLURM_NTASKS=2 SLURM_PROCID=$task \\
            SLURM_LOCALID=$task "$@" &
        pids="$pids $!"
    done
    status=0
    for pid in $pids; do wait "$pid" || status=$?; done
    exit "$status"
"""


def test_slurm(cluster, tmp_path):
    """jax finds its way by Slurm's variables alone; the port follows from the job's number."""
    job = (free_port() - 61440) % 4096
    script(cluster.folder / "srun", SRUN.format(job=job))
    done = cluster(str(LAUNCH / "slurm.sh"), *SMALL, "--out", str(tmp_path / "run"))
    assert trained(tmp_path / "run") == [1, 2], done.stderr


def test_slurm_puts_a_preempted_job_in_the_queue_again(cluster, tmp_path):
    script(cluster.folder / "srun", "exit 75\n")
    script(cluster.folder / "scontrol", f'echo "$@" > {shlex.quote(str(tmp_path / "asked"))}\n')
    cluster(str(LAUNCH / "slurm.sh"), "digits", code=75, SLURM_JOB_ID="17")
    assert (tmp_path / "asked").read_text() == "requeue 17\n"


# Another machine's shell gets the line, as by ssh.
SSH = """
    host=$1; shift
    echo "$host" >> {log}
    exec sh -c "$*"
"""


def test_ssh(cluster, tmp_path):
    log = tmp_path / "hosts"
    script(cluster.folder / "ssh", SSH.format(log=shlex.quote(str(log))))
    out = tmp_path / "it's a run"
    command = [str(LAUNCH / "ssh.sh"), *SMALL, "--out", str(out)]
    hosts = {"HOSTS": "localhost 127.0.0.1", "PORT": str(free_port())}
    done = cluster(*command, **hosts)
    assert trained(out) == [1, 2], done.stderr
    assert sorted(log.read_text().split()) == ["127.0.0.1", "localhost"]


def test_ssh_ends_with_the_status_of_what_failed(cluster):
    script(cluster.folder / "ssh", '[ "$1" = good ] || exit 44\n')
    assert "say which" in cluster(str(LAUNCH / "ssh.sh"), "digits", code=2, HOSTS="").stderr
    cluster(str(LAUNCH / "ssh.sh"), "digits", code=44, HOSTS="good bad good")


RAY = '''
"""The few functions of Ray that the recipe uses: an actor's calls run in a thread."""
import concurrent.futures, types

pool = concurrent.futures.ThreadPoolExecutor()
util = types.SimpleNamespace(get_node_ip_address=lambda: "127.0.0.1")
asked = []

def init(): pass

def get(what): return [get(one) for one in what] if isinstance(what, list) else what.result()

class Actor:
    def __init__(self, instance): self.instance = instance
    def __getattr__(self, name):
        method = getattr(self.instance, name)
        return types.SimpleNamespace(remote=lambda *args: pool.submit(method, *args))

def remote(kind):
    def options(**options):
        assert options == {"scheduling_strategy": "SPREAD", "num_gpus": 8}, options
        return types.SimpleNamespace(remote=lambda: Actor(kind()))
    return types.SimpleNamespace(options=options)
'''


def test_ray(cluster, tmp_path):
    (cluster.folder / "ray.py").write_text(RAY)
    recipe = [sys.executable, str(LAUNCH / "ray_train.py"), "--hosts", "2", "--gpus", "8", "--"]
    done = cluster(*recipe, *SMALL, "--out", str(tmp_path / "run"))
    assert trained(tmp_path / "run") == [1, 2], done.stderr


def job_of(name):
    """Of a JobSet: the job, its container, and the variables that have values."""
    yaml = pytest.importorskip("yaml", reason="PyYAML, which reads the recipe, is not installed")
    whole = yaml.safe_load((LAUNCH / name).read_text(encoding="utf-8"))
    (replicated,) = whole["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    variables = {x["name"]: x.get("value") for x in container.get("env", [])}
    return whole, replicated, job, container, variables


@pytest.mark.parametrize(
    "name, resource", [("gke-tpu", "google.com/tpu"), ("gke-gpu", "nvidia.com/gpu")]
)
def test_gke(name, resource):
    """What the pods would run is a config that fits the chips that they get."""
    whole, replicated, job, container, variables = job_of(f"{name}.yaml")
    _, command = split(container["command"][3:] + container["args"])
    assert container["command"][:3] == ["python", "-m", "models.supervise"]
    assert command[:3] == ["python", "-m", "models.train"]
    config = configs.from_command_line(command[3:])
    pods, chips = job["parallelism"], int(container["resources"]["limits"][resource])
    assert pods == job["completions"] and config.devices == pods * chips
    assert config.batch % (config.devices) == 0 and config.checkpoint.every
    assert config.watch.preempted_status == status.PREEMPTED
    (mount,) = (x for x in container["volumeMounts"] if x["name"] == "data")
    assert str(config.out).startswith(mount["mountPath"] + "/"), "the pods do not share the folder"
    (rule,) = job["podFailurePolicy"]["rules"]
    assert set(rule["onExitCodes"]["values"]) == set(status.FINAL) - {0}
    if name == "gke-tpu":
        topology = job["template"]["spec"]["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
        assert math.prod(map(int, topology.split("x"))) == config.devices
    else:
        first = f"{whole['metadata']['name']}-{replicated['name']}-0-0.{whole['metadata']['name']}"
        assert variables["JAX_COORDINATOR_ADDRESS"].rpartition(":")[0] == first
        assert variables["JAX_NUM_PROCESSES"] == str(pods) and "JAX_PROCESS_ID" in variables


@pytest.mark.parametrize("path", sorted(LAUNCH.glob("*.sh")), ids=lambda path: path.name)
def test_scripts_parse_and_are_executable(path):
    assert path.stat().st_mode & 0o111
    subprocess.run(["sh", "-n", str(path)], check=True)
