"""YAML files, the JSON and lists that they include, and variables: what becomes of them in a config.

Run: uv run pytest tests/settings/test_reading.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.config_files import Files
from support.launching import REPOSITORY

from agent.configuration_pipeline import dump, dump_yaml, load_config, reconcile
from agent.settings.files import ConfigError
from agent.training.config_changes import changes_since

# ── precedence, includes, variables ─────────────────────────────────────────────────────────────────────────────


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
    assert dump(config)["model_cfg"]["chunk_size"] == 6


@pytest.mark.parametrize("written", ["{<<: !include ../model/small.json, chunk_size: 8}", "block"])
def test_merged_include_with_changes(files: Files, written: str) -> None:
    if written == "block":
        written = "\n  chunk_size: 8\n  <<: !include ../model/small.json"
    files.edit("!include ../model/small.json", written)
    model = dump(files.load())["model_cfg"]
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


def test_variable_without_braces(files: Files) -> None:
    files.edit("/data/two", "$DATA_HOME/two", files.data)
    where = files.line("$DATA_HOME/two", files.data)
    wanted = (
        f"{where}: data.train.datasets.1.root: '$DATA_HOME/two' has a variable without braces; write ${{DATA_HOME}}"
    )
    assert wanted in files.refused()
    files.edit("$DATA_HOME/two", "/data/two$", files.data)
    assert files.load().data.train.datasets[1].root == "/data/two$"


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

    from agent.models.other_models import unknown_type

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

    shipped = REPOSITORY / "config" / "model" / f"{name}.json"
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
    assert dump(config)["model_cfg"][model_key] == in_json
    assert notes == []

    files.edit("wandb:", f"{key}: {json.dumps(in_yaml)}\nwandb:")
    config, notes = load_config(files.yaml, [], 1)
    assert getattr(config, key) == in_yaml
    assert dump(config)["model_cfg"][model_key] == becomes
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


def test_dump_loads_again(files: Files) -> None:
    config = files.load("--seed", "5", "--model_cfg.optimizer_lr", "3e-7", "--name", "007")
    saved = files.write("elsewhere/config.yaml", dump_yaml(config))
    again, notes = load_config(saved, [], 1)
    assert again == config
    assert notes == []
    assert changes_since(yaml.safe_load(saved.read_text()), again) == []
