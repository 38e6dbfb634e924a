"""Every config in config/train loads, says what it should, and its model builds.

Run: uv run pytest tests/settings/test_shipped_configs.py      (half a minute; large models are built without memory)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from agent.configuration_pipeline import TrainPipelineConfig, load_config
from agent.models import registry
from agent.settings.plan import make_plan

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ROOT / "config" / "train"
STEMS = sorted(path.stem for path in TRAIN.glob("*.yaml"))
SMALL = ["pi0_demo", "pi0_metaworld"]
LARGE = [stem for stem in STEMS if stem not in SMALL]
FULL_MODEL = 3_238_048_528  # PaliGemma 3B, whose head is tied, and the 300M expert with its projections


@dataclass
class Shipped:
    """One shipped config, as it loads on a node of four GPUs."""

    config: TrainPipelineConfig
    notes: list[str]
    model: Any


def shipped(stem: str, monkeypatch: pytest.MonkeyPatch) -> Shipped:
    monkeypatch.setenv("VLA_DATA_DIR", "/data")
    for name in ("VLA_BRIDGE_REPO", "VLA_FRACTAL_REPO"):
        monkeypatch.delenv(name, raising=False)
    world = 1 if stem in SMALL else 4
    config, notes = load_config(TRAIN / f"{stem}.yaml", ["--wandb.mode", "offline"], world)
    return Shipped(config, notes, config.model_cfg)


def build(model: Any) -> Any:
    import torch

    with torch.device("meta"):
        return registry.family(model).policy(model)


@pytest.mark.parametrize("stem", STEMS)
def test_loads_and_overrides_of_its_model_json_what_it_means_to(stem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = shipped(stem, monkeypatch)
    assert found.config.name == stem
    overridden = {"use_bf16: True", "freeze_lm_head: True"} if stem in LARGE else set()
    if stem.endswith("freeze_vlm"):
        overridden.add("freeze_vlm: True")
    assert {note.partition(" of the training config wins")[0] for note in found.notes} == overridden


@pytest.mark.parametrize("stem", LARGE)
def test_numbers_of_the_large_configs(stem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = shipped(stem, monkeypatch)
    config, model = found.config, found.model
    fractal = "fractal" in stem
    assert (config.global_batch_size, config.per_device_batch_size) == (1024, 32)
    assert make_plan(config, 4, 1_000_000).accumulation_steps == 8
    assert (config.n_epochs, config.n_updates) == (10 if fractal else 15, None)
    assert (config.use_bf16, config.max_grad_norm) == (True, 1.0)
    assert (model.chunk_size, model.action_steps, model.tokenizer_max_length) == (4, 4, 72)
    assert tuple(model.image_resolution) == (224, 224)
    assert (model.state_dim, model.max_state_dim) == (8 if fractal else 7, 32)
    assert (model.action_dim, model.max_action_dim) == (7, 32)
    assert (model.optimizer_lr, tuple(model.optimizer_betas)) == (5e-5, (0.9, 0.999))
    assert (model.optimizer_weight_decay, model.scheduler_warmup_steps) == (0.0, 200)
    assert model.scheduler_decay_steps is None  # the decay ends at the run's last update
    assert (config.wandb.project, config.data.train.num_workers) == ("pi0-fractal" if fractal else "pi0-bridge", 8)


@pytest.mark.parametrize("stem", LARGE)
def test_where_the_large_configs_start(stem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = shipped(stem, monkeypatch)
    fine_tune = "finetune" in stem
    assert found.config.load_from_checkpoint == ("lerobot/pi0_base" if fine_tune else None)
    assert found.model.paligemma_pretrained_path == (None if fine_tune else "google/paligemma-3b-pt-224")
    assert found.config.freeze_vlm is stem.endswith("freeze_vlm")
    assert found.model.train_expert_only is stem.endswith("freeze_vlm")
    paraphrases = "/data/bridge_paraphrases.json" if stem.endswith("paraphrase") else None
    assert found.config.task_paraphrase == paraphrases


@pytest.mark.parametrize("stem", LARGE)
def test_data_of_the_large_configs(stem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = shipped(stem, monkeypatch)
    (dataset,) = found.config.data.train.datasets
    folder = "fractal20220817_data_lerobot" if "fractal" in stem else "bridge_orig_lerobot"
    assert (dataset.repo_id, dataset.root) == (f"IPEC-COMMUNITY/{folder}", f"/data/{folder}")
    assert list(dataset.cameras or {}) == found.model.camera_slots
    assert 0 < found.config.data.val.fraction < 0.1


def test_the_two_fine_tunings_differ_in_the_paraphrases_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    one = shipped("pi0_finetune_bridge", monkeypatch).config
    other = shipped("pi0_finetune_bridge_paraphrase", monkeypatch).config
    assert one != other
    other.name, other.task_paraphrase = one.name, one.task_paraphrase
    assert one == other


@pytest.mark.parametrize("stem", LARGE)
def test_large_models_build(stem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = build(shipped(stem, monkeypatch).model)
    sizes = {name: parameter.numel() for name, parameter in policy.named_parameters()}
    assert sum(sizes.values()) == FULL_MODEL
    trained = sum(size for name, size in sizes.items() if name not in policy.frozen_parameters())
    # The expert with its projections is a tenth; otherwise all but the embedding and what the loss never reaches.
    wanted = (0.3e9, 0.33e9) if stem.endswith("freeze_vlm") else (2.5e9, 2.7e9)
    assert wanted[0] < trained < wanted[1]


def test_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    found = shipped("pi0_demo", monkeypatch)
    assert found.notes == []
    assert (found.config.use_bf16, found.model.dtype) == (False, "float32")
    policy = build(found.model)
    assert 1e6 < sum(parameter.numel() for parameter in policy.parameters()) < 1e7
    # As it is written, not only under this test: no key, no network, nothing outside the repository.
    monkeypatch.setenv("WANDB_API_KEY", "")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("NETRC", "/nonexistent")
    config, _ = load_config(TRAIN / "pi0_demo.yaml", [], 1)
    assert (config.use_wandb, config.wandb.mode) == (True, "offline")
    for path in (config.data.train.datasets[0].root, found.model.tokenizer_path):
        assert (ROOT / path).is_dir()
    # One process or two, the same global batch.
    assert [make_plan(config, world, 1000).accumulation_steps for world in (1, 2)] == [2, 1]


def test_every_model_and_data_config_is_used() -> None:
    texts = "".join(path.read_text() for path in TRAIN.glob("*.yaml"))
    placeholders = {"magma.json", "spatialvla.json", "octo.json"}
    for folder in ("model", "data"):
        for path in (ROOT / "config" / folder).iterdir():
            assert f"!include ../{folder}/{path.name}" in texts or path.name in placeholders, path


def test_the_simulation_config_fits_the_simulator(monkeypatch: pytest.MonkeyPatch) -> None:
    found = shipped("pi0_metaworld", monkeypatch)
    config, model = found.config, found.model
    assert model.camera_slots == ["observation.image"] and (model.state_dim, model.action_dim) == (4, 4)
    assert model.input_features["observation.image"].shape == [3, 128, 128]  # what scripts/record_metaworld.py renders
    assert config.eval_cfg is not None and config.eval_cfg.start == "by_hand"
    assert config.eval_cfg.tasks == ["reach-v3", "button-press-topdown-v3"]
    assert (TRAIN.parents[1] / config.eval_cfg.script).is_file()
    chosen = {step for step in range(1, config.n_updates + 1) if step % config.eval_cfg.every == 0}
    kept = {step for step in range(0, config.n_updates + 1, config.save_model_freq) if step}
    assert chosen <= kept and len(kept) <= config.keep_checkpoints
