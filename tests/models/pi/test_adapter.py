"""Tensor names of π0 here, in LeRobot, openpi and PaliGemma; the saved config.json.

Run: pytest tests/models/pi/test_adapter.py   (about 15 seconds, most of it importing LeRobot)
"""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path

import draccus
import pytest
import torch
from support.small_model import reference

from agent.checkpoints import tensor_file
from agent.models.base import ModelConfig
from agent.models.common.sizes import GemmaVariant, VisionVariant
from agent.models.lerobot_config import FeatureSpec
from agent.models.pi import adapter
from agent.models.pi.configuration import PI0Config
from agent.models.pi.model import PI0

from_paligemma = partial(adapter.from_base, "paligemma_pretrained_path")


HEADS = {
    "model.paligemma_with_expert.paligemma.lm_head.weight",
    "model.paligemma_with_expert.gemma_expert.lm_head.weight",
}
TINY = {"depth": 2, "mlp_dim": 24, "heads": 2, "kv_heads": 1, "head_dim": 8, "vocab_size": 20}


def tiny_config() -> PI0Config:
    return PI0Config(
        paligemma_variant=GemmaVariant(width=16, **TINY),
        action_expert_variant=GemmaVariant(width=12, **TINY),
        vision_variant=VisionVariant(width=8, depth=2, mlp_dim=12, heads=2),
        image_resolution=(28, 28),
    )


def full_names(layout: adapter.Layout) -> list[str]:
    return [name for name in map(layout.theirs, adapter.shapes(PI0Config())) if name is not None]


def test_the_full_model_has_exactly_lerobots_tensors():
    config, tensors = PI0Config(), reference("pi0_tensors_lerobot_0.6.json")
    with torch.device("meta"):
        out = adapter.to_lerobot(PI0(config).state_dict(), config)
    assert {name: tuple(tensor.shape) for name, tensor in out.items()} == tensors
    assert set(adapter.expected(config).values()) == set(tensors) - HEADS
    assert adapter.shapes(config).keys() == adapter.expected(config).keys()


@pytest.mark.parametrize("file", ["pi0_tensors_lerobot_0.6.json", "pi0_tensors_lerobot_v1.json", "openpi"])
def test_every_tensor_of_a_policy_finds_its_place(file):
    config = PI0Config()
    names = reference("pi0_tensors_lerobot_0.6.json" if file == "openpi" else file)
    if file == "openpi":
        names = {name.removeprefix("model."): shape for name, shape in names.items()}
    match = adapter.from_policy(names, config)
    assert {ours: names[theirs] for ours, theirs in match.sources.items()} == adapter.shapes(config)
    assert len(match.waived) == 2 and all("head" in reason for reason in match.waived.values())
    assert not match.extra and not match.layout.fresh


def test_a_file_that_stores_the_tied_embedding_once_as_the_head():
    embedding = "model.paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"
    head = "model.paligemma_with_expert.paligemma.lm_head.weight"
    match = adapter.from_policy(set(reference("pi0_tensors_lerobot_0.6.json")) - {embedding}, PI0Config())
    assert match.sources[adapter.EMBEDDING] == head and head not in match.waived
    assert match.sources.keys() == adapter.shapes(PI0Config()).keys()


@pytest.mark.parametrize("layout", adapter.PALIGEMMAS, ids=lambda layout: layout.title)
def test_paligemma_brings_everything_but_the_expert(layout):
    config = PI0Config()
    match = adapter.from_base(
        "paligemma_pretrained_path", [*full_names(layout), "lm_head.weight", "model.surplus.weight"], config
    )
    assert match.layout is layout
    missing = adapter.shapes(config).keys() - match.sources.keys()
    assert {name.split(".")[0] for name in match.sources} == {"vision", "projector", "language"}
    assert not {name.split(".")[0] for name in missing} & {"vision", "projector", "language"}
    assert all(any(re.fullmatch(pattern, name) for pattern, _ in layout.fresh) for name in missing)
    assert match.extra == ["model.surplus.weight"] and list(match.waived) == ["lm_head.weight"]


def test_which_other_shapes_are_taken():
    assert adapter.fit(adapter.EMBEDDING, (22, 16), (20, 16))[0]
    assert adapter.fit(adapter.EMBEDDING, (22, 12), (20, 16)) is None
    assert adapter.fit(adapter.EMBEDDING, (18, 16), (20, 16)) is None
    assert adapter.fit("projector.weight", (22, 16), (20, 16)) is None
    assert adapter.fit("state_proj.weight", (12, 7), (12, 32))[0]
    assert adapter.fit("state_proj.weight", (13, 7), (12, 32)) is None
    refused = adapter.fit("action_out_proj.bias", (32,), (7,))
    assert not refused[0] and refused[1].startswith("write max_action_dim: 32")


def test_weights_survive_the_way_out_and_in(tmp_path):
    from safetensors.torch import load_file

    config = tiny_config()
    model, other = PI0(config), PI0(config)
    model.init_weights(torch.Generator().manual_seed(0))
    other.init_weights(torch.Generator().manual_seed(1))
    tensor_file.write(tmp_path / "model.safetensors", adapter.to_lerobot(model.state_dict(), config))
    loaded = load_file(tmp_path / "model.safetensors")
    match = adapter.from_policy(loaded, config)
    other.load_state_dict({ours: loaded[theirs] for ours, theirs in match.sources.items()}, strict=True)
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    head = loaded["model.paligemma_with_expert.gemma_expert.lm_head.weight"]
    assert head.dtype == torch.bfloat16 and head.shape == (20, 12) and not head.any()


def test_paligemma_of_transformers_fits(tmp_path):
    from transformers import GemmaConfig, PaliGemmaConfig, PaliGemmaForConditionalGeneration, SiglipVisionConfig

    config = tiny_config()
    text = GemmaConfig(vocab_size=22, hidden_size=16, intermediate_size=24, num_hidden_layers=2, head_dim=8,
                       num_attention_heads=2, num_key_value_heads=1)  # fmt: skip
    vision = SiglipVisionConfig(hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
                                image_size=28, patch_size=14, vision_use_head=False, projection_dim=16)  # fmt: skip
    theirs = PaliGemmaForConditionalGeneration(
        PaliGemmaConfig(text_config=text, vision_config=vision, projection_dim=16)
    ).state_dict()
    match = from_paligemma(theirs, config)
    shapes = adapter.shapes(config)
    assert not match.extra
    for ours, name in match.sources.items():
        shape = tuple(theirs[name].shape)
        assert shape == shapes[ours] or adapter.fit(ours, shape, shapes[ours])[0], ours


# ---- config.json


def lerobot_roundtrip(config: PI0Config, folder: Path):
    from lerobot.configs import PreTrainedConfig
    from lerobot.policies.pi0.configuration_pi0 import PI0Config as _  # noqa: F401  registers "pi0"

    (folder / "config.json").write_text(json.dumps(config.to_lerobot(last_update=200)))
    loaded = PreTrainedConfig.from_pretrained(folder)
    return loaded, json.loads(json.dumps(draccus.encode(loaded, PreTrainedConfig)))


def test_config_json_loads_in_lerobot_and_back(tmp_path):
    config = PI0Config(
        device="cpu",
        empty_cameras=1,
        optimizer_lr=1e-5,
        chunk_size=20,
        tags=["robot"],
        repo_id="user/policy",
        push_to_hub=False,
        input_features={
            "observation.images.top": FeatureSpec("VISUAL", [3, 480, 640]),
            "observation.state": FeatureSpec("STATE", [8]),
        },
        output_features={"action": FeatureSpec("ACTION", [7])},
    )
    loaded, written = lerobot_roundtrip(config, tmp_path)
    assert (loaded.n_action_steps, loaded.scheduler_decay_steps, loaded.optimizer_lr) == (20, 200, 1e-5)
    # What LeRobot writes of it is what we wrote, to the letter, and LeRobot's own additions were foreseen.
    assert written == config.to_lerobot(last_update=200)
    loaded.validate_features()
    assert list(loaded.image_features) == config.camera_slots
    again = draccus.decode(ModelConfig, written)
    assert again.camera_slots == config.camera_slots
    assert again.to_lerobot() == config.to_lerobot(last_update=200)


def test_a_default_config_json_is_lerobots(tmp_path):
    from lerobot.configs import PreTrainedConfig
    from lerobot.policies.pi0.configuration_pi0 import PI0Config as Theirs

    theirs = json.loads(json.dumps(draccus.encode(Theirs(device="cpu"), PreTrainedConfig)))
    assert PI0Config(device="cpu").to_lerobot() == theirs


def test_sizes_without_a_name_are_written_and_refused_by_lerobot(tmp_path):
    written = tiny_config().to_lerobot()
    assert written["paligemma_variant"]["width"] == 16 and written["vision_variant"]["width"] == 8
    assert draccus.decode(ModelConfig, written).to_lerobot() == written
    with pytest.raises(Exception):  # noqa: B017  whatever LeRobot raises
        lerobot_roundtrip(tiny_config(), tmp_path)
    # A table with the sizes of a name goes by the name.
    table = GemmaVariant(2048, 18, 16384, 8, 1, 256)
    assert PI0Config(paligemma_variant=table).to_lerobot()["paligemma_variant"] == "gemma_2b"
