"""Training YAMLs of this code's predecessors are refused, line by line, with what to write today.

Run: uv run pytest tests/settings/test_older_keys.py
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.launching import RUN
from support.older_files import TRAIN, Files

from agent.configuration_pipeline import TrainPipelineConfig
from agent.describe_config import entries
from agent.settings import older_keys

OLD_TRAIN = """\
name: pi0_finetune
model_cfg: !include ../model/v1.json
freeze_lm_head: true
freeze_vlm: false
load_from_checkpoint: lerobot/pi0
task_paraphrase: true
n_nodes: 1
multi_gpu: true
use_torch_compile: true
use_amp: true
use_bf16: true
seed: 42
debug: false
resume_run: true
global_batch_size: 1024
per_device_batch_size: 32
n_epochs: 15
n_updates: null
max_grad_norm: 1.0
save_model_freq: null
log_freq: 4
train_log_metrics: [l2_loss]
eval_thresholds: [0.05, 0.1]
eval_freq: 250
eval_size: 1024
use_wandb: true
log_dir: ${oc.env:VLA_LOG_DIR}/train/${name}
eval_cfg:
  simulator_name: simpler
  role: server
wandb:
  project: old
  entity: lab
  api_key: not-to-be-shown
data:
  train_episode_count: 1550000
  dataset_stats: {action: {mean: [0.1], std: [1.0]}}
  train:
    dataset_mix: bridge
    split: train
    data_path: ${VLA_DATA_DIR_NOT_SET}/resize_224
    window_size: 1
    action_horizon: 4
    skip_unlabeled: true
    load_proprio: true
    shuffle_buffer_size: 200000
    num_parallel_calls: 50
  val:
    split: val
    shuffle_buffer_size: 10000
"""
REPLACED = {
    "task_paraphrase": "write the path of a JSON of instruction → paraphrases",
    "n_nodes": "torchrun --nproc_per_node says how many GPUs of the one node are used",
    "multi_gpu": "torchrun --nproc_per_node says how many GPUs of the one node are used",
    "use_amp": "use_bf16 alone decides the precision; remove the line",
    "save_model_freq": "write the updates between checkpoints, or remove the line",
    "train_log_metrics": "the metrics are always the same ones",
    "log_dir": "`export VLA_LOG_DIR=…` (set_path.sh); the run's folder is ${VLA_LOG_DIR}/<name>",
    "eval_cfg.simulator_name": "write eval_cfg: {tasks: [reach-v3]} (docs/simulation.md), or remove it",
    "eval_cfg.role": "simulation is Meta-World's",
    "wandb.api_key": "run `wandb login` or `export WANDB_API_KEY=…`",
    "data.train_episode_count": "The length of the run is n_epochs or n_updates",
    "data.dataset_stats": "statistics are computed from the training episodes",
    "data.train.dataset_mix": "write data.train.datasets: !include ../data/bridge.yaml",
    "data.train.split": "write `split: train`",
    "data.train.data_path": "convert it to the LeRobot v3 format",
    "data.train.window_size": "π0 sees one observation step; remove the line",
    "data.train.action_horizon": "write model_cfg.chunk_size: 4",
    "data.train.skip_unlabeled": "choose the labelled ones with `episodes` in the entry of data.train.datasets",
    "data.train.load_proprio": "the state is always read",
    "data.train.shuffle_buffer_size": "all samples are shuffled, by `seed` and without a buffer; remove the line",
    "data.train.num_parallel_calls": "write data.train.num_workers",
    "data.val.split": "write data.val.fraction",
    "data.val.shuffle_buffer_size": "all samples are shuffled",
}


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path / "config")


def test_an_older_training_yaml_is_answered_line_by_line(files: Files) -> None:
    files.yaml.write_text(OLD_TRAIN, encoding="utf-8")
    lines = files.refused().splitlines()[1:]
    said = {}
    for line in lines:
        where, key, text = re.match(r"\s+(\S+:\d+): ([\w.]+): (.*)", line).groups()  # type: ignore[union-attr]
        said[key] = (where, text)
    assert said.keys() == REPLACED.keys()
    yaml_lines = OLD_TRAIN.splitlines()
    for key, wanted in REPLACED.items():
        where, text = said[key]
        assert wanted in text, key
        assert yaml_lines[int(where.rpartition(":")[2]) - 1].strip().startswith(key.rpartition(".")[2] + ":"), key
    assert "not-to-be-shown" not in "".join(lines)


def test_what_the_answers_say_works(files: Files) -> None:
    # The keys that still exist, with the older values, and the lines that the refusals ask for.
    kept = "".join(
        f"{line}\n"
        for line in OLD_TRAIN.partition("log_dir:")[0].splitlines()
        if line.partition(":")[0] not in REPLACED and not line.startswith("use_wandb")
    )
    (files.yaml.parent.parent / "data").mkdir()
    (files.yaml.parent.parent / "data" / "bridge.yaml").write_text("[{repo_id: lab/bridge, split: train}]")
    files.yaml.write_text(
        f"{kept}use_wandb: false\nwandb: {{project: old, entity: lab}}\ndata:\n  train:\n"
        "    datasets: !include ../data/bridge.yaml\n    num_workers: 50\n  val: {fraction: 0.05}\n"
    )
    config = files.load("--model_cfg.chunk_size", "50")
    assert (config.name, config.load_from_checkpoint, config.n_epochs) == ("pi0_finetune", "lerobot/pi0", 15)
    assert (config.freeze_lm_head, config.model_cfg.freeze_lm_head, config.wandb.entity) == (True, True, "lab")
    assert config.data.train.datasets[0].repo_id == "lab/bridge"


@pytest.mark.parametrize(
    ("argument", "value", "instead"),
    [
        ("data.train.dataset_mix", "fractal", "write data.train.datasets: !include ../data/fractal.yaml"),
        ("data.train.dataset_mix", "oxe_magic_soup", "a list with one {repo_id: …, root: …} for each data set"),
        ("data.val.dataset_mix", "bridge", "write data.val.datasets, or data.val.fraction"),
        ("data.train.action_horizon", "null", "model_cfg.chunk_size says; remove the line"),
        ("horizon_steps", "4", "write model_cfg.chunk_size: 4"),
        ("train_vlm", "false", "write freeze_vlm: true"),
        ("wandb.disable", "true", "write use_wandb: false at the top"),
        ("wandb.enable", "true", "write use_wandb: true at the top"),
        ("pretrained_model_path", "/big/paligemma", "write model_cfg.paligemma_pretrained_path: /big/paligemma"),
        ("action_lr", "5e-5", "write model_cfg.optimizer_lr: 5e-5"),
        ("lora", "true", "low-rank adapters and quantisation are not supported"),
        ("mixture.vlm.hidden_size", "2048", "sizes are the model config's"),
        ("task_paraphrase", "false", "write null, or remove the line"),
    ],
)
def test_older_keys_on_the_command_line(files: Files, argument: str, value: str, instead: str) -> None:
    message = files.refused(f"--{argument}", value)
    assert f"command line: --{argument.replace('.vlm.hidden_size', '')}: " in message
    assert instead in message


def test_a_key_that_nobody_had_still_gets_the_nearest(files: Files) -> None:
    assert "global_batch_sise: unknown key; did you mean 'global_batch_size'?" in files.refused(
        "--global_batch_sise", "8"
    )


def test_the_data_that_older_files_left_out(files: Files) -> None:
    files.yaml.write_text("model_cfg: !include ../model/v1.json\n")
    wanted = "data: missing; it has no default; write data: {train: {datasets: !include ../data/bridge.yaml}}"
    assert wanted in files.refused()


def test_the_folder_of_models_had_another_name(files: Files) -> None:
    files.yaml.write_text(TRAIN.replace("../model/", "../models/"))
    assert f"did you mean {files.json}?" in files.refused()


def test_an_older_yaml_ends_the_run_with_code_two(files: Files) -> None:
    files.yaml.write_text(OLD_TRAIN, encoding="utf-8")
    process = subprocess.run(
        [sys.executable, str(RUN), "--config_path", str(files.yaml)], capture_output=True, text=True, timeout=60
    )
    assert process.returncode == 2 and process.stdout == ""
    assert process.stderr.startswith(f"error: {files.yaml} cannot be used:\n")
    assert "data.train.dataset_mix: a key of older configs; write data.train.datasets: !include" in process.stderr


def test_no_key_of_today_is_called_an_older_one() -> None:
    today = [entry.name for entry in entries(TrainPipelineConfig)]
    assert [key for key in today if older_keys.instead(key, None) is not None] == []
    assert {key for key, _ in older_keys.VALUES} | older_keys.MISSING.keys() <= set(today)
