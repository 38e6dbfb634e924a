"""The same small policy here and in LeRobot, and the actions of each for recorded frames."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from agent.batch import SampleSpec
from agent.data.normalization.normalizer import FeatureStatistics, Normalizer, compute_statistics, to_lerobot_stats
from agent.data.normalization.robot import Robot
from agent.data.samples.reader import SampleReader, collate
from agent.data.samples.task_tokens import make_task_tokens
from agent.models import registry
from agent.models.common.sizes import GemmaVariant, VisionVariant
from agent.models.flow_matching import FlowDraws
from agent.models.lerobot_config import FeatureSpec
from agent.models.pi import configuration
from agent.models.pi.configuration import PI0Config
from agent.models.pi.model import PI0
from support.stores import write_pretrained

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = "demo/tokenizer"
CAMERAS = ["observation.images.top", "observation.images.left"]
STATE_DIM, ACTION_DIM, CHUNK, SIZE = 5, 4, 6, 28
# LeRobot's attention assumes eight heads.
LANGUAGE = {"width": 64, "depth": 2, "mlp_dim": 96, "heads": 8, "kv_heads": 1, "head_dim": 16, "vocab_size": 512}
EXPERT = LANGUAGE | {"width": 48, "mlp_dim": 80}
VISION = {"width": 32, "depth": 2, "mlp_dim": 40, "heads": 4, "patch_size": 14}
Sizes = dict[str, int]
TASKS = ["Open a drawer", "Press a button from the top\n"]


@contextmanager
def lerobot_of(language: Sizes, expert: Sizes, vision: Sizes) -> Iterator[tuple[Any, pytest.MonkeyPatch]]:
    """While this lasts, the policies that LeRobot builds have these sizes; gives its module and what patches more."""
    import lerobot.policies.pi0.modeling_pi0 as modeling

    def sizes(variant: str) -> SimpleNamespace:
        table = {"gemma_2b": language, "gemma_300m": expert}[variant]
        return SimpleNamespace(**table, num_heads=table["heads"], num_kv_heads=table["kv_heads"])

    class Vlm(modeling.PaliGemmaForConditionalGenerationWithPiGemma):
        def __init__(self, config):
            of_vision, text = config.vision_config, config.text_config
            of_vision.hidden_size, of_vision.intermediate_size = vision["width"], vision["mlp_dim"]
            of_vision.num_hidden_layers, of_vision.num_attention_heads = vision["depth"], vision["heads"]
            of_vision.projection_dim, text.vocab_size = language["width"], language["vocab_size"]
            super().__init__(config)

    class Expert(modeling.PiGemmaForCausalLM):
        def __init__(self, config):
            config.vocab_size = expert["vocab_size"]
            super().__init__(config)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling, "get_gemma_config", sizes)
        patch.setattr(modeling, "PaliGemmaForConditionalGenerationWithPiGemma", Vlm)
        patch.setattr(modeling, "PiGemmaForCausalLM", Expert)
        yield modeling, patch


@pytest.fixture(scope="module", autouse=True)
def small():
    """``gemma_2b`` and its like stand for small sizes, here and in LeRobot, so that config.json holds names."""
    with lerobot_of(LANGUAGE, EXPERT, VISION) as (_, patch):
        patch.setitem(configuration.GEMMA, "gemma_2b", GemmaVariant(**LANGUAGE))
        patch.setitem(configuration.GEMMA, "gemma_300m", GemmaVariant(**EXPERT))
        patch.setitem(configuration.VISION, "so400m", VisionVariant(**VISION))
        patch.chdir(ROOT)
        yield


def make_config(**changes) -> PI0Config:
    values = {
        "image_resolution": (SIZE, SIZE),
        "chunk_size": CHUNK,
        "tokenizer_max_length": 24,
        "tokenizer_path": TOKENIZER,
        "num_inference_steps": 3,
        "device": "cpu",
        "input_features": {name: FeatureSpec("VISUAL", [3, SIZE, SIZE]) for name in CAMERAS}
        | {"observation.state": FeatureSpec("STATE", [STATE_DIM])},
        "output_features": {"action": FeatureSpec("ACTION", [ACTION_DIM])},
    }
    return PI0Config(**values | changes)


def make_statistics() -> tuple[FeatureStatistics, FeatureStatistics]:
    """Of state and action; the last action hardly moves, so that its statistics are clamped."""
    generator = np.random.default_rng(0)
    states = generator.normal([0, 3, -2, 100, 0], [1, 2, 0.1, 30, 5], (500, STATE_DIM))
    actions = generator.normal([0, 1, -5, 0.5], [0.02, 3, 10, 1e-7], (500, ACTION_DIM))
    return compute_statistics(states.astype(np.float32)), compute_statistics(actions.astype(np.float32))


def make_model(config: PI0Config) -> PI0:
    model, generator = PI0(config), torch.Generator().manual_seed(0)
    model.init_weights(generator)
    with torch.no_grad():  # attention far from uniform, norms and biases that do something
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def written(folder: Path, config: PI0Config, model: PI0) -> Path:
    folder.mkdir()
    write_pretrained(folder, config, model.state_dict(), to_lerobot_stats(*make_statistics()), last_update=200)
    return folder


def mapping(mode: str) -> dict[str, str]:
    return {"VISUAL": "IDENTITY", "STATE": mode, "ACTION": mode}


class Recording:
    """A source of recorded frames: raw images, state and task, as a data set holds them."""

    def __init__(self, image: tuple[int, int], size: int) -> None:
        generator = np.random.default_rng(3)
        self.frames = []
        for i in range(size):
            pixels = {slot: generator.integers(0, 256, (3, *image), dtype=np.uint8) for slot in CAMERAS}
            self.frames.append(
                SimpleNamespace(
                    images={slot: torch.from_numpy(array) for slot, array in pixels.items()},
                    state=generator.normal([0, 3, -2, 100, 0], [1, 2, 0.1, 30, 5]).astype(np.float32),
                    actions=np.zeros((CHUNK, ACTION_DIM), np.float32),
                    action_is_pad=np.zeros(CHUNK, bool),
                    task=TASKS[i % len(TASKS)],
                    episode=0,
                    frame=i,
                    previous_action=None,
                    previous_is_pad=False,
                )
            )

    def read(self, position: int) -> SimpleNamespace:
        return self.frames[position]


def noise_of(k: int) -> np.ndarray:
    return np.random.default_rng([9, k]).standard_normal((CHUNK, 32)).astype(np.float32)


def our_actions(model: PI0, recording: Recording, resized_by_the_model: bool) -> torch.Tensor:
    """Physical actions by our data path, or with the model's own float resize of the raw images."""
    config, (state, action) = model.config, make_statistics()
    size = config.image_resolution
    spec = SampleSpec(CHUNK, 32, 32, size, config.tokenizer_max_length, tuple(CAMERAS), STATE_DIM, ACTION_DIM)
    normalizers = [
        Normalizer(config.normalization_mapping[kind], s) for kind, s in (("STATE", state), ("ACTION", action))
    ]
    tokens = make_task_tokens(registry.family(config).prompt(config), TASKS)
    robot = Robot("test", *normalizers, mean_action=np.zeros(ACTION_DIM, np.float32))
    reader = SampleReader([recording], [robot], tokens, spec, lambda k: FlowDraws(noise_of(k), np.float32(0.5)))  # type: ignore[list-item]
    samples = [reader.sample(k, 0, k) for k in range(len(recording.frames))]
    batch = collate(samples, spec, tokens.pad_token_id)
    observation = batch.observation
    if resized_by_the_model:
        raw = {slot: torch.stack([frame.images[slot] for frame in recording.frames]) for slot in CAMERAS}
        observation = replace(observation, images=raw)
    with torch.no_grad():
        return normalizers[1].unnormalize(model.sample_actions(observation, batch.draws)[..., :ACTION_DIM])


def their_actions(folder: Path, recording: Recording) -> torch.Tensor:
    """Physical actions by LeRobot's own code from the folder alone, one observation at a time as on a robot."""
    from lerobot.policies.factory import make_pre_post_processors
    from lerobot.policies.pi0.modeling_pi0 import PI0Policy

    policy = PI0Policy.from_pretrained(folder, strict=True)
    before, after = make_pre_post_processors(policy.config, pretrained_path=str(folder))
    chunks = []
    for k, frame in enumerate(recording.frames):
        policy.model.sample_noise = lambda shape, device, k=k: torch.from_numpy(noise_of(k))[None]
        raw = {slot: image.float() / 255 for slot, image in frame.images.items()}
        raw |= {"observation.state": torch.from_numpy(frame.state), "task": frame.task}
        chunks.append(after(policy.predict_action_chunk(before(raw))))
    return torch.cat(chunks)
