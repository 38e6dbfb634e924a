"""The model JSON that LeRobot wrote for π0 in 2025, and a training config that includes it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from agent.configuration_pipeline import load_config
from agent.settings.files import ConfigError

# What the config.json of the first lerobot/pi0 holds, and the file of a fine-tuning of 2025 derived from it.
V1 = {
    "type": "pi0",
    "n_obs_steps": 1,
    "normalization_mapping": {"VISUAL": "IDENTITY", "STATE": "MEAN_STD", "ACTION": "MEAN_STD"},
    "input_features": {
        "observation.images.top": {"type": "VISUAL", "shape": [3, 224, 224]},
        "observation.state": {"shape": [7], "type": "STATE"},
    },
    "output_features": {"action": {"type": "ACTION", "shape": [7]}},
    "device": "cuda",
    "use_amp": False,
    "chunk_size": 50,
    "n_action_steps": 50,
    "max_state_dim": 32,
    "max_action_dim": 32,
    "resize_imgs_with_padding": [224, 224],
    "empty_cameras": 0,
    "adapt_to_pi_aloha": False,
    "use_delta_joint_actions_aloha": False,
    "tokenizer_max_length": 48,
    "proj_width": 1024,
    "num_steps": 10,
    "use_cache": True,
    "attention_implementation": "eager",
    "freeze_vision_encoder": True,
    "train_expert_only": False,
    "train_state_proj": True,
    "paligemma_pretrained_path": None,
    "optimizer_lr": 2.5e-05,
    "optimizer_betas": [0.9, 0.95],
    "optimizer_eps": 1e-08,
    "optimizer_weight_decay": 1e-10,
    "scheduler_warmup_steps": 1000,
    "scheduler_decay_steps": 30000,
    "scheduler_decay_lr": 2.5e-06,
}
ONLY_THEN = {
    "resize_imgs_with_padding", "num_steps", "proj_width", "attention_implementation", "use_cache", "train_state_proj",
    "adapt_to_pi_aloha", "use_delta_joint_actions_aloha",
}  # fmt: skip
TRAIN = """\
model_cfg: !include ../model/v1.json
data:
  train:
    datasets: [{repo_id: lab/one}]
use_wandb: false
"""


class Files:
    """config/train/x.yaml and config/model/v1.json, to be changed by a test."""

    def __init__(self, folder: Path) -> None:
        self.yaml, self.json = folder / "train" / "x.yaml", folder / "model" / "v1.json"
        for file in (self.yaml, self.json):
            file.parent.mkdir(parents=True)
        self.yaml.write_text(TRAIN, encoding="utf-8")
        self.model()

    def model(self, *without: str, **changes: Any) -> None:
        values = {key: value for key, value in (V1 | changes).items() if key not in without}
        self.json.write_text(json.dumps(values, indent=2), encoding="utf-8")

    def line(self, key: str, file: Path | None = None) -> str:
        """``file:line`` of a key."""
        file = file or self.json
        lines = file.read_text(encoding="utf-8").splitlines()
        (number,) = (n for n, text in enumerate(lines, start=1) if re.search(rf'^\s*"?{key}"?:', text))
        return f"{file}:{number}"

    def load(self, *arguments: str) -> Any:
        return load_config(self.yaml, list(arguments), 1)[0]

    def read(self, *arguments: str) -> Any:
        return self.load(*arguments).model_cfg

    def refused(self, *arguments: str) -> str:
        with pytest.raises(ConfigError) as error:
            self.load(*arguments)
        return str(error.value)
