"""From YAML, JSON and command line to a config, and the message for every mistake on the way.

Run: uv run pytest tests/settings/test_configuration.py      (half a minute; needs no GPU)

Most tests load real files through agent.configuration_pipeline.load_config; some start run.py as a process.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from agent.configuration_pipeline import (
    TrainPipelineConfig,
    dump,
    dump_yaml,
    load_config,
    reconcile,
)
from agent.parallel.processes import Launch, choose_device, read_launch
from agent.settings.files import ConfigError
from agent.settings.plan import make_plan
from agent.training.config_changes import changes_since, changes_since_checkpoint, settle

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

MODEL = {
    "type": "pi0",
    "chunk_size": 6,
    "dtype": "bfloat16",
    "optimizer_lr": 5e-05,
    "optimizer_grad_clip_norm": 0.5,
    "freeze_lm_head": True,
    "input_features": {"observation.state": {"type": "STATE", "shape": [4]}},
    "output_features": {"action": {"type": "ACTION", "shape": [4]}},
}
TRAIN = """\
model_cfg: !include ../model/small.json
data:
  train:
    datasets: !include ../data/two.yaml
global_batch_size: 24
per_device_batch_size: 4
wandb:
  mode: offline
"""
DATA = """\
- repo_id: lab/one
  root: ${DATA_HOME:-/nowhere}/one
- repo_id: lab/two
  root: /data/two
  weight: 2
"""


class Files:
    """A folder config/ with a training YAML, a model JSON and a list of data sets, to be changed by a test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.yaml = self.write("train/small.yaml", TRAIN)
        self.json = self.write("model/small.json", json.dumps(MODEL, indent=2))
        self.data = self.write("data/two.yaml", DATA)

    def write(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    def model(self, **changes: Any) -> None:
        self.json.write_text(json.dumps(MODEL | changes, indent=2), encoding="utf-8")

    def edit(self, old: str, new: str, file: Path | None = None) -> None:
        file = file or self.yaml
        text = file.read_text(encoding="utf-8")
        assert old in text
        file.write_text(text.replace(old, new, 1), encoding="utf-8")

    def line(self, needle: str, file: Path | None = None) -> str:
        """``file:line`` of the only line that holds ``needle``."""
        file = file or self.yaml
        lines = file.read_text(encoding="utf-8").splitlines()
        (number,) = (n for n, text in enumerate(lines, start=1) if needle in text)
        return f"{file}:{number}"

    def load(self, *arguments: str, world: int = 1) -> TrainPipelineConfig:
        return load_config(self.yaml, list(arguments), world)[0]

    def notes(self, *arguments: str) -> list[str]:
        return load_config(self.yaml, list(arguments), 1)[1]

    def refused(self, *arguments: str, world: int = 1) -> str:
        with pytest.raises(ConfigError) as error:
            self.load(*arguments, world=world)
        return str(error.value)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No torchrun, no wandb key and no folder of this machine."""
    home = tmp_path / "home"
    home.mkdir()
    for name in (*TORCHRUN, "WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "DATA_HOME", "VLA_STATUS_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("NETRC", str(home / "netrc"))
    monkeypatch.setenv("VLA_LOG_DIR", str(tmp_path / "runs"))


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path / "config")


def values(config: TrainPipelineConfig) -> dict[str, Any]:
    return dump(config)


# ── precedence, includes, variables, the command line ───────────────────────────────────────────────────────────


def test_defaults_then_yaml_then_command_line(files: Files) -> None:
    assert files.load().seed == 42
    files.edit("wandb:", "seed: 7\nwandb:")
    assert files.load().seed == 7
    assert files.load("--seed", "8").seed == 8


def test_name_is_the_stem_of_the_file_unless_given(files: Files, tmp_path: Path) -> None:
    assert files.load().name == "small"
    assert files.load().run_dir == tmp_path / "runs" / "small"
    assert files.load("--name", "other").run_dir == tmp_path / "runs" / "other"


def test_a_tilde_in_the_place_of_the_run_folders_is_the_home_folder(
    files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("VLA_LOG_DIR", "~/runs")  # in quotes no shell replaces it
    assert files.load().run_dir == tmp_path / "runs" / "small"


def test_includes_are_relative_to_the_including_file(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    files.write("data/more/third.yaml", "{repo_id: lab/third, root: !include names/root.json}")
    files.write("data/more/names/root.json", '"/data/third"')
    files.edit("- repo_id: lab/two", "- !include more/third.yaml\n- repo_id: lab/two", files.data)
    monkeypatch.chdir("/")
    config = files.load()
    assert [d.repo_id for d in config.data.train.datasets] == ["lab/one", "lab/third", "lab/two"]
    assert config.data.train.datasets[1].root == "/data/third"
    assert values(config)["model_cfg"]["chunk_size"] == 6


@pytest.mark.parametrize("written", ["{<<: !include ../model/small.json, chunk_size: 8}", "block"])
def test_merged_include_with_changes(files: Files, written: str) -> None:
    if written == "block":
        written = "\n  chunk_size: 8\n  <<: !include ../model/small.json"
    files.edit("!include ../model/small.json", written)
    model = values(files.load())["model_cfg"]
    assert (model["chunk_size"], model["optimizer_lr"], model["dtype"]) == (8, 5e-5, "bfloat16")


def test_merged_anchors_are_no_repeated_keys(files: Files) -> None:
    # A merge writes into the merged mapping, so that a check after it sees `weight` twice.
    anchored = "{train: {datasets: [&common {<<: {repo_id: lab/a, weight: 1}, weight: 2}]}, "
    files.yaml.write_text(
        "model_cfg: !include ../model/small.json\n"
        f"data: {anchored} val: {{datasets: [{{<<: *common, root: /data/b}}]}}}}\n"
        "use_wandb: false\n"
    )
    config = files.load()
    assert (config.data.train.datasets[0].weight, config.data.val.datasets[0].weight) == (2, 2)


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
    assert (values(config)["model_cfg"]["chunk_size"], values(config)["model_cfg"]["optimizer_lr"]) == (8, 3e-4)


def test_flag_without_value_before_another_key(files: Files) -> None:
    config = files.load("--deterministic", "--seed", "3", "--resume_changes")
    assert (config.deterministic, config.seed, config.resume_changes) == (True, 3, True)


def test_overriding_a_key_that_holds_dots(files: Files) -> None:
    config = files.load("--model_cfg.input_features.observation.state.shape", "[5]")
    assert values(config)["model_cfg"]["input_features"] == {"observation.state": {"type": "STATE", "shape": [5]}}


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
    assert values(files.load("--model_cfg", f"!include {other}"))["model_cfg"]["chunk_size"] == 3


@pytest.mark.parametrize("name", ["2026-01-31", "007", "12:30", "1e5", "0x10", "15"])
def test_names_stay_as_they_are_written(files: Files, name: str) -> None:
    # YAML 1.1 reads 007 as 7, 12:30 as 750, 0x10 as 16, and the first as a date.
    assert files.load("--name", name).name == name
    files.edit("wandb:", f"name: {name}\nwandb:")
    assert files.load().name == name


def test_variables(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    assert files.load().data.train.datasets[0].root == "/nowhere/one"
    monkeypatch.setenv("DATA_HOME", "/big")
    assert files.load().data.train.datasets[0].root == "/big/one"
    assert files.load("--data.train.datasets.1.root", "${DATA_HOME}/x").data.train.datasets[1].root == "/big/x"
    files.edit("../data/two.yaml", "${LISTS}/two.yaml")
    monkeypatch.setenv("LISTS", str(files.data.parent))
    assert files.load().data.train.datasets[0].root == "/big/one"


def test_unset_variable(files: Files) -> None:
    files.edit("${DATA_HOME:-/nowhere}", "${DATA_HOME}", files.data)
    message = files.refused()
    assert f"{files.line('DATA_HOME', files.data)}: data.train.datasets.0.root: '${{DATA_HOME}}/one'" in message
    assert "environment variable DATA_HOME, which is not set; `source set_path.sh`" in message
    assert "command line: --task_paraphrase: '${NOPE}'" in files.refused("--task_paraphrase", "${NOPE}")


@pytest.mark.parametrize("text", ["${A:-${B}}", "${A-b}/x", "${A", "${A B}"])
def test_variable_that_cannot_be_read(files: Files, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A", "a")
    monkeypatch.setenv("B", "b")
    assert f"--task_paraphrase: cannot read '{text}'; write ${{VAR}}" in files.refused(f"--task_paraphrase={text}")


# ── keys ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_variable_without_braces(files: Files) -> None:
    files.edit("/data/two", "$DATA_HOME/two", files.data)
    where = files.line("$DATA_HOME/two", files.data)
    wanted = (
        f"{where}: data.train.datasets.1.root: '$DATA_HOME/two' has a variable without braces; write ${{DATA_HOME}}"
    )
    assert wanted in files.refused()
    files.edit("$DATA_HOME/two", "/data/two$", files.data)
    assert files.load().data.train.datasets[1].root == "/data/two$"


def test_what_is_not_set_is_not_of_a_wrong_type_too(files: Files) -> None:
    message = files.refused("--n_updates", "${UPDATES}")
    assert "UPDATES, which is not set" in message and "whole number" not in message
    assert "updatess: unknown key" in files.refused("--n_updatess", "${UPDATES}")


def test_mistyped_key_in_the_yaml(files: Files) -> None:
    files.edit("global_batch_size", "global_batch_sise")
    message = files.refused()
    assert message == (
        f"{files.yaml} cannot be used: {files.line('sise')}: "
        "global_batch_sise: unknown key; did you mean 'global_batch_size'?"
    )


def test_mistyped_key_in_an_included_json(files: Files) -> None:
    files.edit('"chunk_size"', '"chunk_sise"', files.json)
    where = files.line("chunk_sise", files.json)
    assert f"{where}: model_cfg.chunk_sise: unknown key; did you mean 'model_cfg.chunk_size'?" in files.refused()


def test_mistyped_key_in_json_indented_with_tabs(files: Files) -> None:
    files.json.write_text(json.dumps(MODEL | {"chunk_sise": 3}, indent="\t"))
    where = files.line("model_cfg")
    assert f"{where}: model_cfg.chunk_sise: unknown key; did you mean 'model_cfg.chunk_size'?" in files.refused()


def test_mistyped_key_in_a_merged_include(files: Files) -> None:
    files.edit("!include ../model/small.json", "{<<: !include ../model/small.json, chunk_sise: 8}")
    assert f"{files.line('chunk_sise')}: model_cfg.chunk_sise: unknown key" in files.refused()


def test_a_mapping_that_replaces_a_merged_one_is_where_it_lacks_a_key(files: Files) -> None:
    sizes = {"width": 64, "depth": 2, "mlp_dim": 128, "heads": 2, "kv_heads": 1, "head_dim": 32}
    files.model(paligemma_variant=sizes)
    files.edit("!include ../model/small.json", "\n  <<: !include ../model/small.json\n  paligemma_variant: {width: 32}")
    message = files.refused()
    assert f"{files.line('paligemma_variant')}: model_cfg.paligemma_variant.depth: missing" in message
    assert str(files.json) not in message


def test_mistyped_key_in_a_list(files: Files) -> None:
    files.edit("weight", "weigth", files.data)
    where = files.line("weigth", files.data)
    wanted = f"{where}: data.train.datasets.1.weigth: unknown key; did you mean 'data.train.datasets.1.weight'?"
    assert wanted in files.refused()


def test_the_line_is_that_of_the_key_not_of_another_of_the_same_name(files: Files) -> None:
    files.edit("root: /data/two", "root: [2]", files.data)
    where = files.line("root: [2]", files.data)
    assert f"{where}: data.train.datasets.1.root: expected a text, got [2]" in files.refused()


def test_mistyped_key_in_a_variant_table(files: Files) -> None:
    sizes = {"widh": 64, "depth": 2, "mlp_dim": 128, "heads": 2, "kv_heads": 1, "head_dim": 32}
    files.model(paligemma_variant=sizes)
    where, parent = files.line("widh", files.json), files.line("paligemma_variant", files.json)
    message = files.refused()
    assert (
        f"{where}: model_cfg.paligemma_variant.widh: unknown key; did you mean 'model_cfg.paligemma_variant.width'?"
    ) in message
    assert f"{parent}: model_cfg.paligemma_variant.width: missing; it has no default" in message


def test_key_that_belongs_elsewhere(files: Files) -> None:
    message = files.refused("--chunk_size", "8", "--num_workers", "2")
    assert "command line: --chunk_size: unknown key; did you mean 'model_cfg.chunk_size'?" in message
    assert "command line: --num_workers: unknown key; did you mean 'data.train.num_workers'?" in message


@pytest.mark.parametrize(
    ("argument", "instead"),
    [
        ("--policy.path=lerobot/pi0_base", "policy: a key of LeRobot's; write model_cfg: !include FILE"),
        ("--dataset.repo_id=lab/one", "dataset: a key of LeRobot's; write data.train.datasets, a list with {repo_id"),
        ("--batch_size=8", "batch_size: a key of LeRobot's; that of one GPU: write per_device_batch_size: 8"),
        ("--steps=20000", "steps: a key of LeRobot's; write n_updates: 20000"),
        ("--lr=1e-4", "lr: a key of LeRobot's; write model_cfg.optimizer_lr: 1e-4"),
        ("--output_dir=out", "the run's folder is ${VLA_LOG_DIR}/<name>"),
    ],
)
def test_key_of_lerobots_training_command(files: Files, argument: str, instead: str) -> None:
    assert f"command line: --{argument[2:].partition('=')[0].partition('.')[0]}: " in files.refused(argument)
    assert instead in files.refused(argument)


def test_key_like_no_other_gets_the_list(files: Files) -> None:
    assert "--wandb.zzz: unknown key; valid keys: project, entity, mode, run_id" in files.refused("--wandb.zzz", "1")


@pytest.mark.parametrize("name", ["yaml", "json", "data"])
def test_key_given_twice(files: Files, name: str) -> None:
    file, twice = getattr(files, name), {"yaml": "wandb", "json": '"dtype"', "data": "root"}[name]
    lines = file.read_text().splitlines()
    number = next(n for n, text in enumerate(lines) if text.strip().startswith(twice))
    lines.insert(number, lines[number].replace("wandb:", "wandb: {}"))
    file.write_text("\n".join(lines))
    bare = twice.strip('"')
    assert files.refused() == f"{file}:{number + 2}: the key '{bare}' was already given in line {number + 1}"


def test_missing_keys(files: Files) -> None:
    files.edit("model_cfg: !include ../model/small.json\n", "")
    files.edit("- repo_id: lab/two\n  root", "- root", files.data)
    message = files.refused()
    assert "\n  model_cfg: missing; it has no default" in message
    where = files.line("root: /data/two", files.data)
    assert f"{where}: data.train.datasets.1.repo_id: missing; it has no default" in message
    files.yaml.write_text("")
    assert "model_cfg: missing" in files.refused()


# ── types ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("seed", "abc", "expected a whole number, got 'abc'"),
        ("seed", "1.5", "expected a whole number, got 1.5"),
        ("n_updates", "1e5", "expected a whole number, got '1e5'; write 100000"),
        ("n_updates", "300.0", "expected a whole number, got 300.0; write 300"),
        ("seed", "true", "expected a whole number, got true"),
        ("seed", "007", "expected a whole number, got '007'"),
        ("global_batch_size", "null", "expected a whole number, got nothing (null)"),
        ("max_grad_norm", "high", "expected a number, got 'high'"),
        ("max_grad_norm", "false", "expected a number, got false"),
        ("n_epochs", "nan", "expected a number, got 'nan'"),
        ("n_epochs", ".inf", "expected a number, got inf"),
        ("use_wandb", "3", "expected true or false, got 3"),
        ("use_wandb", "0", "expected true or false, got 0; write false"),
        ("use_wandb", "'True'", "expected true or false, got 'True'; write true"),
        ("use_bf16", "maybe", "expected true or false, got 'maybe'"),
        ("name", "1.10", "expected a text (in quotes), got 1.1"),
        ("name", "[a]", "expected a text, got ['a']"),
        ("eval_thresholds", "0.1", "expected a list, got 0.1; write [0.1]"),
        ("eval_thresholds", "0.1,0.2", "expected a list, got '0.1,0.2'; write [0.1, 0.2]"),
        ("data.train.datasets", "{repo_id: a}", "expected a list, got {'repo_id': 'a'}; begin each entry with `- `"),
        ("data.train.datasets", "two.yaml", "expected a list, got 'two.yaml'; write !include two.yaml"),
        ("model_cfg", "small.json", "magma, spatial-vla, octo), got 'small.json'; write !include small.json"),
        ("model_cfg", "'!include a.json'", "got '!include a.json'; take the quotes away: !include a.json"),
        ("data.train.video_backend", "decord", "'decord' is not one of torchcodec, pyav"),
        (
            "model_cfg.compile_mode",
            "max_autotune",
            "'max_autotune' is not one of default, reduce-overhead, max-autotune",
        ),
        ("eval_thresholds.1", "x", "expected a number, got 'x'"),
        ("model_cfg.optimizer_betas", "[0.9]", "expected 2 values, got 1"),
        ("model_cfg.normalization_mapping", "[a]", "expected a mapping, got ['a']"),
        ("model_cfg.normalization_mapping.STATE", "[a]", "expected a text, got ['a']"),
        ("model_cfg.paligemma_variant", "[a]", "expected a mapping with the keys width, depth"),
        ("wandb", "online", "expected a mapping with the keys project, entity, mode, run_id; got 'online'"),
        ("wandb.mode", "onlin", "'onlin' is not one of online, offline, disabled; did you mean 'online'?"),
        ("parallel", "null", "nothing (null) is not one of ddp, fsdp"),
        ("model_cfg", "null", "expected a mapping with a key 'type' (pi0, magma, spatial-vla, octo), got nothing"),
        ("model_cfg.type", "pi_0", "'pi_0' is not known; did you mean 'pi0'?"),
        (
            "model_cfg.type",
            "pi0fast",
            "'pi0fast' is π0-FAST, which predicts tokens of actions one after the other: another m",
        ),
        ("model_cfg.type", "PI0-FAST", "'PI0-FAST' is π0-FAST"),
        ("model_cfg.type", "pi05", "'pi05' is π0.5: another model, which cannot be trained here; pi0 can"),
        ("model_cfg.type", "pi0_5", "'pi0_5' is π0.5"),
        (
            "model_cfg.type",
            "smolvl",
            "'smolvl' is not known; the nearest name is that of SmolVLA: another model, which",
        ),
        ("model_cfg.type", "spatialvla", "'spatialvla' is not known; did you mean 'spatial-vla'?"),
        ("model_cfg.type", "[1]", "[1] is not known; write one of pi0, magma, spatial-vla, octo"),
    ],
)
def test_wrong_type_or_choice(files: Files, key: str, value: str, complaint: str) -> None:
    files.edit("wandb:", "eval_thresholds: [0.1, 0.2]\nwandb:")
    message = files.refused(f"--{key}={value}")
    assert f"command line: --{key}: " in message and complaint in message


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("global_batch_size", "0", "global_batch_size must be at least 1, got 0"),
        ("max_grad_norm", "-1", "max_grad_norm must not be negative, got -1.0"),
        ("n_updates", "0", "n_updates must be at least 1, got 0"),
        ("n_epochs", "0", "n_epochs must be above 0, got 0.0"),
        ("seed", "9223372036854775808", "seed must be below 2**63, got 9223372036854775808"),
        ("checkpoint_interval_minutes", "0", "checkpoint_interval_minutes must be above 0, or null for none; got 0.0"),
        ("name", "a/b", "name must be usable as a folder's name, got 'a/b'"),
        ("name", "", "name must be usable as a folder's name, got ''"),
        ("name", "..", "name must be usable as a folder's name, got '..'"),
        ("eval_thresholds", "[0.1, -0.2]", "eval_thresholds must be distances above 0, each given once"),
        ("eval_thresholds", "[0.1, 0.1]", "eval_thresholds must be distances above 0, each given once"),
        ("data.val.fraction", "1.5", "data.val.fraction must be at least 0 and below 1, got 1.5"),
        ("data.train.num_workers", "-1", "data.train.num_workers must be at least 0, got -1"),
        (
            "data.train.datasets.1.weight",
            "0",
            "data.train.datasets.1.weight of data set lab/two must be above 0, got 0.0",
        ),
        (
            "eval_cfg.tasks",
            "[reach-v4]",
            "eval_cfg.tasks: Meta-World has no task 'reach-v4'; the nearest name is reach-v3",
        ),
        ("eval_size", "0", "eval_size must be at least 1; eval_freq: 0 turns validation off"),
        ("model_cfg.chunk_size", "0", "model_cfg.chunk_size: 0 is not positive; write at least 1"),
        ("model_cfg.dtype", "float16", "model_cfg.dtype: unknown 'float16'; write float32 or bfloat16"),
    ],
)
def test_value_out_of_range(files: Files, key: str, value: str, complaint: str) -> None:
    assert files.refused(f"--{key}={value}").startswith(f"{files.yaml} cannot be used: command line: --{complaint}")


def test_value_out_of_range_in_the_json(files: Files) -> None:
    files.model(chunk_size=0)
    assert f"{files.line('chunk_size', files.json)}: model_cfg.chunk_size: 0 is not positive" in files.refused()
    files.model(optimizer_grad_clip_norm=-1)
    assert "model_cfg.optimizer_grad_clip_norm: -1.0 is negative; write 0 or more" in files.refused()


def test_all_mistakes_in_one_message(files: Files) -> None:
    files.edit("global_batch_size: 24", "global_batch_sise: 24\nseed: x")
    files.edit("lab/two", "lab/two\n  weihgt: 2", files.data)
    files.edit("${DATA_HOME:-/nowhere}", "${DATA_HOME}", files.data)
    files.model(chunk_size="many")
    message = files.refused("--use_wandb", "perhaps")
    for key in ("data.train.datasets.0.root", "data.train.datasets.1.weihgt", "global_batch_sise", "seed", "use_wandb"):
        assert len(re.findall(rf"(?::\d+: |--){re.escape(key)}: ", message)) == 1, key
    assert "model_cfg.chunk_size: expected a whole number, got 'many'" in message
    assert message.count("\n") == 6


def test_mistakes_between_keys_come_in_one_message_too(files: Files) -> None:
    message = files.refused("--global_batch_size", "25", "--data.train.datasets", "[]", "--wandb.mode", "online")
    assert message.count("\n") == 3
    for part in ("global_batch_size 25 is not", "data.train.datasets is empty; list at least one", "no wandb key"):
        assert part in message


# ── files ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_missing_config_file(files: Files) -> None:
    wrong = files.yaml.with_name("smal.yaml")
    with pytest.raises(ConfigError, match=f"^there is no config file {wrong}; did you mean {files.yaml}\\?$"):
        load_config(wrong, [], 1)
    with pytest.raises(ConfigError, match="^there is no config file /no/such/folder/x.yaml$"):
        load_config("/no/such/folder/x.yaml", [], 1)


def test_missing_include(files: Files) -> None:
    files.edit("small.json", "smal.json")
    message = files.refused()
    assert message.startswith(f"{files.line('smal.json')}: !include ../model/smal.json: there is no file")
    assert f"{files.json.with_name('smal.json')}; did you mean {files.json}?" in message
    assert "relative to the file that includes them" in message


def test_unset_variable_in_an_include(files: Files) -> None:
    files.edit("../model/small.json", "${MODELS}/small.json")
    assert "uses the environment variable MODELS, which is not set" in files.refused()


def test_files_as_windows_writes_them(files: Files) -> None:
    for file in (files.yaml, files.json, files.data):
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
    assert files.load().model_cfg.chunk_size == 6
    files.edit("chunk_size", "chunk_sise", files.json)
    assert f"{files.line('chunk_sise', files.json)}: model_cfg.chunk_sise: unknown key" in files.refused()


def test_a_long_value_is_not_shown_whole(files: Files) -> None:
    files.edit("!include ../data/two.yaml", "!include ../model/small.json")
    assert (
        "expected a list, got a mapping with the keys type, chunk_size, dtype, optimizer_lr, …; begin"
        in files.refused()
    )


def test_circular_include(files: Files) -> None:
    files.data.write_text("- !include ../data/../data/two.yaml\n")
    message = files.refused()
    assert message == f"{files.data}:1: !include ../data/../data/two.yaml: {files.data} includes itself"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("a: {b: 1\nc: 2", "is not valid YAML: while parsing a flow mapping"),
        ("a: !python x", ":1: !python is not a tag that is known; the only one is !include"),
        ("a: !inclde ../model/small.json", ":1: !inclde is not a tag that is known; did you mean !include?"),
        ("a: !include ../model", "/config/model is a folder (includes are relative"),
        ("a: 1\n---\nb: 2", "is not valid YAML: expected a single document"),
        ("- a", "expected a mapping of keys to values at the top"),
        ("? [a, b]\n: 3", ":1: a list or mapping cannot be a key"),
        ("model_cfg: !include [a]", ":1: !include: expected one file name"),
        ("<<: !include ../data/two.yaml", "expected included node to be mapping for merging"),
    ],
)
def test_unreadable_yaml(files: Files, text: str, complaint: str) -> None:
    files.yaml.write_text(text)
    message = files.refused()
    assert message.startswith(str(files.yaml)) and complaint in message


def test_unreadable_files_are_named(files: Files) -> None:
    files.json.write_text('{"type": "pi0",}')
    assert files.refused().startswith(f"{files.json} is not valid JSON: ")
    files.json.write_bytes(b'{"type": "\xff"}')
    assert files.refused().startswith(f"{files.json} cannot be read as a config file: ")
    with pytest.raises(ConfigError, match=f"^{files.folder} cannot be read as a config file: "):
        load_config(files.folder, [], 1)


def test_model_config_instead_of_a_training_config(files: Files) -> None:
    with pytest.raises(ConfigError, match=f"^{files.json} is a model config; --config_path takes a training config"):
        load_config(files.json, [], 1)


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


# ── batches, processes, devices ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("batch", "per_device", "world"), [(33, 16, 1), (8, 16, 1), (100, 8, 3), (1000, 32, 4), (7, 3, 2), (1024, 100, 4)]
)
def test_batches_that_are_named_do_divide(files: Files, batch: int, per_device: int, world: int) -> None:
    def loads(batch: int, per_device: int) -> bool:
        arguments = ["--global_batch_size", str(batch), "--per_device_batch_size", str(per_device)]
        config = files.load(*arguments, world=world)
        return make_plan(config, world, 1000).accumulation_steps * per_device * world == batch

    message = files.refused("--global_batch_size", str(batch), "--per_device_batch_size", str(per_device), world=world)
    product = f"{per_device} × {world} = {per_device * world}"
    assert f"global_batch_size {batch} is not a multiple of per_device_batch_size × processes = {product}" in message
    named = re.search(r"write global_batch_size: (\d+)(?: or (\d+))?(?:, or per_device_batch_size: (\d+))?", message)
    assert named is not None
    globals_named = [int(number) for number in named.groups()[:2] if number]
    assert all(loads(number, per_device) for number in globals_named)
    # They are the nearest: none lies between them, and the asked one does.
    assert min(abs(number - batch) for number in globals_named) < per_device * world or batch < per_device * world
    if named[3]:
        assert loads(batch, int(named[3]))


def test_the_plan(files: Files) -> None:
    config = files.load("--n_epochs", "1.5", world=3)
    plan = make_plan(config, 3, train_frames=100)
    assert (plan.accumulation_steps, plan.n_updates) == (2, 7)  # 24 = 4 × 3 × 2; 150 samples / 24 = 6.25
    assert "24 = 4 per device × 3 processes × 2 accumulation steps; 100 training frames" in plan.describe(config)
    assert make_plan(replace(config, n_updates=5), 3, 100).n_updates == 5
    # 15 · (800 / 96) is 125.00000000000001 in floating point.
    assert make_plan(replace(config, n_epochs=15, global_batch_size=96), 3, 800).n_updates == 125


def test_local_rank_without_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_launch() == Launch()
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ValueError, match="LOCAL_RANK set but RANK, WORLD_SIZE.* not: .*Start with `torchrun"):
        read_launch()


def test_several_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in zip(TORCHRUN, ("5", "1", "8", "4", "localhost", "29500"), strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="8 processes on several nodes; one node is supported: --nnodes=1"):
        read_launch()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert read_launch() == Launch(5, 1, 8, 8, under_torchrun=True)


def test_more_gpus_asked_for_than_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="4 processes were started but 2 GPUs are visible; write --nproc_per_node=2"):
        choose_device(Launch(0, 0, 4, 4, under_torchrun=True), None)
    assert choose_device(Launch(0, 0, 4, 4, under_torchrun=True), "cpu").type == "cpu"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert choose_device(Launch(), None).type == "cpu"
    with pytest.raises(ValueError, match="model_cfg.device is cuda, but no GPU is visible"):
        choose_device(Launch(), "cuda")
    with pytest.raises(ValueError, match="model_cfg.device: 'tpu' is not supported; write cuda, cpu or null"):
        choose_device(Launch(), "tpu")


@pytest.mark.parametrize(
    ("given", "warned"),
    [("0,1", True), ("GPU-8f1c", True), ("MIG-77aa", True), ("", False), ("-1", False), ("NoDevFiles", False)],
)
def test_gpus_that_were_given_and_cannot_be_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, given: str, warned: bool
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)  # as with a driver that does not answer
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    assert choose_device(Launch(), "cpu").type == "cpu" and not caplog.records
    assert choose_device(Launch(), None).type == "cpu"
    assert [f"CUDA_VISIBLE_DEVICES={given} gives this run GPUs" in r.getMessage() for r in caplog.records] == [
        True
    ] * warned
    with pytest.raises(ValueError, match="no GPU is visible"):
        choose_device(Launch(), "cuda")


# ── wandb ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_wandb_online_needs_a_key(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    message = files.refused("--wandb.mode", "online")
    assert "wandb.mode is online but there is no wandb key for api.wandb.ai: run `wandb login`" in message
    assert "write wandb.mode: offline, or use_wandb: false" in message
    for arguments in (("--use_wandb", "false"), ("--wandb.mode", "disabled"), ("--debug",)):
        files.load("--wandb.mode", "online", *arguments)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    files.load("--wandb.mode", "online")


def test_wandb_key_in_netrc(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    netrc = Path(os.environ["NETRC"])
    netrc.write_text("machine api.wandb.ai\n  login user\n  password key\n")
    netrc.chmod(0o600)
    files.load("--wandb.mode", "online")
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert "no wandb key for wandb.example.org" in files.refused("--wandb.mode", "online")


# ── placeholders ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("type_", ["magma", "octo", "spatial-vla"])
def test_a_placeholder_of_another_tool(files: Files, type_: str) -> None:
    """INT-ACT's own files have keys of LeRobot's base of all policies, and may have more."""
    theirs = {
        "type": type_,
        "n_obs_steps": 2,
        "device": "cpu",
        "use_amp": True,
        "chunk_size": 4,
        "action_ensemble_temp": -0.8,
    }
    (files.json.parent / "theirs.json").write_text(json.dumps(theirs))
    files.edit("small.json", "theirs.json")
    message = files.refused()
    assert f"model type '{type_}' is a placeholder, its config loads but it cannot be trained" in message
    assert "unknown key" not in message and "\n" not in message


def test_every_policy_of_lerobot_is_told_apart() -> None:
    """LeRobot's own names, whatever version is installed: none of them is offered another model's name."""
    import lerobot.policies
    import lerobot.rewards

    from agent.settings.other_models import unknown_type

    registered = re.compile(r'Config\.register_subclass\((?:name=)?"(\w+)"\)')
    files = [
        path
        for room in (lerobot.policies, lerobot.rewards)
        for path in Path(room.__path__[0]).rglob("configuration_*.py")
    ]
    names = {name for path in files for name in registered.findall(path.read_text(encoding="utf-8"))}
    assert len(names) > 20 and "pi0_fast" in names
    for name in names - {"pi0"}:
        assert "another model, which cannot be trained here; pi0 can" in unknown_type(name, ["pi0", "magma"]), name


@pytest.mark.parametrize(("name", "type_"), [("magma", "magma"), ("spatialvla", "spatial-vla"), ("octo", "octo")])
def test_placeholder(files: Files, name: str, type_: str) -> None:
    import draccus

    from agent.models.base import ModelConfig

    shipped = ROOT / "config" / "model" / f"{name}.json"
    content = json.loads(shipped.read_text())
    config = draccus.decode(ModelConfig, content)
    assert (config.type, config.chunk_size) == (type_, content["chunk_size"])
    files.edit("../model/small.json", str(shipped))
    message = files.refused()
    assert "\n" not in message
    assert (
        f"model type '{type_}' is a placeholder, its config loads but it cannot be trained; trainable: pi0" in message
    )


# ── training YAML and model JSON ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("key", "model_key", "in_json", "value", "in_yaml", "becomes"),
    [
        ("max_grad_norm", "optimizer_grad_clip_norm", 0.5, 0.5, 2.0, 2.0),
        ("freeze_vlm", "train_expert_only", True, True, False, False),
        ("use_bf16", "dtype", "bfloat16", True, False, "float32"),
        ("use_torch_compile", "compile_model", True, True, False, False),
        ("freeze_lm_head", "freeze_lm_head", True, True, False, False),
        ("activation_checkpointing", "gradient_checkpointing", True, "full", "none", False),
    ],
)
def test_yaml_wins_over_the_model_json(
    files: Files, key: str, model_key: str, in_json: Any, value: Any, in_yaml: Any, becomes: Any
) -> None:
    files.model(**{model_key: in_json})
    config, notes = load_config(files.yaml, [], 1)
    assert getattr(config, key) == value
    assert values(config)["model_cfg"][model_key] == in_json
    assert notes == []

    files.edit("wandb:", f"{key}: {json.dumps(in_yaml)}\nwandb:")
    config, notes = load_config(files.yaml, [], 1)
    assert getattr(config, key) == in_yaml
    assert values(config)["model_cfg"][model_key] == becomes
    assert notes == [f"{key}: {in_yaml} of the training config wins over {model_key}: {in_json} of the model config"]
    assert reconcile(config) == []  # nothing is left to say


def test_both_agree(files: Files) -> None:
    assert files.notes("--max_grad_norm", "0.5", "--use_bf16", "true") == []


def test_pretrained_path_of_the_model_json(files: Files) -> None:
    files.model(pretrained_path="lerobot/pi0_base", pretrained_revision="v2")
    assert files.load().load_from_checkpoint == "lerobot/pi0_base@v2"
    assert files.notes() == ["load_from_checkpoint: lerobot/pi0_base@v2, from the model config's pretrained_path"]
    assert files.load("--load_from_checkpoint", "mine").load_from_checkpoint == "mine"
    wins = "load_from_checkpoint: mine of the training config wins over {} of the model config"
    assert files.notes("--load_from_checkpoint", "mine") == [wins.format("pretrained_path: lerobot/pi0_base@v2")]
    assert files.notes("--load_from_checkpoint", "lerobot/pi0_base@v2") == []
    files.model(paligemma_pretrained_path="google/paligemma")
    assert files.notes() == []
    assert files.notes("--load_from_checkpoint", "mine") == [wins.format("paligemma_pretrained_path: google/paligemma")]


def test_debug(files: Files) -> None:
    config = files.load("--debug")
    assert (config.use_wandb, config.data.train.num_workers) == (False, 0)
    assert files.notes("--debug") == ["debug: true turns wandb and loader workers off"]


# ── saving and resuming ─────────────────────────────────────────────────────────────────────────────────────────


def test_dump_loads_again(files: Files) -> None:
    config = files.load("--seed", "5", "--model_cfg.optimizer_lr", "3e-7", "--name", "007")
    saved = files.write("elsewhere/config.yaml", dump_yaml(config))
    again, notes = load_config(saved, [], 1)
    assert again == config
    assert notes == []
    assert changes_since(yaml.safe_load(saved.read_text()), dump(again)) == []


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--seed", "1"], "seed: 42 → 1"),
        (["--global_batch_size", "48"], "global_batch_size: 24 → 48"),
        (["--n_updates", "9"], "n_updates: None → 9"),
        (["--max_grad_norm", "2"], "max_grad_norm: 0.5 → 2.0"),
        (["--model_cfg.optimizer_lr", "1"], "model_cfg.optimizer_lr: 5e-05 → 1.0"),
        (["--model_cfg.chunk_size", "5"], "model_cfg.chunk_size: 6 → 5"),
        (["--data.train.datasets.1.weight", "3"], "data.train.datasets.1.weight: 2.0 → 3.0"),
        (["--data.val.fraction", "0.5"], "data.val.fraction: 0.05 → 0.5"),
    ],
)
def test_changes_that_a_resume_refuses(files: Files, arguments: list[str], line: str) -> None:
    assert line in changes_since(dump(files.load()), dump(files.load(*arguments)))


def test_another_number_of_data_sets_is_a_change(files: Files) -> None:
    one = '[{"repo_id": "lab/one"}]'
    (line,) = changes_since(dump(files.load()), dump(files.load("--data.train.datasets", one)))
    assert line.startswith("data.train.datasets: [{'repo_id': 'lab/one'")


def test_keys_that_are_newer_than_the_checkpoint_are_no_changes(files: Files, tmp_path: Path) -> None:
    config = files.load()
    saved = dump(config)
    # As a version wrote it that did not know these: of the run, of a part, of the model and of a data set.
    del saved["seed"], saved["data"]["statistics"], saved["model_cfg"]["relative_exclude_joints"]
    del saved["data"]["train"]["datasets"][0]["state"]
    (tmp_path / "training_state").mkdir()
    (tmp_path / "training_state" / "config.yaml").write_text(yaml.safe_dump(saved))
    (tmp_path / "training_state" / "state.json").write_text('{"data_fingerprint": "x"}')

    def data(fingerprint: str) -> Any:
        reader, spec = SimpleNamespace(sources=[]), SimpleNamespace(image_resolution=(32, 32))
        return SimpleNamespace(fingerprint=fingerprint, fingerprint_if=lambda _: fingerprint, reader=reader, spec=spec)

    assert changes_since_checkpoint(tmp_path, config, data("x")) == []
    changed = files.load("--model_cfg.relative_exclude_joints", '["a"]')
    assert changes_since_checkpoint(tmp_path, changed, data("y")) == [
        "model_cfg.relative_exclude_joints.0: gripper → a",
        "the training data itself (states, actions, episodes or instructions as tokens): fingerprint x → y",
    ]


@pytest.mark.parametrize("then", [None, "first_update", "after_warmup"])
def test_a_run_under_way_keeps_the_form_of_its_schedule(files: Files, tmp_path: Path, then: str | None) -> None:
    saved = dump(files.load())
    saved["model_cfg"]["scheduler_decay_start"] = then
    if then is None:  # as the code before wrote it
        del saved["model_cfg"]["scheduler_decay_start"]
    (tmp_path / "training_state").mkdir()
    (tmp_path / "training_state" / "config.yaml").write_text(yaml.safe_dump(saved))
    (tmp_path / "training_state" / "state.json").write_text('{"data_fingerprint": "x"}')
    kept = then or "first_update"
    config = files.load()
    assert changes_since_checkpoint(tmp_path, config, None) == []
    lines = settle(config, tmp_path)
    assert dump(config)["model_cfg"]["scheduler_decay_start"] == kept
    assert lines == (
        []
        if kept == "after_warmup"
        else [
            "model_cfg.scheduler_decay_start: first_update, with which this run began; one that begins now has after_warmup"
        ]
    )
    assert settle(config, None) == [] and changes_since_checkpoint(tmp_path, config, None) == []
    # What the config says itself is another matter.
    for start in ("first_update", "after_warmup"):
        stated = files.load("--model_cfg.scheduler_decay_start", start)
        changes = [] if start == kept else [f"model_cfg.scheduler_decay_start: {kept} → {start}"]
        assert settle(stated, tmp_path) == [] and changes_since_checkpoint(tmp_path, stated, None) == changes


@pytest.mark.parametrize(
    "arguments",
    [
        ["--per_device_batch_size", "2"],
        ["--data.train.num_workers", "1"],
        [
            "--log_freq",
            "1",
            "--save_model_freq",
            "2",
            "--eval_freq",
            "3",
            "--eval_size",
            "4",
            "--keep_checkpoints",
            "5",
        ],
        ["--wandb.project", "x", "--use_wandb", "false"],
        ["--use_torch_compile", "true"],
        ["--model_cfg.gradient_checkpointing", "true", "--model_cfg.device", "cpu"],
        ["--load_from_checkpoint", "x", "--name", "y", "--resume_changes", "--deterministic"],
    ],
)
def test_changes_that_a_resume_allows(files: Files, arguments: list[str]) -> None:
    before, after = dump(files.load()), dump(files.load(*arguments))
    assert before != after
    assert changes_since(before, after) == []


# ── run.py as a process ─────────────────────────────────────────────────────────────────────────────────────────


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "src" / "agent" / "run.py"), *arguments]
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
    command = f"set -o pipefail; {sys.executable} {ROOT}/src/agent/run.py --help | true"
    process = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (process.returncode, process.stderr) == (0, "")
