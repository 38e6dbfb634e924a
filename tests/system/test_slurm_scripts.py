"""What the shipped scripts do around a run: outcomes, signals, torchrun's command line, where they are started.

Run: uv run pytest tests/system/test_slurm_scripts.py              (needs bash, no SLURM and no GPU)

The scripts are run in plain bash, with stand-ins for uv, scontrol, nvidia-smi and singularity
(tests/support/slurm_shell.py). tests/system/test_slurm_cluster.py submits them to a real SLURM.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
from support.slurm_shell import CRASH, DEMO, FAILURE, FINISHED, RECORD, ROOT, SCRIPTS, SLURM_JOB, STOP, Shell, status


# ---- what follows from an outcome ------------------------------------------------------------------------------
def test_finished_run_leaves_with_zero(shell: Shell) -> None:
    outcome = shell.run(DEMO, FAKE_STATUS=FINISHED, **SLURM_JOB)
    assert outcome.exit_code == 0
    assert outcome.requeued == []
    assert "done: finished at step 7" in outcome.text


@pytest.mark.parametrize(
    ("written", "exit_code"),
    [("", "1"), ("", "137"), (status("running"), "1"), (status("failed", "runtime"), "1"), (status("preempted"), "0")],
)
def test_crash_failure_and_preemption_are_requeued_under_slurm(shell: Shell, written: str, exit_code: str) -> None:
    outcome = shell.run(DEMO, FAKE_STATUS=written, FAKE_EXIT=exit_code, **SLURM_JOB)
    assert outcome.requeued == ["4711"]
    assert outcome.calls[-1][:2] == ["scontrol", "requeue"]  # the last thing done: it ends the job
    assert outcome.exit_code == 1
    assert "requeue: " in outcome.text


def test_config_error_is_never_requeued(shell: Shell) -> None:
    written = status("failed", "config", reason="unknown key chunk_sise; did you mean chunk_size?")
    outcome = shell.run(DEMO, FAKE_STATUS=written, FAKE_EXIT="1", **SLURM_JOB)
    assert outcome.exit_code == 2
    assert outcome.requeued == []
    assert "did you mean chunk_size?" in outcome.text


def test_status_of_another_attempt_is_a_crash(shell: Shell) -> None:
    written = status("finished").replace("ATTEMPT", "4711-0-1")
    outcome = shell.run(DEMO, FAKE_STATUS=written, FAKE_EXIT="1", **SLURM_JOB)
    assert outcome.requeued == ["4711"]
    assert "another attempt" in outcome.text


def test_refused_requeue_is_tried_again_and_says_how_to_continue(shell: Shell) -> None:
    outcome = shell.run(DEMO, FAKE_EXIT="1", FAKE_REQUEUE_EXIT="1", **SLURM_JOB)
    assert outcome.exit_code == 1
    assert outcome.requeued == ["4711"] * 3
    assert "submit the same command again" in outcome.text


@pytest.mark.parametrize(
    ("job", "requeued"),
    [
        ("JobState=COMPLETING Reason=None EndTime=2026-11-22T09:49:20 PreemptTime=None", False),  # scancel
        ("JobState=COMPLETING Reason=None EndTime=Unknown", False),  # scontrol requeue, by somebody else
        ("JobState=COMPLETING Reason=TimeLimit PreemptTime=None", True),
        ("JobState=COMPLETING Reason=None PreemptTime=2026-11-22T09:49:20", True),
        ("JobState=RUNNING Reason=None PreemptTime=2026-11-22T09:49:20", True),
    ],
)
@pytest.mark.parametrize("state", ["preempted", "running"])
def test_a_cancelled_job_is_not_revived(shell: Shell, job: str, requeued: bool, state: str) -> None:
    outcome = shell.run(DEMO, FAKE_STATUS=status(state), FAKE_EXIT="1", FAKE_JOB=job, **SLURM_JOB)
    assert outcome.requeued == (["4711"] if requeued else [])
    assert ("submit the same command again" in outcome.text) is not requeued
    assert outcome.exit_code == 1


def test_a_task_of_an_array_is_put_back_alone(shell: Shell) -> None:
    # The number of an array's last task is the whole array's: SLURM shows all tasks for it, and would requeue them all.
    others = "JobId=4712 ArrayJobId=4711 ArrayTaskId=1 JobState=PENDING Reason=BeginTime BatchFlag=1"
    own = "ArrayJobId=4711 ArrayTaskId=3 JobState=RUNNING Reason=None BatchFlag=1"
    variables = SLURM_JOB | {"FAKE_OTHER_TASK": others, "FAKE_JOB": own, "FAKE_EXIT": "1"}
    for count in ("0", "1"):
        outcome = shell.run(DEMO, SLURM_RESTART_COUNT=count, **variables)
        assert (outcome.requeued, outcome.held) == (["4711_3"], [])
    outcome = shell.run(DEMO, SLURM_RESTART_COUNT="2", **variables)
    assert (outcome.requeued, outcome.held) == ([], ["4711_3"])
    assert "'scontrol release 4711_3' continues it" in outcome.text


def test_an_allocation_in_which_somebody_works_is_not_requeued(shell: Shell) -> None:
    for _ in range(3):  # and none of the starts that he makes in it is counted
        outcome = shell.run(DEMO, FAKE_EXIT="1", FAKE_JOB="JobState=RUNNING Reason=None BatchFlag=0", **SLURM_JOB)
        assert outcome.exit_code == 1
        assert outcome.requeued == outcome.held == []
        assert "run the same command again: bash " in outcome.text
        assert "queue" not in outcome.text.replace("requeue: the run crashed", "")
        assert list((shell.folder / "runs" / ".attempts").iterdir()) == []


def test_three_crashes_in_a_row_hold_the_job(shell: Shell) -> None:
    for count in ("0", "1"):
        outcome = shell.run(DEMO, FAKE_EXIT="1", SLURM_RESTART_COUNT=count, **SLURM_JOB)
        assert (outcome.requeued, outcome.held) == (["4711"], [])
    outcome = shell.run(DEMO, FAKE_EXIT="1", SLURM_RESTART_COUNT="2", **SLURM_JOB)
    assert (outcome.requeued, outcome.held) == ([], ["4711"])
    assert outcome.calls[-1][:2] == ["scontrol", "requeuehold"]
    assert outcome.exit_code == 1
    assert "hold: the run crashed with exit code 1" in outcome.text
    assert outcome.text.count("crashed (the run crashed with exit code 1: it wrote no status)") == 3
    assert "'scontrol release 4711' continues it" in outcome.text

    # Another job that is given this number, years later, begins with a clean sheet.
    assert shell.run(DEMO, FAKE_EXIT="1", **SLURM_JOB).requeued == ["4711"]


def test_the_attempts_in_the_run_folder_hold_the_job(shell: Shell) -> None:
    run_dir = shell.folder / "runs" / "pi0_demo"
    run_dir.mkdir(parents=True)
    (run_dir / "status.json").write_text(json.dumps({"attempts": [CRASH, STOP]}))
    written = status("failed", "runtime", reason="CUDA", run_dir=str(run_dir))
    outcome = shell.run(DEMO, FAKE_STATUS=written, FAKE_EXIT="1", **SLURM_JOB)
    assert (outcome.requeued, outcome.held) == ([], ["4711"])
    assert "3 attempts in a row brought no new checkpoint" in outcome.text


def test_without_slurm_nothing_is_held(shell: Shell) -> None:
    run_dir = shell.folder / "runs" / "pi0_demo"
    run_dir.mkdir(parents=True)
    (run_dir / "status.json").write_text(json.dumps({"attempts": [CRASH, STOP, FAILURE | {"attempt": "x"}]}))
    written = status("failed", "runtime", reason="CUDA", run_dir=str(run_dir))
    outcome = shell.run(DEMO, FAKE_STATUS=written, FAKE_EXIT="1")
    assert outcome.held == outcome.requeued == []
    assert "to continue, run the same command again" in outcome.text


# ---- signals ---------------------------------------------------------------------------------------------------
USR1, TERM, INT, HUP = signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP


@pytest.mark.parametrize("variables", [SLURM_JOB, {}], ids=["slurm", "bash"])
@pytest.mark.parametrize("to_all", [False, True], ids=["script", "process-group"])
@pytest.mark.parametrize(
    "signals",
    [[USR1], [USR1, USR1], [TERM], [TERM, USR1, TERM], [HUP], [INT]],
    ids=lambda s: "-".join(n.name for n in s),
)
def test_a_signal_becomes_a_stop_file_and_kills_nothing(
    shell: Shell, signals: list[signal.Signals], to_all: bool, variables: dict[str, str]
) -> None:
    script = shell.start("--name", "a b", **variables)
    script.wait_for(lambda: "started" in script.notes)
    assert script.stop_file() is None
    for number in signals:
        if to_all:
            os.killpg(script.process.pid, number)
        else:
            script.process.send_signal(number)
        script.wait_for(lambda: script.stop_file() is not None)
        time.sleep(0.05)
    assert script.process.poll() is None  # waiting for the run to save
    outcome = script.outcome()
    assert script.notes == ["started", "saved"], outcome.text
    reason = {USR1: "SIGUSR1 (", TERM: "SIGTERM (", HUP: "SIGHUP (", INT: "Ctrl-C"}[signals[0]]
    assert outcome.text.count("the run saves at its next update and ends") == 1
    person = signals == [INT]  # whom the run waits for; no queue takes it back
    assert f"{'stop: stopped' if person else 'requeue: preempted'} at step 7: {reason}" in outcome.text
    assert outcome.requeued == (["4711"] if variables and not person else [])
    assert outcome.exit_code == 1
    if variables and person:
        assert "run the same command again: sbatch, with the same script" in outcome.text
    elif variables:
        assert outcome.calls[-1][:2] == ["scontrol", "requeue"]
    else:
        assert r"run the same command again: bash " in outcome.text and r"--name a\ b" in outcome.text
    left = [path.suffix for path in (shell.folder / "runs" / ".attempts").iterdir()]
    assert left == ([".crashes"] if variables and not person else [])  # the stand-in lists itself in no run folder


def test_ctrl_c_twice_ends_the_run_through_torchrun(shell: Shell) -> None:
    script = shell.start(save_s=1.0)
    script.wait_for(lambda: "started" in script.notes)
    for _ in range(2):
        os.killpg(script.process.pid, INT)
        script.wait_for(lambda: script.stop_file() is not None)
        time.sleep(0.1)
    outcome = script.outcome()
    assert script.notes == ["started", "SIGTERM", "saved"]
    assert "not saved within 30 seconds is killed" in outcome.text
    assert "run the same command again" in outcome.text


@pytest.mark.parametrize("number", [USR1, TERM])
def test_what_slurm_sends_to_job_steps_only_reaches_the_script(shell: Shell, number: signal.Signals) -> None:
    script = shell.start(**SLURM_JOB, SLURMD_NODENAME="node7")
    step = Path(f"{shell.calls}.step")
    script.wait_for(lambda: "started" in script.notes and step.exists() and bool(step.read_text()))
    time.sleep(0.1)
    os.kill(int(step.read_text()), number)
    outcome = script.outcome()
    assert f"preempted at step 7: {number.name}" in outcome.text
    assert script.notes == ["started", "saved"]
    (call,) = [call for call in outcome.calls if call[0] == "srun"]
    assert {"--overlap", "--nodelist=node7", "--gres=none", "--mem=0", "--ntasks=1"} <= set(call)
    end = time.monotonic() + 10
    while Path(f"/proc/{step.read_text().strip()}/cmdline").exists():  # nothing of it stays behind
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_step_that_slurm_refuses_costs_only_itself(shell: Shell) -> None:
    (shell.binaries / "srun").write_text("#!/bin/bash\necho 'srun: error: no such thing' >&2\nexit 1\n")
    outcome = shell.run(DEMO, FAKE_STATUS=FINISHED, **SLURM_JOB)
    assert outcome.exit_code == 0
    assert "no such thing" not in outcome.text


def test_a_step_is_started_under_slurm_only(shell: Shell) -> None:
    assert not [call for call in shell.run(DEMO, FAKE_STATUS=FINISHED).calls if call[0] == "srun"]


@pytest.mark.parametrize("to_all", [False, True], ids=["script", "process-group"])
def test_a_stop_before_the_run_starts_it_not(shell: Shell, to_all: bool) -> None:
    script = shell.start(FAKE_SLOW_UV="1", **SLURM_JOB)
    script.wait_for(lambda: "\x1f-c\x1f" in shell.calls.read_text())  # uv sets the environment up
    time.sleep(0.1)
    (os.killpg if to_all else os.kill)(script.process.pid, USR1)
    outcome = script.outcome()
    assert script.notes == []
    assert outcome.requeued == ["4711"]
    assert (
        "requeue: the run crashed with exit code 143: it wrote no status; it was asked to stop: SIGUSR1" in outcome.text
    )
    assert (shell.folder / "runs" / ".attempts" / "4711.crashes").exists()  # a limit too short to start must not loop


def test_each_start_has_a_stop_file_of_its_own(shell: Shell) -> None:
    folder = shell.folder / "runs" / ".attempts"
    folder.mkdir(parents=True)
    (folder / "4711-0-1.stop").write_text("old")
    outcome = shell.run(DEMO, FAKE_STATUS=FINISHED, **SLURM_JOB)
    assert outcome.environment["VLA_STOP_FILE"] == f"{folder}/{outcome.environment['VLA_ATTEMPT']}.stop"
    assert list(folder.iterdir()) == []


def test_without_slurm_nothing_is_restarted_and_the_next_step_is_said(shell: Shell) -> None:
    outcome = shell.run("slurms/train_scripts/pi0_demo.sh", "--name", "a b", FAKE_EXIT="1")
    assert outcome.exit_code == 1
    assert outcome.requeued == []
    assert len([call for call in outcome.calls if "torchrun" in call]) == 1
    assert r"run the same command again: bash slurms/train_scripts/pi0_demo.sh --name a\ b" in outcome.text


def test_broken_environment_is_not_requeued(shell: Shell) -> None:
    outcome = shell.run(DEMO, FAKE_UV_FAILS="1", **SLURM_JOB)
    assert outcome.exit_code == 1
    assert outcome.requeued == []
    assert not [call for call in outcome.calls if "torchrun" in call]
    assert "not requeued" in outcome.text


def test_missing_uv_is_not_requeued(shell: Shell) -> None:
    (shell.binaries / "uv").unlink()
    path = f"{shell.binaries}:/usr/bin:/bin"
    if shutil.which("uv", path=path):
        pytest.skip("uv is installed among the system's own programs")
    outcome = shell.run(DEMO, PATH=path, **SLURM_JOB)
    assert outcome.exit_code == 1
    assert outcome.requeued == []
    assert "pip install uv" in outcome.text


def test_each_attempt_has_its_own_name_and_leaves_no_file(shell: Shell) -> None:
    folder = shell.folder / "runs" / ".attempts"
    folder.mkdir(parents=True)
    (folder / "4711-0-1.json").write_text("{}")  # SLURM killed the first attempt with its script
    (folder / "12-0-1.json").write_text("{}")  # another job, perhaps alive
    outcome = shell.run(DEMO, FAKE_STATUS=FINISHED, SLURM_RESTART_COUNT="3", **SLURM_JOB)
    assert re.fullmatch(r"4711-3-\d{10}", outcome.environment["VLA_ATTEMPT"])
    assert outcome.environment["VLA_STATUS_FILE"] == f"{folder}/{outcome.environment['VLA_ATTEMPT']}.json"
    assert [path.name for path in folder.iterdir()] == ["12-0-1.json"]
    assert "restart count 3" in outcome.text


# ---- what torchrun is given ------------------------------------------------------------------------------------
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_command_line(shell: Shell, script: Path) -> None:
    outcome = shell.run(script, "--model_cfg.chunk_size", "8", "--name", "a b", FAKE_STATUS=FINISHED)
    assert outcome.exit_code == 0, outcome.text
    arguments = outcome.torchrun
    assert {"--standalone", "--nnodes=1", "--nproc_per_node=1", "--max-restarts=0"} <= set(arguments)
    assert arguments[arguments.index("src/agent/run.py") :] == [
        "src/agent/run.py",
        "--config_path",
        f"config/train/{script.stem}.yaml",
        "--model_cfg.chunk_size",
        "8",
        "--name",
        "a b",
    ]


@pytest.mark.parametrize(
    ("variables", "processes", "threads"),
    [
        ({}, 1, 16),
        ({"FAKE_GPUS": "1"}, 1, 16),
        ({"FAKE_GPUS": "4"}, 4, 4),
        ({"FAKE_GPUS": "4", "CUDA_VISIBLE_DEVICES": "2"}, 1, 16),
        ({"FAKE_GPUS": "4", "CUDA_VISIBLE_DEVICES": ""}, 1, 16),
        ({"FAKE_GPUS": "4", "CUDA_VISIBLE_DEVICES": "-1"}, 1, 16),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, 4, 4),
        ({"CUDA_VISIBLE_DEVICES": "0, 1"}, 2, 8),
        ({"CUDA_VISIBLE_DEVICES": "0,1,-1,3"}, 2, 8),
        ({"CUDA_VISIBLE_DEVICES": "GPU-8f1c,MIG-77aa"}, 2, 8),
        ({"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(32)))}, 32, 1),
        ({**SLURM_JOB, "SLURM_GPUS_ON_NODE": "4", "FAKE_GPUS": "8"}, 4, 4),
        ({**SLURM_JOB, "SLURM_GPUS_ON_NODE": "4", "CUDA_VISIBLE_DEVICES": "0,1"}, 2, 8),
        ({**SLURM_JOB, "FAKE_GPUS": "8"}, 1, 16),  # a job without GPUs on a node full of other people's
        ({**SLURM_JOB, "FAKE_GPUS": "4", "FAKE_TRES": "TresPerNode=gres:gpu:4"}, 4, 4),
        ({**SLURM_JOB, "SLURM_CPUS_ON_NODE": "6", "CUDA_VISIBLE_DEVICES": "0,1"}, 2, 3),
        ({**SLURM_JOB, "SLURM_CPUS_ON_NODE": "64", "CUDA_VISIBLE_DEVICES": "0,1"}, 2, 8),
        ({"OMP_NUM_THREADS": "1"}, 1, 16),  # nproc would answer 1
    ],
)
def test_processes_and_threads(shell: Shell, variables: dict[str, str], processes: int, threads: int) -> None:
    outcome = shell.run(DEMO, FAKE_STATUS=FINISHED, **variables)
    assert outcome.exit_code == 0, outcome.text
    assert f"--nproc_per_node={processes}" in outcome.torchrun
    assert outcome.environment["OMP_NUM_THREADS"] == str(threads)


def test_without_a_gpu_none_is_visible(shell: Shell) -> None:
    outcome = shell.run(DEMO, FAKE_STATUS=FINISHED, FAKE_GPUS="8", **SLURM_JOB)
    assert outcome.environment["CUDA_VISIBLE_DEVICES"] == ""
    assert "one process on the CPU" in outcome.text


def test_job_that_asked_for_gpus_and_sees_none_stops(shell: Shell) -> None:
    outcome = shell.run(DEMO, FAKE_STATUS=FINISHED, FAKE_TRES="TresPerNode=gres:gpu:4", **SLURM_JOB)
    assert outcome.exit_code == 1
    assert outcome.requeued == []
    assert "asked for GPUs" in outcome.text


@pytest.mark.parametrize(("variables", "address"), [({}, "localhost"), (SLURM_JOB, "node7")])
def test_master_address_and_port(shell: Shell, variables: dict[str, str], address: str) -> None:
    outcome = shell.run(DEMO, FAKE_STATUS=FINISHED, **variables)
    port = int(outcome.environment["MASTER_PORT"])
    assert 1024 <= port < 65536
    assert outcome.environment["MASTER_ADDR"] == address
    assert f"--rdzv_endpoint={address}:{port}" in outcome.torchrun
    assert f"MASTER_ADDR={address}, MASTER_PORT={port}" in outcome.text


def test_real_torchrun_takes_the_command_line_and_hands_the_attempt_on(shell: Shell) -> None:
    checkout = shell.folder / "checkout"
    shutil.copytree(ROOT / "slurms", checkout / "slurms")
    shutil.copy(ROOT / "set_path.sh", checkout)
    run = checkout / "src" / "agent" / "run.py"
    run.parent.mkdir(parents=True)
    run.write_text(
        "import json, os, sys\n"
        "assert os.environ['WORLD_SIZE'] == '2' and sys.argv[1:] == ['--config_path', 'config/train/pi0_demo.yaml']\n"
        "status = {'attempt': os.environ['VLA_ATTEMPT'], 'state': 'failed', 'error_kind': 'config', 'reason': 'why'}\n"
        "if os.environ['RANK'] == '0':\n"
        "    open(os.environ['VLA_STATUS_FILE'], 'w').write(json.dumps(status))\n"
        "sys.exit(2)\n"
    )
    uv = 'shift; [[ "$1" != --* ]] || shift; [[ "$1" != torchrun ]] || set -- python -m torch.distributed.run "${@:2}"'
    (shell.binaries / "uv").write_text(f'{RECORD}{uv}\nshift; exec "$REAL_PYTHON" "$@"\n')
    outcome = shell.run(checkout / "slurms" / "train_scripts" / "pi0_demo.sh", CUDA_VISIBLE_DEVICES="0,1")
    assert "fail: the configuration has to be corrected first: why" in outcome.text
    assert "torchrun left with exit code 1" in outcome.text  # and not 2, which is why the status file decides
    assert outcome.exit_code == 2


def test_restart_count_of_a_first_start(shell: Shell) -> None:
    assert "restart count 0" in shell.run(DEMO, FAKE_STATUS=FINISHED).text


# ---- where it is started ---------------------------------------------------------------------------------------
def test_plain_bash_from_anywhere(shell: Shell) -> None:
    for cwd, script in ((ROOT, "slurms/train_scripts/pi0_demo.sh"), (shell.folder, DEMO), (DEMO.parent, DEMO.name)):
        outcome = shell.run_in(cwd, script, FAKE_STATUS=FINISHED)
        assert outcome.exit_code == 0, outcome.text
        assert outcome.environment["PWD"] == str(ROOT)


def test_started_with_another_shell_or_through_cdpath(shell: Shell) -> None:
    shutil.copy(shutil.which("dash") or "/bin/sh", shell.binaries / "bash-less")
    launch = f'cd {ROOT}/slurms && exec bash-less train_scripts/pi0_demo.sh --name "a b"\n'
    (shell.folder / "launch.sh").write_text(launch)
    outcome = shell.run(shell.folder / "launch.sh", FAKE_STATUS=FINISHED, CDPATH=f".:{ROOT}")
    assert outcome.exit_code == 0, outcome.text
    assert outcome.environment["PWD"] == str(ROOT)
    assert outcome.torchrun[-2:] == ["--name", "a b"]


def test_a_log_folder_that_cannot_be_made_is_named(shell: Shell) -> None:
    outcome = shell.run(DEMO, VLA_LOG_DIR="/proc/runs")
    assert outcome.exit_code == 2
    assert "VLA_LOG_DIR=/proc/runs" in outcome.text and "set_path.sh" in outcome.text


def test_copy_in_the_spool_finds_the_repository(shell: Shell) -> None:
    spool = shell.folder / "spool" / "job4711"
    spool.mkdir(parents=True)
    copy = spool / "slurm_script"
    shutil.copy(DEMO, copy)
    outcome = shell.run_in(shell.folder, copy, FAKE_STATUS=FINISHED, **SLURM_JOB)
    assert outcome.exit_code == 0, outcome.text
    assert outcome.environment["PWD"] == str(ROOT)

    elsewhere = shell.run_in(shell.folder, copy, **{**SLURM_JOB, "SLURM_SUBMIT_DIR": str(shell.folder)})
    assert elsewhere.exit_code == 2
    assert "cd REPOSITORY && sbatch slurms/train_scripts/pi0_demo.sh" in elsewhere.text

    chdir = shell.run(copy, FAKE_STATUS=FINISHED, **{**SLURM_JOB, "SLURM_SUBMIT_DIR": str(shell.folder)})
    assert chdir.exit_code == 0, chdir.text  # sbatch --chdir=REPOSITORY


# ---- Singularity -----------------------------------------------------------------------------------------------
def test_singularity_only_with_an_image(shell: Shell) -> None:
    outcome = shell.run(DEMO, FAKE_STATUS=FINISHED, OVERLAY_EXT3="/scratch/overlay.ext3")
    assert outcome.exit_code == 0
    assert not [call for call in outcome.calls if call[0] == "singularity"]


@pytest.mark.parametrize("overlay", ["", "/scratch/my overlay.ext3"])
def test_singularity_holds_every_command_of_the_run(shell: Shell, overlay: str) -> None:
    outcome = shell.run(
        DEMO, "--name", "a b", FAKE_STATUS=FINISHED, SINGULARITY_IMAGE="/images/cuda 12.sif", OVERLAY_EXT3=overlay
    )
    assert outcome.exit_code == 0, outcome.text
    calls = [call for call in outcome.calls if call[0] == "singularity"]
    expected = ["exec", "--nv", *(["--overlay", f"{overlay}:ro"] if overlay else []), "/images/cuda 12.sif"]
    assert len(calls) == len([call for call in outcome.calls if call[0] == "uv"]) == 3
    for call in calls:
        assert call[1 : 1 + len(expected)] == expected
    assert outcome.torchrun[-2:] == ["--name", "a b"]
