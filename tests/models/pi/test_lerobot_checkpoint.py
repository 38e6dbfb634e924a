"""What we write, LeRobot 0.6.1 reads: the processors to the letter, and the same actions for the same observation.

Run: pytest tests/models/pi/test_lerobot_checkpoint.py   (about fifteen seconds, most of them importing LeRobot)
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.lerobot import (  # ``small``: sizes that LeRobot takes for its own
    ACTION_DIM,
    CHUNK,
    ROOT,
    SIZE,
    TOKENIZER,
    Recording,
    make_config,
    make_model,
    make_statistics,
    mapping,
    our_actions,
    small,  # noqa: F401
    their_actions,
    written,
)

from agent import export
from agent.data.normalization.normalizer import to_lerobot_stats
from agent.models.pi import adapter
from agent.models.pi.configuration import PI0Config
from agent.models.pi.model import PI0

MODES = ["MEAN_STD", "MIN_MAX", "QUANTILES", "QUANTILE10", "IDENTITY"]


# ── the processors ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"normalization_mapping": mapping("QUANTILES"), "empty_cameras": 2, "tokenizer_max_length": 48},
        {"relative_exclude_joints": ["a", "b"], "action_feature_names": ["a", "b", "c", "d"]},
        {"tokenizer_path": str(ROOT / TOKENIZER), "device": None},
    ],
    ids=["plain", "quantiles, empty cameras", "joint names", "absolute path, any device"],
)
def test_the_processors_are_lerobots_own(tmp_path, monkeypatch, changes):
    import lerobot.policies.pi0.processor_pi0 as processor
    from lerobot.configs import PreTrainedConfig
    from lerobot.policies.pi0.configuration_pi0 import PI0Config as _  # noqa: F401  registers "pi0"

    config = make_config(**changes)
    folder = written(tmp_path / "ours", config, make_model(config))
    their_config = PreTrainedConfig.from_pretrained(folder)
    if changes.get("device", "cpu") is None:
        their_config.device = "cpu"  # LeRobot would write the device of this machine

    original = processor.TokenizerProcessorStep

    def with_our_tokenizer(**arguments):
        assert arguments["tokenizer_name"] == "google/paligemma-3b-pt-224"  # fixed in LeRobot
        return original(**arguments | {"tokenizer_name": str(ROOT / TOKENIZER)})

    monkeypatch.setattr(processor, "TokenizerProcessorStep", with_our_tokenizer)
    pipelines = processor.make_pi0_pre_post_processors(their_config, to_lerobot_stats(*make_statistics()))
    for pipeline in pipelines:
        pipeline.save_pretrained(tmp_path / "theirs")

    def files(which: str) -> dict[str, Path]:
        return {path.name: path for path in (tmp_path / which).iterdir() if path.name.startswith("policy_")}

    ours, theirs = files("ours"), files("theirs")
    assert ours.keys() == theirs.keys() and len(ours) == 4
    for name in ours:
        if name.endswith(".json"):
            assert json.loads(ours[name].read_text()) == json.loads(theirs[name].read_text()), name
            continue
        our_tensors, their_tensors = load_file(ours[name]), load_file(theirs[name])
        assert our_tensors.keys() == their_tensors.keys() and len(our_tensors) == 16
        for key, value in our_tensors.items():
            assert value.dtype == their_tensors[key].dtype and torch.equal(value, their_tensors[key]), (name, key)


def test_a_tokenizer_in_the_home_folder_is_written_in_full(tmp_path, monkeypatch):
    (tmp_path / "tokenizer").symlink_to(ROOT / TOKENIZER)
    monkeypatch.setenv("HOME", str(tmp_path))
    config = make_config(tokenizer_path="~/tokenizer")
    folder = written(tmp_path / "ours", config, make_model(config))
    steps = json.loads((folder / "policy_preprocessor.json").read_text())["steps"]
    (tokenizer,) = [step["config"]["tokenizer_name"] for step in steps if step["registry_name"].startswith("token")]
    assert tokenizer == str(ROOT / TOKENIZER)


def test_a_tokenizer_of_the_hub_keeps_its_name(tmp_path):
    config = make_config(tokenizer_path="google/paligemma-3b-pt-224")
    folder = written(tmp_path / "ours", config, make_model(config))
    assert '"tokenizer_name": "google/paligemma-3b-pt-224"' in (folder / "policy_preprocessor.json").read_text()


# ── the policy ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("mode", "image"),
    [*((mode, (SIZE, SIZE)) for mode in MODES), ("MEAN_STD", (37, 61)), ("MEAN_STD", (90, 40)), ("MEAN_STD", (12, 16))],
    ids=str,
)
def test_lerobot_acts_as_we_do_from_the_folder_alone(tmp_path, capfd, caplog, mode, image):
    config = make_config(normalization_mapping=mapping(mode))
    model = make_model(config)
    folder = written(tmp_path / "pretrained_model", config, model)
    recording = Recording(image, size=3)
    caplog.clear()
    theirs = their_actions(folder, recording)

    said = capfd.readouterr()
    assert "All keys loaded successfully!" in said.out
    for complaint in ("Missing", "Unexpected", "Remapped", "Could not load", "without loading"):
        assert complaint not in said.out + said.err, complaint

    scale = theirs.std(dim=(0, 1)).clamp_min(1e-3)  # of each dimension in its own unit
    ours = our_actions(model, recording, resized_by_the_model=image != (SIZE, SIZE))
    deviation = float(((ours - theirs).abs() / scale).max())
    print(f"{mode} {image}: {deviation:.1e} of an action's spread")
    assert theirs.shape == (3, CHUNK, ACTION_DIM) and deviation < 1e-4
    if image != (SIZE, SIZE):  # the data path rounds its resized images to bytes
        rounded = float(((our_actions(model, recording, False) - theirs).abs() / scale).max())
        print(f"{mode} {image}: {rounded:.1e} with images resized to bytes")
        assert deviation < rounded < 0.05


def test_the_weights_are_ours_bit_for_bit(tmp_path):
    from lerobot.policies.pi0.modeling_pi0 import PI0Policy

    config = make_config()
    model = make_model(config)
    theirs = PI0Policy.from_pretrained(written(tmp_path / "folder", config, model), strict=True).state_dict()
    names = {name: adapter.LEROBOT.theirs(name) for name in model.state_dict()}
    for ours, name in names.items():
        assert torch.equal(theirs[name], model.state_dict()[ours]), ours
    heads = theirs.keys() - set(names.values())
    assert len(heads) == 2 and all(name.endswith("lm_head.weight") for name in heads)


# ── what agent.export makes of it ───────────────────────────────────────────────────────────────────────────────


def exported(tmp_path: Path, config: PI0Config, *options: str) -> tuple[PI0, Path, Path]:
    """A model, its checkpoint, and an export of it."""
    model = make_model(config)
    folder, out = written(tmp_path / "pretrained_model", config, model), tmp_path / "policy"
    assert export.main(["--checkpoint", str(folder), "--out", str(out), *options]) == 0
    return model, folder, out


def test_an_export_acts_as_the_checkpoint_does(tmp_path, capsys):
    _, folder, out = exported(tmp_path, make_config(), "--to", "lerobot")
    assert "note:" not in capsys.readouterr().out
    recording = Recording((SIZE, SIZE), size=2)
    assert torch.equal(their_actions(out, recording), their_actions(folder, recording))


def test_an_export_in_bfloat16_acts_nearly_so(tmp_path, capfd):
    _, folder, out = exported(tmp_path, make_config(), "--to", "lerobot", "--save_dtype", "bfloat16")
    recording = Recording((SIZE, SIZE), size=2)
    theirs, exact = their_actions(out, recording), their_actions(folder, recording)
    assert "Could not load" not in capfd.readouterr().out
    deviation = float(((theirs - exact).abs() / exact.std(dim=(0, 1)).clamp_min(1e-3)).max())
    assert 0 < deviation < 0.2


def test_the_cards_own_lines_run(tmp_path, monkeypatch):
    _, folder, out = exported(tmp_path, make_config(device=None), "--to", "lerobot")
    (code,) = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), re.S)
    frame = Recording((SIZE, SIZE), size=1).frames[0]
    observation = {slot: image.float() / 255 for slot, image in frame.images.items()}
    observation |= {"observation.state": torch.from_numpy(frame.state), "task": frame.task}
    monkeypatch.chdir(tmp_path)
    names: dict = {"observation": observation}
    exec(code, names)
    assert names["actions"].shape == (1, CHUNK, ACTION_DIM) and names["actions"].isfinite().all()


def test_openpis_strict_loading_takes_an_export(tmp_path):
    from lerobot.policies.pi0.configuration_pi0 import PI0Config as Theirs
    from lerobot.policies.pi0.modeling_pi0 import PI0Pytorch
    from safetensors.torch import load_model

    model, _, out = exported(tmp_path, make_config(), "--to", "openpi")
    # LeRobot's inner model is openpi's port of π0; there the language head is tied to the embedding.
    theirs = PI0Pytorch(Theirs(image_resolution=(SIZE, SIZE), chunk_size=CHUNK, n_action_steps=CHUNK, device="cpu"))
    paligemma = theirs.paligemma_with_expert.paligemma
    paligemma.lm_head.weight = paligemma.model.language_model.embed_tokens.weight
    load_model(theirs, out / "model.safetensors", strict=True)
    tensors = theirs.state_dict()
    for ours, tensor in model.state_dict().items():
        assert torch.equal(tensors[adapter.LEROBOT.theirs(ours).removeprefix("model.")], tensor), ours
