"""set_path.sh, whatever a user makes of it, and the files of slurms/ themselves.

Run: uv run pytest tests/system/test_script_files.py
     uv run pytest tests/system/test_script_files.py -m slow      (shellcheck, where it is installed)
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from support.slurm_shell import FINISHED, ROOT, SCRIPTS, SHELL_FILES, SLURM_JOB, STEMS, Shell, status

# ---- set_path.sh -----------------------------------------------------------------------------------------------
VARIABLES = (
    "VLA_DATA_DIR",
    "VLA_LOG_DIR",
    "VLA_WANDB_ENTITY",
    "HF_HOME",
    "TRANSFORMERS_CACHE",
    "UV_CACHE_DIR",
    "UV_PYTHON_INSTALL_DIR",
    "TORCHINDUCTOR_CACHE_DIR",
    "OVERLAY_EXT3",
    "SINGULARITY_IMAGE",
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


@pytest.mark.parametrize("name", VARIABLES)
def test_set_path_keeps_what_is_set(name: str) -> None:
    assert paths(**{name: "/some where/else"})[name] == "/some where/else"


INT_ACT = """
export VLA_DATA_DIR=
export VLA_LOG_DIR=
export VLA_WANDB_ENTITY=
export TRANSFORMERS_CACHE=
export HF_HOME=
export UV_CACHE_DIR=
export UV_PYTHON_INSTALL_DIR=
export OVERLAY_EXT3=/scratch/overlay.ext3
"""
SURVIVED = {
    "errexit": "set -euo pipefail\n{shipped}",
    "errexit-fails": "set -e\n{shipped}\nfalse\ntrue\n",
    "last-is-false": "{shipped}\n[ -d /nowhere ] && export HF_HOME=/nowhere\n",
    "returns": "{shipped}\nreturn 3\n",
    "unset-variable": "{shipped}\nexport LD_LIBRARY_PATH=/opt/lib:$LD_LIBRARY_PATH\n",
    "elsewhere": "{shipped}\ncd /\n",
    "options": "{shipped}\nset -f; shopt -s nullglob failglob nocasematch; IFS=/; trap 'exit 9' EXIT ERR\n",
    "arguments": "{shipped}\nset -- something else; repository=/nowhere root=/nowhere\n",
    "template": INT_ACT,
    "not-exported": "VLA_LOG_DIR=$HOME/logs; HF_HOME=/my/hub\n",
    "nothing": "",
}


@pytest.fixture
def checkout(shell: Shell) -> Path:
    """A repository of scripts alone, whose set_path.sh is the test's own."""
    shutil.copytree(ROOT / "slurms", shell.folder / "checkout" / "slurms")
    return shell.folder / "checkout"


@pytest.mark.parametrize("case", SURVIVED)
def test_what_a_set_path_does_to_the_shell_changes_no_script(shell: Shell, checkout: Path, case: str) -> None:
    shipped = (ROOT / "set_path.sh").read_text()
    (checkout / "set_path.sh").write_text(SURVIVED[case].replace("{shipped}", shipped))
    script = checkout / "slurms" / "train_scripts" / "pi0_demo.sh"
    written = status("failed", "config", reason="n_updates")
    ended = shell.run(script, "--name", "a b", FAKE_STATUS=written, FAKE_EXIT="1", VLA_LOG_DIR="", **SLURM_JOB)
    assert ended.exit_code == 2 and "fail: the configuration has to be corrected first" in ended.text, ended.text
    assert ended.requeued == [] and ended.torchrun[-2:] == ["--name", "a b"]
    assert "unbound variable" not in ended.text
    seen = ended.environment
    assert seen["PWD"] == str(checkout)
    assert seen["VLA_LOG_DIR"] == (f"{shell.folder}/home/logs" if case == "not-exported" else f"{checkout}/runs")
    assert "" not in [seen.get(name) for name in ("HF_HOME", "UV_CACHE_DIR", "VLA_DATA_DIR", "TRANSFORMERS_CACHE")]
    assert case != "not-exported" or seen["HF_HOME"] == "/my/hub"
    told = {"last-is-false": "last command left with exit code 1", "returns": "last command left with exit code 3"}
    told["template"] = "no container: OVERLAY_EXT3 is set, SINGULARITY_IMAGE is not"
    assert told.get(case, "") in ended.text, ended.text


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("exit 0\n", "set_path.sh ended the script (exit code 0), with an exit or with the error above"),
        ("set -u\necho $NOTHING\n", "set_path.sh ended the script (exit code 1), with an exit or with the error above"),
        ("if true\n", "set_path.sh cannot be read: ./set_path.sh: line"),
        (
            "export HF_HOME=/scratch\r\n",
            "set_path.sh has the line ends of Windows; write: sed -i 's/\\r$//' set_path.sh",
        ),
        (None, "set_path.sh cannot be read: bash: ./set_path.sh: No such file"),
    ],
)
@pytest.mark.parametrize("kind", ["train", "eval"])
def test_a_set_path_that_no_script_survives_is_named(
    shell: Shell, checkout: Path, content: str | None, said: str, kind: str
) -> None:
    if content is not None:
        (checkout / "set_path.sh").write_text(content)
    script = checkout / "slurms" / f"{kind}_scripts" / ("pi0_demo.sh" if kind == "train" else "pi0_metaworld.sh")
    outcome = shell.run(script, FAKE_STATUS=FINISHED, **SLURM_JOB)
    assert outcome.exit_code == 2 and outcome.requeued == [], outcome.text
    (line,) = [line for line in outcome.text.splitlines() if line.startswith("set_path.sh ")]
    assert line.startswith(said) and line.endswith("; not requeued")
    assert "no repository here" not in outcome.text and not [call for call in outcome.calls if call[0] == "uv"]


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
        "signal": "B:USR1@60" if script.stem == "pi0_demo" else "B:USR1@300",
    }
    big: dict[str, str | None] = {
        "time": "44:00:00",
        "gres": "gpu:4",
        "constraint": '"a100|h100"',
        "cpus-per-task": "54",
        "mem": "440G",
    }
    small: dict[str, str | None] = {"time": "00:10:00", "cpus-per-task": "2", "mem": "8G"}
    own = {"pi0_demo": small, "pi0_metaworld": {"time": "02:00:00", "cpus-per-task": "2", "mem": "8G"}}
    assert header(script) == shared | own.get(script.stem, big)
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
