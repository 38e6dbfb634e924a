"""The shell around a run: set_path.sh, slurms/common.sh, slurms/train_scripts/ and the requeue decision.

Run: uv run pytest tests/test_slurm_scripts.py              (seconds; needs bash, no SLURM and no GPU)
     uv run pytest tests/test_slurm_scripts.py -m slow      (shellcheck, where it is installed)

The shipped scripts themselves are run, in plain bash, with stand-ins for uv, scontrol, nvidia-smi and singularity
on PATH that write down their arguments. tests/test_slurm_cluster.py submits them to a real SLURM.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from agent.requeue import decide, read_status

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted((ROOT / "slurms" / "train_scripts").glob("*.sh"))
STEMS = {
    "pi0_finetune_bridge",
    "pi0_finetune_bridge_paraphrase",
    "pi0_train_bridge",
    "pi0_train_bridge_freeze_vlm",
    "pi0_train_fractal",
    "pi0_demo",
}
SHELL_FILES = [ROOT / "set_path.sh", ROOT / "slurms" / "common.sh", *SCRIPTS]

# Every stand-in appends its name and arguments to $CALLS, one unit separator after each, one record separator at
# the end; arguments may hold newlines.
RECORD = r"""#!/bin/bash
printf '%s\x1f' "$(basename "$0")" "$@" >>"$CALLS"; printf '\x1e' >>"$CALLS"
"""
STAND_INS = {
    "uv": RECORD
    + r"""
[[ -z "${FAKE_UV_FAILS:-}" ]] || { echo "error: no environment" >&2; exit 2; }
shift # run
while [[ "$1" == --* ]]; do shift; done
if [[ "$1" == python ]]; then shift; exec "$REAL_PYTHON" "$@"; fi
env -0 >"$CALLS.env"
if [[ -n "${FAKE_STATUS:-}" ]]; then printf '%s' "${FAKE_STATUS//ATTEMPT/$VLA_ATTEMPT}" >"$VLA_STATUS_FILE"; fi
exit "${FAKE_EXIT:-0}"
""",
    "scontrol": RECORD
    + r"""
case "$1 $2" in
    "show hostnames") printf 'node7\nnode8\n' ;;
    "show job") echo "JobId=$4 JobName=gpu TRES=cpu=4 ${FAKE_TRES:-}" ;;
    requeue*) exit "${FAKE_REQUEUE_EXIT:-0}" ;;
esac
""",
    "nvidia-smi": RECORD
    + r"""
[[ -n "${FAKE_GPUS:-}" ]] || { echo "NVIDIA-SMI has failed" >&2; exit 9; }
for ((i = 0; i < FAKE_GPUS; i++)); do echo "GPU $i: NVIDIA H100 (UUID: GPU-$i)"; done
""",
    "singularity": RECORD
    + r"""
while [[ "$1" != /bin/bash ]]; do shift; done
exec "$@"
""",
    "nproc": "#!/bin/bash\necho ${OMP_NUM_THREADS:-16}\n",
}


def status(state: str, error_kind: str | None = None, **other: Any) -> str:
    """A status file as run.py writes it; the stand-in puts the attempt in."""
    return json.dumps({"attempt": "ATTEMPT", "state": state, "error_kind": error_kind, "step": 7, **other})


FINISHED = status("finished")


@dataclass
class Outcome:
    """What a script did."""

    exit_code: int
    text: str
    calls: list[list[str]]
    environment: dict[str, str]

    @property
    def torchrun(self) -> list[str]:
        """The arguments after ``torchrun``, of the one time it was called."""
        (found,) = [call[call.index("torchrun") + 1 :] for call in self.calls if call[:3] == ["uv", "run", "torchrun"]]
        return found

    @property
    def requeued(self) -> list[str]:
        return [call[2] for call in self.calls if call[:2] == ["scontrol", "requeue"]]


class Shell:
    """Runs scripts of the repository in an environment of which the test knows everything."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls = folder / "calls"
        self.binaries = folder / "bin"
        self.binaries.mkdir()
        for name, text in STAND_INS.items():
            (self.binaries / name).write_text(text)
            (self.binaries / name).chmod(0o755)

    def run(self, script: Path | str, *arguments: str, **variables: str) -> Outcome:
        return self.run_in(ROOT, script, *arguments, **variables)

    def run_in(self, cwd: Path, script: Path | str, *arguments: str, **variables: str) -> Outcome:
        self.calls.write_text("")
        environment = {
            "PATH": f"{self.binaries}:/usr/local/bin:/usr/bin:/bin",
            "HOME": str(self.folder / "home"),
            "VLA_LOG_DIR": str(self.folder / "runs"),
            "REAL_PYTHON": sys.executable,
            "CALLS": str(self.calls),
            **variables,
        }
        process = subprocess.run(
            ["bash", str(script), *arguments],
            cwd=cwd,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=60,
            check=False,
        )
        records = self.calls.read_text().split("\x1e")[:-1]
        seen = Path(f"{self.calls}.env")
        pairs = seen.read_text().split("\0")[:-1] if seen.exists() else []
        return Outcome(
            exit_code=process.returncode,
            text=process.stdout,
            calls=[record.split("\x1f")[:-1] for record in records],
            environment=dict(pair.split("=", 1) for pair in pairs),
        )


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


DEMO = ROOT / "slurms" / "train_scripts" / "pi0_demo.sh"
SLURM_JOB = {
    "SLURM_JOB_ID": "4711",
    "SLURM_SUBMIT_DIR": str(ROOT),
    "SLURM_JOB_NODELIST": "node[7-8]",
}


# ---- the decision ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "exit_code", "action", "leaves_with"),
    [
        ({"attempt": "a", "state": "finished", "step": 9}, 0, "done", 0),
        ({"attempt": "a", "state": "finished", "step": 9}, 1, "done", 0),  # torn down badly, but the work is done
        ({"attempt": "a", "state": "failed", "error_kind": "config", "reason": "chunk_sise"}, 1, "fail", 2),
        ({"attempt": "a", "state": "failed", "error_kind": "runtime", "reason": "CUDA"}, 1, "requeue", 1),
        ({"attempt": "a", "state": "failed"}, 1, "requeue", 1),
        ({"attempt": "a", "state": "preempted", "reason": "SIGUSR1"}, 0, "requeue", 1),
        ({"attempt": "a", "state": "running"}, 1, "requeue", 1),
        ({"attempt": "a", "state": "running"}, 0, "requeue", 1),
        ({"attempt": "b", "state": "finished"}, 1, "requeue", 1),
        ({"attempt": "b", "state": "failed", "error_kind": "config"}, 137, "requeue", 1),
        ({"state": "finished"}, 1, "requeue", 1),
        (None, 137, "requeue", 1),
        (None, 0, "done", 0),  # --help
        ({"attempt": "a", "state": "dancing"}, 1, "fail", 1),
    ],
)
def test_decision(written: dict[str, Any] | None, exit_code: int, action: str, leaves_with: int) -> None:
    decision = decide(written, "a", exit_code, problem="it wrote no status")
    assert (decision.action, decision.exit_code) == (action, leaves_with)
    assert decision.reason
    if written and written.get("reason"):
        assert written["attempt"] != "a" or written["reason"] in decision.reason


@pytest.mark.parametrize("content", [None, "", "{", "[1, 2]", '"finished"', "\udcff"])
def test_unreadable_status_is_no_status(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "status.json"
    if content is not None:
        path.write_bytes(content.encode("utf-8", "surrogateescape"))
    found, problem = read_status(path)
    assert found is None
    assert problem


def test_decision_needs_only_the_standard_library() -> None:
    program = "import sys, agent.requeue; print([m for m in ('torch', 'lerobot', 'draccus') if m in sys.modules])"
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"


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


def test_refused_requeue_says_how_to_continue(shell: Shell) -> None:
    outcome = shell.run(DEMO, FAKE_EXIT="1", FAKE_REQUEUE_EXIT="1", **SLURM_JOB)
    assert outcome.exit_code == 1
    assert "submit the same command again" in outcome.text


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


# ---- set_path.sh -----------------------------------------------------------------------------------------------

VARIABLES = (
    "VLA_DATA_DIR",
    "VLA_LOG_DIR",
    "VLA_WANDB_ENTITY",
    "HF_HOME",
    "TRANSFORMERS_CACHE",
    "UV_CACHE_DIR",
    "UV_PYTHON_INSTALL_DIR",
    "OVERLAY_EXT3",
    "SINGULARITY_IMAGE",
    "PYTHONSAFEPATH",
)


def paths(**variables: str) -> dict[str, str]:
    """The exported variables after sourcing set_path.sh under ``set -eu``."""
    environment = {"PATH": os.environ["PATH"], "HOME": "/home/someone", **variables}
    command = ["bash", "-euc", 'source "$0" && env -0', str(ROOT / "set_path.sh")]
    output = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, check=True).stdout
    return dict(pair.split("=", 1) for pair in output.split("\0")[:-1])


def test_set_path_defaults() -> None:
    found = paths()
    assert {name for name in VARIABLES if name not in found} == set()
    assert found["VLA_LOG_DIR"] == found["PWD"] + "/runs"
    assert found["OVERLAY_EXT3"] == found["SINGULARITY_IMAGE"] == found["VLA_WANDB_ENTITY"] == ""
    assert found["HF_HOME"] == "/home/someone/.cache/huggingface"
    assert found["PYTHONSAFEPATH"] == "1"


@pytest.mark.parametrize("name", VARIABLES)
def test_set_path_keeps_what_is_set(name: str) -> None:
    assert paths(**{name: "/some where/else"})[name] == "/some where/else"


# ---- the files -------------------------------------------------------------------------------------------------


def header(script: Path) -> dict[str, str | None]:
    """The #SBATCH options; every line must be one that sbatch would read, before the first command."""
    lines = script.read_text().splitlines()
    assert lines[0] == "#!/bin/bash"
    end = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert not [line for line in lines[end:] if line.startswith("#SBATCH")]
    options: dict[str, str | None] = {}
    for line in lines[:end]:
        if line.startswith("#SBATCH"):
            found = re.fullmatch(r"#SBATCH --([a-z-]+)(?:=(\S+))?", line)
            assert found, line
            assert found[1] not in options, line
            options[found[1]] = found[2]
    return options


def test_one_script_per_training_config() -> None:
    assert {path.stem for path in SCRIPTS} == STEMS
    assert {path.stem for path in (ROOT / "config" / "train").glob("*.yaml")} == STEMS


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_header(script: Path) -> None:
    shared: dict[str, str | None] = {
        "job-name": script.stem,
        "output": "log/slurm/train/%x.out",
        "error": "log/slurm/train/%x.err",
        "open-mode": "append",
        "nodes": "1",
        "ntasks-per-node": "1",
        "requeue": None,
    }
    big: dict[str, str | None] = {
        "time": "44:00:00",
        "gres": "gpu:4",
        "constraint": '"a100|h100"',
        "cpus-per-task": "54",
        "mem": "440G",
    }
    small: dict[str, str | None] = {"time": "00:10:00", "cpus-per-task": "2", "mem": "8G"}
    assert header(script) == shared | (small if script.stem == "pi0_demo" else big)
    assert "\n##SBATCH --account=" in script.read_text()
    assert os.access(script, os.X_OK)


def test_what_follows_the_header_is_the_same_in_all() -> None:
    bodies = {
        re.sub(rf"\b{path.stem}\b", "NAME", path.read_text().split("##SBATCH", 1)[1].split("\n", 1)[1])
        for path in SCRIPTS
    }
    assert len(bodies) == 1


def test_log_folder_is_in_the_repository() -> None:
    # SLURM does not make the folder of --output, and the job then fails without a word.
    assert (ROOT / "log" / "slurm" / "train" / ".gitkeep").is_file()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed (apt install shellcheck)")
def test_shellcheck() -> None:
    command = ["shellcheck", "--external-sources", "--source-path=SCRIPTDIR", *map(str, SHELL_FILES)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stdout
