"""LeRobot's model JSON of 2025 is read, and every older key of it is said in the log.

Run: uv run pytest tests/models/pi/test_vintages.py      (needs no GPU)

Most tests load real files through agent.configuration_pipeline.load_config; the last ones train with run.py.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file
from support.forked import ForkServer
from support.launching import MODEL, Workplace
from support.older_files import ONLY_THEN, V1, Files

from agent.configuration_pipeline import dump
from agent.models.pi import adapter, vintages
from agent.models.registry import ModelConfig
from agent.settings import older_keys
from agent.training.config_changes import changes_since

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path / "config")


# ── the model JSON ──────────────────────────────────────────────────────────────────────────────────────────────


def test_a_file_of_2025_means_what_it_said(files: Files) -> None:
    today = dump(files.load())["model_cfg"]
    assert today["num_inference_steps"] == 10 and list(today["image_resolution"]) == [224, 224]
    kept = {key: value for key, value in V1.items() if key not in ONLY_THEN | {"type"}}
    read = json.loads(json.dumps(today))
    assert {key: read[key] for key in kept} == kept
    assert not ONLY_THEN & today.keys()


def test_every_older_key_is_in_the_log_once(files: Files) -> None:
    notes = files.read().notes
    for key in ONLY_THEN:
        assert len([note for note in notes if note.startswith(f"model_cfg.{key}: ")]) == 1, key
    # The file's optimizer has no clipping norm of its own; LeRobot's default was another one.
    (left,) = [note for note in notes if not note.startswith(tuple(f"model_cfg.{key}:" for key in ONLY_THEN))]
    assert left == "model_cfg.optimizer_grad_clip_norm: not in this older file, where that meant 10.0; here it is 1.0"


def test_a_file_of_today_has_nothing_to_say(files: Files) -> None:
    files.model(*ONLY_THEN, num_inference_steps=10)
    assert files.read().notes == ()


def test_what_an_older_file_leaves_out_is_said(files: Files) -> None:
    files.model("freeze_vision_encoder", "optimizer_weight_decay", "scheduler_decay_steps")
    notes = files.read().notes
    assert "model_cfg.freeze_vision_encoder: not in this older file, where that meant true; here it is false" in notes
    assert "model_cfg.optimizer_weight_decay: not in this older file, where that meant 1e-10; here it is 0.01" in notes
    assert "model_cfg.scheduler_decay_steps: not in this older file, where that meant 30000; here it is null" in notes


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("attention_implementation", "flex", "flex of an older file has no effect"),
        ("use_cache", False, "false of an older file has no effect"),
        ("num_steps", 3, "3 of an older file is num_inference_steps today"),
        ("device", "cpu", "cpu of an older file is obeyed: no GPU is used"),
        (
            "normalization_mapping",
            {"VISUAL": "IDENTITY", "STATE": "IDENTITY", "ACTION": "IDENTITY"},
            "IDENTITY for STATE and ACTION of an older file is obeyed: nothing is normalised",
        ),
    ],
)
def test_what_is_read_and_said(files: Files, key: str, value: Any, said: str) -> None:
    files.model(**{key: value})
    assert f"model_cfg.{key}: {said}" in "\n".join(files.read().notes)


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("adapt_to_pi_aloha", True, "true: joints and grippers are not converted"),
        ("use_delta_joint_actions_aloha", True, "true: actions are not made relative to the state"),
        ("train_state_proj", False, "false: the state's projection always trains here; write true"),
        (
            "use_amp",
            True,
            "mixed precision is the trainer's; write false here, and use_bf16: true in the training YAML",
        ),
        ("proj_width", 512, "512, but the action expert (action_expert_variant) is 1024 wide; write 1024"),
        (
            "resize_imgs_with_padding",
            None,
            "null: images are always resized to the vision tower's size; write [224, 224]",
        ),
    ],
)
def test_what_is_refused(files: Files, key: str, value: Any, complaint: str) -> None:
    files.model(**{key: value})
    assert f"{files.line(key)}: model_cfg.{key}: {complaint}" in files.refused()


def test_use_amp_of_a_file_of_today_is_refused_too(files: Files) -> None:
    files.model(*ONLY_THEN, use_amp=True)
    assert (
        f"{files.line('use_amp')}: model_cfg.use_amp: mixed precision is the trainer's; write false" in files.refused()
    )


def test_the_width_is_that_of_the_experts_table(files: Files) -> None:
    table = {"width": 64, "depth": 18, "mlp_dim": 96, "heads": 8, "kv_heads": 1, "head_dim": 256}
    files.model(action_expert_variant=table, proj_width=64)
    assert "model_cfg.proj_width: 64 of an older file is the width of the action expert" in files.read().notes
    assert "proj_width: 64, but the action expert (action_expert_variant) is 1024 wide" in files.refused(
        "--model_cfg.action_expert_variant", "gemma_300m"
    )
    assert "no variant 'gemma_30m'" in files.refused("--model_cfg.action_expert_variant", "gemma_30m")


@pytest.mark.parametrize(
    ("old", "new"), [("num_steps", "num_inference_steps"), ("resize_imgs_with_padding", "image_resolution")]
)
def test_both_names_of_a_key(files: Files, old: str, new: str) -> None:
    files.model(**{new: V1[old]})
    assert dump(files.load())["model_cfg"][new] in (V1[old], tuple(V1[old]) if new == "image_resolution" else None)
    other = 5 if new == "num_inference_steps" else [448, 448]
    files.model(**{new: other})
    wanted = f"{files.line(old)}: model_cfg.{old}: {V1[old]}, but {new}, the name of the same key today, is {other}"
    assert wanted in files.refused()


@pytest.mark.parametrize("written", ["num_steps", "num_inference_steps"])
@pytest.mark.parametrize("given", ["num_steps", "num_inference_steps"])
def test_the_command_line_wins_by_either_name(files: Files, written: str, given: str) -> None:
    files.model("num_steps", **{written: 10})
    assert files.read(f"--model_cfg.{given}", "5").num_inference_steps == 5
    arrow = "num_steps → model_cfg.num_inference_steps" if given == "num_steps" else "model_cfg.num_inference_steps"
    assert f"command line: --{arrow}: expected a whole number, got 'x'" in files.refused(f"--model_cfg.{given}", "x")


def test_an_older_file_can_be_included_on_the_command_line(files: Files) -> None:
    other = files.json.with_name("other.json")
    other.write_text(json.dumps(V1 | {"num_steps": 7}), encoding="utf-8")
    config = files.read("--model_cfg", f"!include {other}", "--model_cfg.chunk_size", "60")
    assert (config.num_inference_steps, config.chunk_size) == (7, 60)


def test_mistakes_are_found_at_the_line_of_the_older_key(files: Files) -> None:
    files.model(num_steps="many", resize_imgs_with_padding=[224])
    message = files.refused()
    where, other = files.line("num_steps"), files.line("resize_imgs_with_padding")
    assert f"{where}: num_steps → model_cfg.num_inference_steps: expected a whole number, got 'many'" in message
    assert f"{other}: resize_imgs_with_padding → model_cfg.image_resolution: expected 2 values, got 1" in message
    files.model(num_steps=0)
    assert f"{files.line('num_steps')}: num_steps → model_cfg.num_inference_steps: 0 is not positive" in files.refused()


def test_no_paligemma_was_an_empty_text_too(files: Files) -> None:
    files.model(paligemma_pretrained_path="")
    assert files.read().paligemma_pretrained_path is None
    files.model(paligemma_pretrained_path="google/paligemma-3b-pt-224")
    assert files.read().paligemma_pretrained_path == "google/paligemma-3b-pt-224"


def test_a_resume_sees_no_change_between_the_vintages(files: Files) -> None:
    saved = dump(files.load())
    files.model(*ONLY_THEN, num_inference_steps=10, image_resolution=[224, 224])
    assert changes_since(saved, files.load()) == []
    files.model(resize_imgs_with_padding=[448, 448])
    changed = ["model_cfg.image_resolution.0: 224 → 448", "model_cfg.image_resolution.1: 224 → 448"]
    assert changes_since(saved, files.load()) == changed


def test_other_models_know_no_older_names() -> None:
    kinds = ModelConfig.get_known_choices()
    assert {name for name, kind in kinds.items() if kind.older_names} == {"pi0"}


# ── the documents ───────────────────────────────────────────────────────────────────────────────────────────────


def test_every_older_key_is_on_the_page() -> None:
    page = (ROOT / "docs" / "training_finetuning.md").read_text(encoding="utf-8")
    section = page.partition("\n## Older files\n")[2].partition("\n## ")[0]
    first_cells = " ".join(re.findall(r"^\| (`.*?) \|", section, flags=re.MULTILINE))
    written = set(re.findall(r"`([\w.*]+)(?:: [\w]+)?`", first_cells))
    keys = {*older_keys.INSTEAD, *older_keys.MISSING, *(key for key, _ in older_keys.VALUES), *ONLY_THEN}
    assert keys - written == set()
    assert all(f"`{key}`" in section for key in vintages.OLD_DEFAULTS)


# ── runs ────────────────────────────────────────────────────────────────────────────────────────────────────────
OLDER_VISION = "model.paligemma_with_expert.paligemma.vision_tower."  # today's names have another `model.` in between

# Nothing moves, so that what was loaded is found in the checkpoint.
STILL = ("--n_updates", "1", "--model_cfg.optimizer_lr", "1e-30", "--model_cfg.scheduler_decay_lr", "0")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """Beside ``tiny.yaml`` lies ``v1.json``, the same tiny model in the keys of 2025."""
    place = Workplace.make(tmp_path_factory.mktemp("vintages"))
    sizes = {key: value for key, value in MODEL.items() if key not in ("num_inference_steps", "image_resolution")}
    older = {key: V1[key] for key in ONLY_THEN} | {
        "num_steps": MODEL["num_inference_steps"],
        "resize_imgs_with_padding": MODEL["image_resolution"],
        "proj_width": MODEL["action_expert_variant"]["width"],  # type: ignore[index]
    }
    (place.folder / "v1.json").write_text(json.dumps(sizes | older), encoding="utf-8")
    return place


@pytest.fixture(scope="module")
def trained(place: Workplace, server: ForkServer) -> str:
    """The output of a run with the older JSON, named ``trained``."""
    code, output = server.run(place, "trained", "--n_updates", "4", *older_model(place))
    assert code == 0, output
    return output


def older_model(place: Workplace) -> tuple[str, str]:
    return "--model_cfg", f"!include {place.folder / 'v1.json'}"


def tensors(place: Workplace, name: str) -> dict[str, Any]:
    return load_file(place.checkpoint(name) / "pretrained_model" / "model.safetensors")


def assert_same_weights(place: Workplace, name: str, wanted: str) -> None:
    found, expected = tensors(place, name), tensors(place, wanted)
    assert found.keys() == expected.keys()
    assert [key for key in found if not found[key].equal(expected[key])] == []


def test_an_older_json_trains_and_the_log_says_how_it_was_read(place: Workplace, trained: str) -> None:
    for key in ONLY_THEN:
        assert len(re.findall(rf"^\d\d:\d\d:\d\d I model_cfg\.{key}: ", trained, flags=re.MULTILINE)) == 1, key
    saved = json.loads((place.checkpoint("trained") / "pretrained_model" / "config.json").read_text())
    assert not ONLY_THEN & saved.keys()
    assert (saved["num_inference_steps"], saved["image_resolution"]) == (2, [32, 32])
    resolved = yaml.safe_load((place.folder / "runs" / "trained" / "config.yaml").read_text())
    assert not ONLY_THEN & resolved["model_cfg"].keys() and resolved["model_cfg"]["num_inference_steps"] == 2


def test_the_same_command_and_todays_json_continue_it(place: Workplace, server: ForkServer, trained: str) -> None:
    for model in (older_model(place), ()):
        code, output = server.run(place, "trained", "--n_updates", "4", *model)
        assert code == 0, output
        assert "this run is finished: 4 of 4 updates done" in output


def test_an_older_json_with_weights_of_today(place: Workplace, server: ForkServer, trained: str) -> None:
    source = place.checkpoint("trained") / "pretrained_model"
    code, output = server.run(place, "older_json", "--load_from_checkpoint", str(source), *older_model(place), *STILL)
    assert code == 0, output
    assert f"({adapter.LEROBOT.title})" in output
    assert_same_weights(place, "older_json", "trained")


def test_todays_json_with_older_weights(place: Workplace, server: ForkServer, trained: str) -> None:
    (layout,) = [layout for layout in adapter.POLICIES if layout.parts[0][1].startswith(OLDER_VISION)]
    today = tensors(place, "trained")
    renamed = {}
    for name, tensor in today.items():
        ours = adapter.LEROBOT.ours(name)
        if ours is not None:  # the two language heads are waived or tied
            renamed[layout.theirs(ours)] = tensor
    assert len(renamed) == len(today) - 2 and not renamed.keys() <= today.keys()
    buffers = {
        f"{part}.{name}": today["model.state_proj.bias"]
        for part, name in (
            ("normalize_inputs", "buffer_observation_state.mean"),
            ("unnormalize_outputs", "buffer_action.std"),
        )
    }
    folder = place.folder / "older_weights"
    folder.mkdir()
    save_file({key: tensor.clone() for key, tensor in (renamed | buffers).items()}, folder / "model.safetensors")
    code, output = server.run(place, "older_weights", "--load_from_checkpoint", str(folder), *STILL)
    assert code == 0, output
    assert f"({layout.title})" in output
    assert_same_weights(place, "older_weights", "trained")
