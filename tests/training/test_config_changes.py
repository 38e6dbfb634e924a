"""Which changes of a config a resume refuses, and which it takes.

Run: uv run pytest tests/training/test_config_changes.py
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from support.config_files import Files, use_no_settings_of_this_machine

from agent.configuration_pipeline import dump
from agent.training.config_changes import changes_since, changes_since_checkpoint, settle


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Files:
    use_no_settings_of_this_machine(monkeypatch, tmp_path)
    return Files(tmp_path / "config")


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
    assert line in changes_since(dump(files.load()), files.load(*arguments))


def test_another_number_of_data_sets_is_a_change(files: Files) -> None:
    one = '[{"repo_id": "lab/one"}]'
    (line,) = changes_since(dump(files.load()), files.load("--data.train.datasets", one))
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
    before, after = dump(files.load()), files.load(*arguments)
    assert before != dump(after)
    assert changes_since(before, after) == []
