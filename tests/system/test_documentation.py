"""The documentation says what the code does, and the repository names nobody's machine.

Run: uv run pytest tests/system/test_documentation.py      (seconds)
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.configuration_pipeline import TrainPipelineConfig, dump, load_config
from agent.describe_config import entries
from agent.models.base import ModelConfig

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "demo" / "README.md", *(ROOT / "docs").glob("*.md")])
FOLDERS = "benchmarks|config|demo|docs|log|scripts|slurms|src|tests"
MODELS = list(ModelConfig.get_known_choices().values())


def committed() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [path for name in listed.split("\0") if name and (path := ROOT / name).is_file()]


def test_configuration_page_is_current() -> None:
    # A process of its own, because tests in this one register further families.
    command = [sys.executable, "-X", "utf8", "-m", "agent.describe_config"]
    described = subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert page == described, "run: uv run python -m agent.describe_config > docs/configuration.md"


@pytest.mark.parametrize("kind", [TrainPipelineConfig, *MODELS], ids=lambda kind: kind.__name__)
def test_every_key_is_explained(kind: Any) -> None:
    assert [entry.name for entry in entries(kind) if not entry.text] == []


def test_every_key_of_a_run_is_on_the_page() -> None:
    def keys(value: Any, path: str = "") -> Iterator[str]:
        for key, item in value.items():
            yield f"{path}{key}"
            if isinstance(item, dict) and key not in ("cameras", "normalization_mapping", *features):
                yield from keys(item, f"{path}{key}.")
            elif isinstance(item, list) and item and isinstance(item[0], dict):
                yield from keys(item[0], f"{path}{key}.N.")

    features = ("input_features", "output_features")
    config, _ = load_config(ROOT / "config" / "train" / "pi0_demo.yaml", ["--use_wandb", "false"], 1)
    used = {key.removeprefix("model_cfg.") for key in keys(dump(config))} - {"type"}
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| `([\w.]+)` \|", page, flags=re.MULTILINE))
    assert {"data.train.datasets.N.root", "paligemma_variant.width", "wandb.mode"} <= used
    assert used - listed == set()
    assert {"input_features.NAME.shape", "data.train.datasets.N.augmentation.cameras.NAME.hue"} <= listed


def test_the_demo_on_the_first_page_is_ahead_of_every_baseline() -> None:
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    config, _ = load_config(ROOT / "config" / "train" / "pi0_demo.yaml", ["--use_wandb", "false"], 1)
    assert f"update {config.n_updates}/{config.n_updates} " in page  # the numbers are of the demo as it is shipped
    errors = {key: float(value) for key, value in re.findall(r"val/(action|baseline_\w+?)_l1 ([\d.]+)", page)}
    assert {"action", "baseline_mean", "baseline_last"} <= set(errors)
    assert errors.pop("action") < min(errors.values())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_paths_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", text)
    assert [link for link in links if not (page.parent / link).exists()] == []
    mentioned = re.findall(rf"(?<![\w./$}}-])(?:{FOLDERS})/[^\s`'\"()\[\],;:|]*", text)
    # X.yaml and *.json stand for any, %x and ${…} for what is filled in later.
    named = {path.rstrip(".") for path in mentioned if not re.search(r"[*%<>{}$…]|\bX\b", path)}
    assert sorted(path for path in named if not (ROOT / path).exists()) == []


def test_paths_are_recognised_at_all() -> None:
    text = (ROOT / "docs" / "training_finetuning.md").read_text(encoding="utf-8")
    assert len(set(re.findall(rf"\b(?:{FOLDERS})/[\w/.]+", text))) >= 3


def test_no_file_names_a_machine_or_a_package_registry() -> None:
    # Written so that this file does not match itself.
    machine = [
        re.escape(f"{ROOT}/"),
        r"/home/(?!someone\b)\w+/",
        r"/User[s]/\w+",
        r"(?<![\w.])/roo[t]/",
        r"C:\\User[s]",
    ]
    registry = [
        r"https?://[^/\s\"']*(?:pyp[i]|pythonhoste[d]|artifactor[y]|nexu[s]|jfro[g]|registr[y]|mirro[r])",
        r"(?:extra-)?index-ur[l]",
        r"https?://(?!127\.|0\.0\.0\.0)\d+\.\d+\.\d+\.\d+",
    ]
    pattern = re.compile("|".join(machine + registry))
    assert pattern.search("https://" + "pypi.org/simple") and pattern.search(f"open({ROOT}/x)")
    found = []
    for path in committed():
        content = path.read_bytes()
        if b"\0" in content[:8000]:  # pictures, parquet
            continue
        for number, line in enumerate(content.decode("utf-8", errors="replace").splitlines(), start=1):
            if pattern.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:120]}")
    assert found == []
    assert "uv.lock" not in [path.name for path in committed()]
