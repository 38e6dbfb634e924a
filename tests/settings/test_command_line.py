"""What stands on the command line, and run.py as a process that refuses it.

Run: uv run pytest tests/settings/test_command_line.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.config_files import MODEL, Files
from support.launching import RUN

from agent.configuration_pipeline import dump


def test_command_line_forms(files: Files) -> None:
    config = files.load(
        "--model_cfg.chunk_size", "8", "--global_batch_size=64", "--deterministic",
        "--data.train.datasets.1.root", "/elsewhere", "--eval_thresholds", "[0.5, 1]", "--debug=false",
        "--max_grad_norm", "1e-1", "--task_paraphrase", "null", "--model_cfg.optimizer_lr=3e-4",
    )  # fmt: skip
    assert config.global_batch_size == 64
    assert config.deterministic is True and config.debug is False
    assert config.eval_thresholds == [0.5, 1]
    assert config.max_grad_norm == 0.1
    assert config.task_paraphrase is None
    assert [d.root for d in config.data.train.datasets] == ["/nowhere/one", "/elsewhere"]
    assert (dump(config)["model_cfg"]["chunk_size"], dump(config)["model_cfg"]["optimizer_lr"]) == (8, 3e-4)


def test_flag_without_value_before_another_key(files: Files) -> None:
    config = files.load("--deterministic", "--seed", "3", "--resume_changes")
    assert (config.deterministic, config.seed, config.resume_changes) == (True, 3, True)


def test_overriding_a_key_that_holds_dots(files: Files) -> None:
    config = files.load("--model_cfg.input_features.observation.state.shape", "[5]")
    assert dump(config)["model_cfg"]["input_features"] == {"observation.state": {"type": "STATE", "shape": [5]}}


def test_overriding_what_an_anchor_repeats(files: Files) -> None:
    files.yaml.write_text(
        "model_cfg: !include ../model/small.json\n"
        "data: {train: {datasets: &all [{repo_id: lab/a, root: /a}]}, val: {datasets: *all}}\n"
        "use_wandb: false\n"
    )
    config = files.load("--data.train.datasets.0.root", "/b")
    assert (config.data.train.datasets[0].root, config.data.val.datasets[0].root) == ("/b", "/a")


def test_including_another_model_on_the_command_line(files: Files) -> None:
    other = files.write("model/other.json", json.dumps(MODEL | {"chunk_size": 3}))
    assert dump(files.load("--model_cfg", f"!include {other}"))["model_cfg"]["chunk_size"] == 3


@pytest.mark.parametrize("name", ["2026-01-31", "007", "12:30", "1e5", "0x10", "15"])
def test_names_stay_as_they_are_written(files: Files, name: str) -> None:
    # YAML 1.1 reads 007 as 7, 12:30 as 750, 0x10 as 16, and the first as a date.
    assert files.load("--name", name).name == name
    files.edit("wandb:", f"name: {name}\nwandb:")
    assert files.load().name == name


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["extra"], "cannot read the argument 'extra'; overrides look like --global_batch_size 64"),
        (["--"], "cannot read the argument '--'"),
        (["-seed", "3"], "cannot read the argument '-seed'"),
        (["--seed", "=", "3"], "--seed: there are no spaces around '='; write --seed VALUE"),
        (["--seed", "{a"], "--seed: cannot read the value '{a'"),
        (["--data.train.datasets.2.root", "x"], "'2' must be a number below 2, the length of that list"),
        (["--data.train.datasets.first.root", "x"], "'first' must be a number below 2"),
        (["--seed.x", "3"], "command line: --seed: expected a whole number, got {'x': 3}"),
    ],
)
def test_unreadable_command_line(files: Files, arguments: list[str], complaint: str) -> None:
    assert complaint in files.refused(*arguments)


# ── run.py as a process ─────────────────────────────────────────────────────────────────────────────────────────


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(RUN), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | variables, check=False)


def test_mistake_ends_run_with_code_two_and_is_reported(files: Files, tmp_path: Path) -> None:
    status = tmp_path / "status" / "status.json"
    variables = {"VLA_STATUS_FILE": str(status), "VLA_ATTEMPT": "job-3"}
    process = run("--config_path", str(files.yaml), "--sead", "3", **variables)
    message = f"{files.yaml} cannot be used: command line: --sead: unknown key; did you mean 'seed'?"
    assert process.returncode == 2
    assert process.stderr == f"error: {message}\n"
    assert process.stdout == ""
    written = json.loads(status.read_text())
    assert written == {"attempt": "job-3", "state": "failed", "error_kind": "config", "reason": message}
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "variables", "complaint"),
    [
        ([], {}, "which config? add --config_path config/train/X.yaml"),
        (["--config_path"], {}, "which config?"),
        (["--config_path", "--seed", "3"], {}, "which config?"),
        (["--config_path=/no/such.yaml"], {}, "there is no config file /no/such.yaml"),
        (["--config_path", "x.yaml"], {"LOCAL_RANK": "0"}, "LOCAL_RANK set but"),
    ],
)
def test_mistakes_without_a_config(
    arguments: list[str], variables: dict[str, str], complaint: str, tmp_path: Path
) -> None:
    status = tmp_path / "status.json"
    process = run(*arguments, VLA_STATUS_FILE=str(status), **variables)
    assert process.returncode == 2
    assert process.stderr.startswith(f"error: {complaint}")
    assert json.loads(status.read_text())["error_kind"] == "config"


def test_a_mistake_is_found_before_torch_is_imported(files: Files) -> None:
    program = (
        "import sys\nfrom agent.run import main\n"
        "code = main(sys.argv[1:])\n"
        "print(code, [name for name in ('torch', 'lerobot', 'transformers', 'wandb') if name in sys.modules])"
    )
    command = [sys.executable, "-c", program, "--config_path", str(files.yaml), "--global_batch_size", "25"]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    assert process.stdout == "2 []\n"
    assert "global_batch_size 25 is not a multiple" in process.stderr


def test_help_lists_every_key_and_survives_head() -> None:
    process = run("--help")
    assert process.returncode == 0
    for key in ("--global_batch_size", "--data.train.datasets.N.root", "--paligemma_variant.width", "--wandb.mode"):
        assert f"  {key}  [" in process.stdout
    command = f"set -o pipefail; {sys.executable} {RUN} --help | true"
    process = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (process.returncode, process.stderr) == (0, "")
