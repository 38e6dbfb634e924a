"""A small training config in three files, which a test changes and loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from agent.configuration_pipeline import TrainPipelineConfig, load_config
from agent.settings.files import ConfigError

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


def use_no_settings_of_this_machine(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """No wandb key, no home folder and no place for runs but those in ``folder``."""
    home = folder / "home"
    home.mkdir()
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("NETRC", str(home / "netrc"))
    monkeypatch.setenv("VLA_LOG_DIR", str(folder / "runs"))
