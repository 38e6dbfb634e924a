"""Keys, types, values and their combinations: the message for every mistake.

Run: uv run pytest tests/settings/test_checks.py
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
from support.config_files import MODEL, Files

from agent.settings.plan import make_plan

# ── keys ────────────────────────────────────────────────────────────────────────────────────────────────────────


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


# ── batches ─────────────────────────────────────────────────────────────────────────────────────────────────────


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
