"""A π0 of a few thousand parameters whose output depends on every one of them, and batches for it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from agent.batch import ActionChunk, Batch, Observation
from agent.models.common.sizes import GemmaVariant, VisionVariant
from agent.models.flow_matching import FlowDraws, FlowSampling
from agent.models.lerobot_config import FeatureSpec
from agent.models.pi.configuration import PI0Config
from agent.models.pi.model import PI0

CAMERAS = ["observation.images.top", "observation.images.left", "observation.images.right"]
PATCHES = 4  # tokens of an image of the small model
# LeRobot's attention assumes eight heads.
LANGUAGE = {"width": 64, "depth": 3, "mlp_dim": 96, "heads": 8, "kv_heads": 1, "head_dim": 16, "vocab_size": 128}
EXPERT = LANGUAGE | {"width": 48, "mlp_dim": 80}
VISION = {"width": 32, "depth": 2, "mlp_dim": 40, "heads": 4, "patch_size": 14}
ACTION_DIM, STATE_DIM = 7, 9


def small_config(**changes) -> PI0Config:
    values = {
        "paligemma_variant": GemmaVariant(**LANGUAGE),
        "action_expert_variant": GemmaVariant(**EXPERT),
        "vision_variant": VisionVariant(**VISION),
        "image_resolution": (28, 28),
        "chunk_size": 6,
        "tokenizer_max_length": 8,
        "num_inference_steps": 3,
        "device": "cpu",
        "input_features": {name: FeatureSpec("VISUAL", [3, 28, 28]) for name in CAMERAS}
        | {"observation.state": FeatureSpec("STATE", [STATE_DIM])},
        "output_features": {"action": FeatureSpec("ACTION", [ACTION_DIM])},
    }
    return PI0Config(**values | changes)


def small_model(seed: int = 0, **changes) -> PI0:
    model = PI0(small_config(**changes))
    model.init_weights(torch.Generator().manual_seed(seed))
    return model


def lively_model(**changes) -> PI0:
    """A model whose attention is far from uniform and whose norms and biases do something."""
    model, g = small_model(**changes), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=g)
    return model


def make_batch(
    cameras: list[str] = CAMERAS, size: int = 3, image: tuple[int, int] = (28, 28), seed: int = 1, **changes
) -> Batch:
    """A batch without padded steps; instructions of different lengths."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.arange(size) % 4 + 4
    dim_mask = (torch.arange(32) < ACTION_DIM).expand(size, 32)
    batch = Batch(
        observation=Observation(
            images={name: torch.rand(size, 3, *image, generator=g) for name in cameras},
            image_masks={name: torch.ones(size, dtype=torch.bool) for name in cameras},
            state=torch.randn(size, 32, generator=g) * (torch.arange(32) < STATE_DIM),
            tokens=torch.randint(1, 128, (size, 8), generator=g),
            token_mask=torch.arange(8) < lengths[:, None],
        ),
        actions=ActionChunk(
            values=torch.randn(size, 6, 32, generator=g) * dim_mask[:, None],
            is_pad=torch.zeros(size, 6, dtype=torch.bool),
            dim_mask=dim_mask,
        ),
        draws=FlowDraws(
            noise=torch.randn(size, 6, 32, generator=g), time=torch.rand(size, generator=g) * 0.999 + 0.001
        ),
        sample_index=torch.arange(size),
        provenance=torch.zeros(size, 3, dtype=torch.int64),
    )
    return replace(batch, **changes)


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).detach().norm() / theirs.detach().norm().clamp_min(1e-30))


SAMPLING = FlowSampling(seed=7, purpose="train", shape=(6, 32), beta=(1.5, 1.0), scale=0.999, offset=0.001)


def reference(name: str) -> dict[str, tuple[int, ...]]:
    """Every tensor's name and shape from a table whose layers are written once, with a count."""
    out = {}
    for pattern, entry in json.loads((Path(__file__).parent / name).read_text())["tensors"].items():
        for i in range(entry["count"]):
            out[pattern.replace("{i}", str(i))] = tuple(entry["shape"])
    return out


K = 3


def several_pairs(batch: Batch, k: int = K) -> Batch:
    """The batch with K draws per sample; the first is the one it had."""
    g = torch.Generator().manual_seed(9)
    first_noise, first_time = flow(batch).noise, flow(batch).time
    noise = torch.randn(len(batch), k - 1, *first_noise.shape[1:], generator=g)
    time = torch.rand(len(batch), k - 1, generator=g) * 0.999 + 0.001
    draws = FlowDraws(torch.cat((first_noise[:, None], noise), 1), torch.cat((first_time[:, None], time), 1))
    return replace(batch, draws=draws)


def flow(batch: Batch) -> FlowDraws:
    """Noise and time of a batch."""
    assert isinstance(batch.draws, FlowDraws)
    return batch.draws
