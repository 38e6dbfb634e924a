"""The shipped sbatch scripts in a real SLURM of one node, started by the tests.

Run: uv run pytest tests/system/test_slurm_cluster.py -m slow      (five minutes on two idle cores)

Needs Debian's packages, `apt-get install slurm-wlm munge`, and root, since slurmd starts jobs for others; skipped
where one is missing. The node is a fiction as far as its size goes: it says that it has the cores, the memory and
the four GPUs that the scripts ask for. In the first tests the run itself is a stand-in, for what counts there is what
SLURM does. The others train the shipped demo for a few updates with this environment, and everything happens to it that
a cluster does to a job: afterwards every update must be in the metrics once, and the story in status.json.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.records import offline_records

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "sinfo")
SBIN = "/usr/sbin:/sbin"


def why_not() -> str:
    """Why there can be no cluster here; empty if there can be one."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=f"{os.environ.get('PATH', '')}:{SBIN}") is None]
    if missing:
        return f"SLURM is not installed: no {', '.join(missing)} (apt-get install slurm-wlm munge)"
    return "" if os.geteuid() == 0 else "a SLURM node can be started by root only"


# CI sets REQUIRE_SLURM, so that a missing Slurm is a failure there and not a silent skip.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(why_not()) and "REQUIRE_SLURM" not in os.environ, reason=why_not()),
]

CONFIGURATION = """
ClusterName=trial
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
AuthType=auth/munge
# A requeued job starts again once its old credential has expired, on a real cluster after two minutes.
AuthInfo=socket={folder}/munge.sock,cred_expire=5
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=bf_interval=1,sched_interval=2
KillWait=30
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
# The node may claim more than the machine has.
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs=64 RealMemory=500000 Gres=gpu:4 Features=a100,h100 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=20
PartitionName=urgent Nodes={host} MaxTime=INFINITE State=UP PriorityTier=10
"""

# Stands for uv: real Python for the port and the decision, and for torchrun a run that leaves with the outcomes
# listed in $OUTCOMES, one for each attempt: a state, or "crash".
UV = r"""#!/bin/bash
shift # run
while [[ "$1" == --* ]]; do shift; done
if [[ "$1" == python ]]; then shift; exec "$REAL_PYTHON" "$@"; fi
if [[ -n "${TRAIN:-}" ]]; then # as uv does: a parent that hands signals on, and waits
    program=$1
    shift
    "$(dirname "$REAL_PYTHON")/$program" "$@" &
    trap 'kill -TERM $!' TERM
    while kill -0 $! 2>/dev/null; do wait $!; done
    wait $!
    exit
fi
echo "stand-in: $*"
echo "stand-in, on stderr" >&2
read -r -a outcomes <<<"$OUTCOMES"
state=${outcomes[${SLURM_RESTART_COUNT:-0}]}
[[ "$state" != crash ]] || exit 1
kind=null
[[ "$state" != config ]] || { state=failed; kind='"config"'; }
printf '{"attempt": "%s", "state": "%s", "error_kind": %s, "reason": "because", "step": 3}' \
    "$VLA_ATTEMPT" "$state" "$kind" >"$VLA_STATUS_FILE"
[[ "$state" == finished ]]
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(what: str, condition: Callable[[], bool], seconds: float) -> None:
    """Returns when ``condition`` holds; fails, saying for what it waited, when it does not within ``seconds``."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.2)


def make_gpu(path: Path, index: int) -> None:
    """A file that SLURM hands out as a GPU. It sets CUDA_VISIBLE_DEVICES for a device file, else only the count."""
    try:
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(195, index))
    except PermissionError:  # an unprivileged container
        path.touch()


@dataclass
class Cluster:
    """One running controller and node, and a checkout to submit from."""

    folder: Path
    checkout: Path
    environment: dict[str, str]

    def command(self, *arguments: str, **variables: str) -> str:
        process = subprocess.run(
            arguments,
            cwd=self.checkout,
            env=self.environment | variables,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=30,
            check=False,
        )
        assert process.returncode == 0, f"{arguments}: {process.stdout}"
        return process.stdout

    def submit(self, script: str, *arguments: str, options: tuple[str, ...] = (), **variables: str) -> str:
        """``sbatch``, as a user does it from the repository's root; the job's number."""
        path = f"slurms/train_scripts/{script}.sh"
        return self.command("sbatch", "--parsable", *options, path, *arguments, **variables).strip()

    def job(self, number: str) -> dict[str, str]:
        """What SLURM knows of the job."""
        text = self.command("scontrol", "show", "job", "--oneliner", number)
        return dict(pair.split("=", 1) for pair in text.split() if "=" in pair)

    def wait(self, number: str, seconds: float = 90) -> dict[str, str]:
        """Waits for the job's end, through requeues."""
        ends = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY"}
        wait_for(f"the end of job {number}", lambda: self.job(number)["JobState"] in ends, seconds)
        return self.job(number)

    def log(self, name: str, stream: str = "out") -> str:
        return (self.checkout / "log" / "slurm" / "train" / f"{name}.{stream}").read_text()


def make_checkout(folder: Path) -> None:
    """The files that a job's shell needs, where a test may write."""
    shutil.copytree(ROOT / "slurms", folder / "slurms")
    shutil.copy(ROOT / "set_path.sh", folder)
    for name in ("src", "config", "demo"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "log" / "slurm" / "train").mkdir(parents=True)


def kill_jobs(configuration: Path) -> None:
    """What a failed test left running in its jobs; training processes have sessions of their own."""
    for process in psutil.process_iter():
        try:
            variables = process.environ()
            if variables.get("SLURM_CONF") == str(configuration) and "SLURM_JOB_ID" in variables:
                process.kill()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("slurm")
    checkout = folder / "checkout"
    make_checkout(checkout)
    binaries = folder / "bin"
    for name in ("state", "spool", "bin", "home"):
        (folder / name).mkdir()
    (binaries / "uv").write_text(UV)
    (binaries / "uv").chmod(0o755)
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o400)

    host = socket.gethostname().split(".")[0]
    configuration = folder / "slurm.conf"
    configuration.write_text(
        CONFIGURATION.format(host=host, folder=folder, controller_port=free_port(), node_port=free_port())
    )
    for index in range(4):
        make_gpu(folder / f"gpu{index}", index)
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-3]\n")
    (folder / "cgroup.conf").touch()

    # Nothing of the session that runs the tests reaches the jobs but what is named here.
    environment = {
        "PATH": f"{binaries}:/usr/local/bin:/usr/bin:/bin:{SBIN}",
        "HOME": str(folder / "home"),
        "SLURM_CONF": str(configuration),
        "REAL_PYTHON": sys.executable,
    }
    running = Cluster(folder, checkout, environment)
    munge_files = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
    daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(*command: str) -> None:
        with (folder / f"{command[0]}.log").open("wb") as log:
            daemons[command[0]] = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def idle() -> bool:
        for name, daemon in daemons.items():
            assert daemon.poll() is None, (folder / f"{name}.log").read_text()
        process = subprocess.run(["sinfo", "-h", "-o", "%T"], env=environment, capture_output=True, text=True)
        return process.stdout.strip() == "idle"

    try:
        # --force: the folder is not open to all, and only we use the socket.
        start("munged", "--foreground", "--force", f"--socket={folder}/munge.sock", *munge_files)
        wait_for("munged", (folder / "munge.sock").exists, 10)
        start("slurmctld", "-D", "-i", "-f", str(configuration))
        start("slurmd", "-D", "-f", str(configuration), "-N", host)
        wait_for("the node", idle, 30)
        yield running
    finally:
        kill_jobs(configuration)
        for daemon in reversed(daemons.values()):
            daemon.terminate()
        for daemon in reversed(daemons.values()):
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def test_crash_and_preempted_run_are_requeued_and_logs_appended(cluster: Cluster) -> None:
    number = cluster.submit("pi0_demo", "--name", "a b", OUTCOMES="crash preempted finished")
    job = cluster.wait(number)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("COMPLETED", "0:0", "2")
    out = cluster.log("pi0_demo")
    assert re.findall(r"restart count (\d)", out) == ["0", "1", "2"]
    assert out.count("src/agent/run.py --config_path config/train/pi0_demo.yaml --name a b\n") == 3
    assert out.count("--nproc_per_node=1 ") == 3
    assert "requeue: the run crashed with exit code 1: it wrote no status" in out
    assert "requeue: preempted at step 3: because" in out
    assert "done: finished at step 3" in out
    assert cluster.log("pi0_demo", "err").count("stand-in, on stderr") == 3


def test_config_error_ends_the_job_at_once(cluster: Cluster) -> None:
    number = cluster.submit("pi0_demo", options=("--job-name=mistake",), OUTCOMES="config")
    job = cluster.wait(number)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "2:0", "0")
    assert "fail: the configuration has to be corrected first: because" in cluster.log("mistake")


def test_each_task_of_an_array_is_requeued_by_itself(cluster: Cluster) -> None:
    # One at a time, so that the last one, whose number is the array's, ends while the others wait to start again.
    options = ("--job-name=array", "--array=1-3%1", "--output=log/slurm/train/%x_%a.out", "--error=/dev/null")
    number = cluster.submit("pi0_demo", options=options, OUTCOMES="preempted finished crash")
    for task in (1, 2, 3):
        job = cluster.wait(f"{number}_{task}")
        assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("COMPLETED", "0:0", "1")
        assert f"job {number}_{task} goes back into the queue" in cluster.log(f"array_{task}")


def test_an_allocation_is_left_as_it_is(cluster: Cluster) -> None:
    script = "bash slurms/train_scripts/pi0_demo.sh"
    command = ("salloc", "--quiet", "--ntasks=1", "bash", "-c", f"{script} || {script} || {script} || echo still here")
    text = cluster.command(*command, OUTCOMES="preempted")
    assert text.count("run the same command again") == 3
    assert text.endswith("still here\n")
    assert not [line for line in ("goes back", "goes on hold", "Only batch jobs") if line in text]
    wait_for("the end of its steps", lambda: cluster.command("squeue", "--noheader") == "", 30)


@pytest.mark.parametrize("script", sorted(path.stem for path in (ROOT / "slurms" / "train_scripts").glob("*.sh")))
def test_header_is_accepted_and_its_gpus_are_used(cluster: Cluster, script: str) -> None:
    number = cluster.submit(script, options=(f"--job-name=header_{script}",), OUTCOMES="finished")
    assert cluster.wait(number)["JobState"] == "COMPLETED"
    out = cluster.log(f"header_{script}")
    gpus = 4 if "#SBATCH --gres=gpu:4\n" in (ROOT / "slurms" / "train_scripts" / f"{script}.sh").read_text() else 0
    assert re.search(rf"GPUs {gpus} \(CUDA_VISIBLE_DEVICES=({','.join(map(str, range(gpus)))}|unset)\)", out)
    assert f"--nproc_per_node={max(1, gpus)} " in out


def test_demo_takes_a_gpu_that_is_asked_for_on_the_command_line(cluster: Cluster) -> None:
    options = ("--job-name=one_gpu", "--gres=gpu:1")
    number = cluster.submit("pi0_demo", options=options, OUTCOMES="finished")
    assert cluster.wait(number)["JobState"] == "COMPLETED"
    assert "GPUs 1 (" in cluster.log("one_gpu")


# ---- the demo, trained for real ---------------------------------------------------------------------------------

UPDATES = 40
SMALL = f"--n_updates {UPDATES} --save_model_freq 10 --log_freq 1 --eval_freq 0 --global_batch_size 4"
SMALL += (
    " --per_device_batch_size 4 --use_wandb false --model_cfg.image_resolution [64,64] --flow_samples_per_observation 1"
)
SMALL += "".join(f" --model_cfg.{part}_variant.depth 1" for part in ("paligemma", "action_expert", "vision"))
WANDB = ("--use_wandb", "true", "--wandb.mode", "offline")
SECONDS = 400  # for one run with its restarts, on a machine that does other things, too


@dataclass
class Training:
    """The demo in the queue, and the run folder that it fills."""

    cluster: Cluster
    name: str
    number: str

    @property
    def run_dir(self) -> Path:
        return self.cluster.checkout / "runs" / self.name

    @property
    def steps(self) -> list[int]:
        """The updates in ``metrics.jsonl``."""
        path = self.run_dir / "metrics.jsonl"
        whole = [line for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []
        return [json.loads(line)["step"] for line in whole]

    @property
    def status(self) -> dict[str, Any]:
        return json.loads((self.run_dir / "status.json").read_text())

    @property
    def story(self) -> list[str]:
        """How each attempt ended."""
        return [attempt["state"] for attempt in self.status["attempts"]]

    @property
    def log(self) -> str:
        return self.cluster.log(self.name)

    def job(self) -> dict[str, str]:
        return self.cluster.job(self.number)

    def wait_for_step(self, step: int) -> None:
        def reached() -> bool:
            assert self.job()["JobState"] in ("PENDING", "RUNNING"), self.log
            return bool(self.steps) and self.steps[-1] >= step

        wait_for(f"update {step} of {self.name}", reached, SECONDS)

    def workers(self) -> list[psutil.Process]:
        """The training processes themselves, below uv and torchrun."""
        found = []
        for process in psutil.process_iter(["cmdline"]):
            command = process.info["cmdline"] or []
            if len(command) > 2 and command[-1] == self.name and "src/agent/run.py" in command[1:4]:
                found.append(process)
        return found

    def ends_well(self, restarts: int, story: list[str]) -> None:
        """The job is complete after so many restarts, and no update is missing or there twice."""
        job = self.cluster.wait(self.number, SECONDS)
        assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("COMPLETED", "0:0", str(restarts)), self.log
        assert self.steps == list(range(1, UPDATES + 1))
        assert self.status["state"] == "finished"
        assert f"done: finished at step {UPDATES}" in self.log
        assert self.story == story
        attempts = self.status["attempts"]
        assert [attempt["job"] for attempt in attempts] == [self.number] * len(story)
        assert [attempt["restart_count"] or 0 for attempt in attempts] == list(range(len(story)))
        ended = [attempt for attempt in attempts if attempt["state"] != "running"]
        assert all(attempt["checkpoint_step"] > attempt["checkpoint_step_at_start"] for attempt in ended)
        assert self.workers() == []


def train(cluster: Cluster, name: str, *arguments: str, options: tuple[str, ...] = ()) -> Training:
    """Submits the shipped script, with the real config made small."""
    arguments = (*SMALL.split(), *arguments, "--name", name)
    number = cluster.submit("pi0_demo", *arguments, options=(f"--job-name={name}", *options), TRAIN="1")
    return Training(cluster, name, number)


@pytest.mark.timeout(600)
def test_stops_of_every_kind_and_a_killed_worker(cluster: Cluster) -> None:
    # Two jobs at a time, since most of a start is waiting.
    asked = train(cluster, "asked")
    killed = train(cluster, "killed")
    asked.wait_for_step(12)
    cluster.command("scancel", "--signal=USR1", asked.number)  # reaches job steps only
    killed.wait_for_step(12)
    (worker,) = killed.workers()
    worker.send_signal(signal.SIGKILL)
    asked.ends_well(1, ["preempted", "finished"])
    assert asked.status["attempts"][0]["checkpoint_step"] == asked.status["attempts"][1]["first_step"] >= 12
    assert "requeue: preempted at step" in asked.log and "SIGUSR1" in asked.status["attempts"][0]["reason"]
    killed.ends_well(1, ["running", "finished"])
    assert killed.status["attempts"][1]["first_step"] == 10
    assert "requeue: the run crashed with exit code 1" in killed.log


@pytest.mark.timeout(600)
def test_time_limit_and_requeue_from_outside(cluster: Cluster) -> None:
    limited = train(cluster, "limited", "--n_updates", "100000")
    taken = train(cluster, "taken", *WANDB)
    limited.wait_for_step(12)
    # The limit moves to one or two minutes from now. The header asks for one, SLURM looks every half minute.
    hours, minutes, _ = limited.job()["RunTime"].split(":")
    limit = f"TimeLimit={int(hours) * 60 + int(minutes) + 2}"
    cluster.command("scontrol", "update", f"JobId={limited.number}", limit)
    taken.wait_for_step(12)
    cluster.command("scontrol", "requeue", taken.number)  # SIGTERM, and SIGKILL after KillWait
    taken.ends_well(1, ["preempted", "finished"])
    assert "is left to SLURM" in cluster.log("taken", "err")
    (newest,) = taken.run_dir.glob("wandb/offline-run-*")  # wandb's processes got the SIGTERM, too
    assert [entry["_step"] for entry in offline_records(newest)[1]] == list(range(1, UPDATES + 1))

    wait_for("the warning", lambda: int(limited.job()["Restarts"]) > 0, SECONDS)
    assert "SIGUSR1 (the time limit is near" in limited.log
    assert "requeue: preempted at step" in limited.log
    assert limited.story[0] == "preempted"
    saved = limited.status["attempts"][0]["checkpoint_step"]
    assert saved >= 12
    assert limited.steps[:saved] == list(range(1, saved + 1))
    cluster.command("scancel", limited.number)


@pytest.mark.timeout(600)
def test_preemption_by_a_partition_of_higher_priority(cluster: Cluster) -> None:
    preempted = train(cluster, "preempted", options=("--cpus-per-task=64",))
    preempted.wait_for_step(12)
    urgent = ("sbatch", "--parsable", "--partition=urgent", "--exclusive", "--output=/dev/null", "--wrap=sleep 2")
    number = cluster.command(*urgent).strip()
    assert cluster.wait(number)["JobState"] == "COMPLETED"
    preempted.ends_well(1, ["preempted", "finished"])
    assert "SIGTERM" in preempted.status["attempts"][0]["reason"]  # at the start of the grace time


@pytest.mark.timeout(600)
def test_a_cancelled_job_and_a_config_error_stay_where_they_are(cluster: Cluster) -> None:
    mistaken = train(cluster, "mistaken", "--save_model_freqq", "3")
    cancelled = train(cluster, "cancelled", *WANDB)
    job = cluster.wait(mistaken.number, SECONDS)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "2:0", "0")
    assert "fail: the configuration has to be corrected first" in mistaken.log
    assert "save_model_freq" in mistaken.log

    cancelled.wait_for_step(12)
    cluster.command("scancel", cancelled.number)
    job = cluster.wait(cancelled.number, SECONDS)
    wait_for("its end", lambda: cancelled.workers() == [] and cancelled.job()["JobState"] == "CANCELLED", 90)
    time.sleep(8)  # longer than it takes to start a requeued job
    assert (cancelled.job()["JobState"], cancelled.job()["Restarts"]) == ("CANCELLED", "0")
    assert cancelled.story == ["preempted"]
    assert cancelled.status["attempts"][0]["checkpoint_step"] == cancelled.steps[-1] == len(cancelled.steps)
    assert "submit the same command again" in cancelled.cluster.log("cancelled", "err")
    assert list(cancelled.run_dir.glob("wandb/offline-run-*")), "wandb was not among what was sent SIGTERM"


@pytest.mark.timeout(600)
def test_a_job_that_gets_nowhere_is_held_and_released(cluster: Cluster) -> None:
    # Every start dies before its first checkpoint.
    stuck = train(cluster, "stuck", "--save_model_freq", "1000")
    ends = 0

    def ended() -> bool:
        return (stuck.cluster.checkout / "log/slurm/train/stuck.out").exists() and stuck.log.count(
            "torchrun left"
        ) == ends

    for ends in range(3):
        wait_for("a start", lambda: ended() and bool(stuck.workers()), SECONDS)
        time.sleep(ends)  # once before the config is read, then somewhere in the start
        for worker in stuck.workers():
            worker.send_signal(signal.SIGKILL)
    ends = 3
    wait_for("the end of the third", ended, 60)
    # The reason is set while the node still completes the attempt.
    wait_for("the hold", lambda: stuck.job()["Reason"] == "job_requeued_in_held_state", 60)
    wait_for("the job's place in the queue", lambda: stuck.job()["JobState"] == "PENDING", 120)
    assert "hold: the run crashed" in stuck.log
    assert "3 attempts in a row brought no new checkpoint" in stuck.log
    assert f"scontrol release {stuck.number}" in stuck.cluster.log("stuck", "err")
    cluster.command("scontrol", "release", stuck.number)
    stuck_again = cluster.wait(stuck.number, SECONDS)
    assert stuck_again["JobState"] == "COMPLETED", stuck.log
    assert stuck.steps == list(range(1, UPDATES + 1))
