"""This code's training step and LeRobot's, ready to be timed against each other: same weights, same batch, one device.

Used by `train_step.py`, `memory.py` and `gpu.py`. Neither step reads data: the batch lies on the device. Both are forward,
backward, clipping and AdamW as the respective training loop does them, with fused AdamW on both sides.
"""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from agent.batch import Batch, Real, SampleSpec, map_tensors, to_device
from agent.configuration_pipeline import TrainPipelineConfig, reconcile
from agent.data.configuration import DataConfig
from agent.data.samples.reader import Sample, collate
from agent.models.common.fp8 import use_fp8
from agent.models.common.sizes import GemmaVariant, VisionVariant
from agent.models.flow_matching import FlowDraws
from agent.models.lerobot_config import FeatureSpec
from agent.models.pi.configuration import PI0Config
from agent.models.pi.model import PI0
from agent.optim.learning_rate import LearningRate
from agent.optim.optimizer import freeze, make_optimizer
from agent.parallel.launch import Launch
from agent.parallel.processes import Processes
from agent.parallel.wrap import parallelize
from agent.settings.plan import Plan
from agent.training.step import graphed_passes, train_step
from agent.training.train_state import Run, TrainState

STATE_DIM, ACTION_DIM = 8, 7
MAX_GRAD_NORM = 1.0

# Narrower and shallower than π0, with its numbers of tokens; LeRobot's attention assumes eight heads.
_LANGUAGE = {"width": 192, "depth": 6, "mlp_dim": 1536, "heads": 8, "kv_heads": 1, "head_dim": 24, "vocab_size": 4096}
REDUCED: dict[str, Any] = {
    "paligemma_variant": GemmaVariant(**_LANGUAGE),
    "action_expert_variant": GemmaVariant(**(_LANGUAGE | {"width": 96, "mlp_dim": 384})),
    "vision_variant": VisionVariant(width=112, depth=9, mlp_dim=416, heads=4, patch_size=14),
}
# Small enough to compute in no time, for a rehearsal of what is to run elsewhere.
_TINY_LANGUAGE = {"width": 64, "depth": 2, "mlp_dim": 96, "heads": 8, "kv_heads": 1, "head_dim": 16, "vocab_size": 128}
TINY: dict[str, Any] = {
    "paligemma_variant": GemmaVariant(**_TINY_LANGUAGE),
    "action_expert_variant": GemmaVariant(**(_TINY_LANGUAGE | {"width": 48, "mlp_dim": 80})),
    "vision_variant": VisionVariant(width=32, depth=2, mlp_dim=40, heads=4, patch_size=14),
    "image_resolution": (28, 28),
    "chunk_size": 6,
    "n_action_steps": 6,
    "tokenizer_max_length": 16,
    "num_inference_steps": 3,
}
SIZES: dict[str, dict[str, Any]] = {"tiny": TINY, "reduced": REDUCED, "full": {}}


def camera(index: int) -> str:
    """Name of a camera slot."""
    return f"observation.images.camera_{index}"


def model_config(size: str, cameras: int) -> PI0Config:
    """The model of this size with so many camera slots."""
    values = SIZES[size]
    shape = [3, *values.get("image_resolution", (224, 224))]
    features = {camera(i): FeatureSpec("VISUAL", shape) for i in range(cameras)}
    return PI0Config(
        **values,
        input_features=features | {"observation.state": FeatureSpec("STATE", [STATE_DIM])},
        output_features={"action": FeatureSpec("ACTION", [ACTION_DIM])},
        optimizer_grad_clip_norm=MAX_GRAD_NORM,
        compile_mode="default",  # as runs have it on a GPU; max-autotune takes many minutes
    )


def train_config(model: PI0Config, batch: int, **changes: Any) -> TrainPipelineConfig:
    """A training config with its defaults, but for the batch and ``changes``; YAML and JSON made to agree."""
    config = TrainPipelineConfig(
        model_cfg=model,
        data=DataConfig(),
        name="benchmark",
        use_wandb=False,
        global_batch_size=batch,
        per_device_batch_size=batch,
        n_updates=1_000_000,
        **changes,
    )
    reconcile(config)
    return config


def make_batch(config: PI0Config, present: int, size: int, tokens: int, draws: int = 1, padding: str = "none") -> Batch:
    """A batch as the loader makes it: ``present`` of the model's cameras, instructions of ``tokens`` tokens.

    Args:
        config: the model's.
        present: cameras with an image.
        size: samples.
        tokens: of the longest instruction.
        draws: above 1, pairs of noise and time of each sample, which LeRobot does not know.
        padding: ``language``: the first instruction has all its tokens, the others from 8 on, as real ones differ;
            ``mixed``: besides, every other sample has the first camera alone, as in a mixture of robots.
    """
    spec = SampleSpec(
        config.chunk_size,
        config.max_state_dim,
        config.max_action_dim,
        tuple(config.image_resolution),
        config.tokenizer_max_length,
        tuple(config.camera_slots),
        STATE_DIM,
        ACTION_DIM,
    )
    random = np.random.default_rng(1)
    lengths = np.random.default_rng(2).integers(min(8, tokens), tokens + 1, size)
    lengths[0] = tokens

    def sample(k: int) -> Sample:
        seen = 1 if padding == "mixed" and k % 2 else present
        chunk = (config.chunk_size, config.max_action_dim)
        dim_mask = np.arange(config.max_action_dim) < ACTION_DIM
        pixels = (3, *config.image_resolution)
        return Sample(
            images={camera(i): torch.from_numpy(random.integers(0, 256, pixels, dtype=np.uint8)) for i in range(seen)},
            state=random.standard_normal(config.max_state_dim, np.float32)
            * (np.arange(config.max_state_dim) < STATE_DIM),
            tokens=random.integers(1, config.language.vocab_size, tokens if padding == "none" else lengths[k]),
            actions=random.standard_normal(chunk, np.float32) * dim_mask,
            is_pad=np.zeros(config.chunk_size, bool),
            dim_mask=dim_mask,
            draws=FlowDraws(
                random.standard_normal((draws, *chunk) if draws > 1 else chunk, np.float32),
                np.float32(random.uniform(0.001, 1.0, draws) if draws > 1 else random.uniform(0.001, 1.0)),
            ),
            k=k,
            provenance=(0, 0, k),
            raw_state=np.zeros(STATE_DIM, np.float32),
            raw_actions=np.zeros((config.chunk_size, ACTION_DIM), np.float32),
            previous_action=None,
            previous_is_pad=False,
        )

    return collate([sample(k) for k in range(size)], spec, 0)


def rows_of(batch: Batch, rows: slice) -> Batch:
    """Some samples of a batch."""
    part, real = map_tensors(batch, lambda tensor: tensor[rows]), batch.observation.parts()
    kept = Real({slot: have[rows] for slot, have in real.cameras.items()}, real.tokens[rows])
    return replace(part, observation=replace(part.observation, real=kept))


def draw_weights(policy: PI0) -> None:
    """Fills the policy with weights of which every part does something: attention is not uniform, norms and biases are
    not trivial. On one device always the same."""
    device = next(policy.parameters()).device
    generator = torch.Generator(device).manual_seed(0)
    policy.init_weights(generator)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator, device=device, dtype=parameter.dtype)


def make_weights(config: PI0Config, device: torch.device) -> dict[str, torch.Tensor]:
    """The weights that :func:`draw_weights` draws, in float32 on their device."""
    with torch.device("meta"):
        policy = PI0(config)
    draw_weights(policy.to_empty(device=device))
    return policy.state_dict()


class Contender:
    """Something that trains on one batch again and again. Of the full size only one fits a GPU at a time."""

    name: str
    device: torch.device

    def arm(self) -> None:
        """Makes the optimizer, once."""
        raise NotImplementedError

    def step(self) -> torch.Tensor:
        """One update; the mean loss before it, still on the device."""
        raise NotImplementedError

    def loss(self, exact: bool = False) -> float:
        """The mean loss of the batch, without an update; ``exact`` in float32, if the weights are."""
        raise NotImplementedError


@dataclass
class _NoClock:
    """In place of the trainer's clock: nothing waits for data here."""

    waiting_for_data = staticmethod(contextlib.nullcontext)


class Ours(Contender):
    """`agent.training.step.train_step` over a model that `agent.parallel.wrap` has wrapped."""

    def __init__(self, config: TrainPipelineConfig, batch: Batch, device: torch.device) -> None:
        self.config, self.device = config, device
        recomputed = config.activation_checkpointing not in (None, "none")
        self.name = f"agent {'bfloat16' if config.use_bf16 else 'float32'}" + recomputed * " checkpointed"
        model_cfg: Any = config.model_cfg
        with torch.device("meta"):
            self.policy = PI0(model_cfg)
        if config.precision == "bfloat16_stochastic":
            self.policy.to(torch.bfloat16)
        self.policy.to_empty(device=device)
        draw_weights(self.policy)
        if config.fp8 == "mlp":
            use_fp8(self.policy.fp8_layers(), device)
        freeze(self.policy, self.policy.frozen_parameters())
        self.batch = to_device(batch, device)
        self.processes = Processes(Launch(), device)
        self.model = parallelize(
            self.policy,
            self.processes,
            activation_checkpointing=config.activation_checkpointing or "none",
            compile_mode=model_cfg.compile_mode if config.use_torch_compile else None,
        )
        self.model.train()
        self.run: Run | None = None

    def arm(self) -> None:
        if self.run is not None:
            return
        model: Any = self.config.model_cfg
        optimizer = make_optimizer(
            self.policy,
            lr=model.optimizer_lr,
            betas=tuple(model.optimizer_betas),
            eps=model.optimizer_eps,
            weight_decay=model.optimizer_weight_decay,
            eight_bit=self.config.optimizer == "adamw8bit",
            seed=self.config.seed,
        )
        rate = LearningRate.plan(model.optimizer_lr, model.scheduler_decay_lr, 0, None, 1_000_000)
        plan = Plan(1, 1, 1, 1.0, 1_000_000)
        nothing: Any = None  # of data, folder, checkpoints and metrics a step needs none
        self.run = Run(
            config=self.config,
            plan=plan,
            processes=self.processes,
            folder=None,
            checkpoints=nothing,
            data=nothing,
            policy=self.policy,
            model=self.model,
            optimizer=optimizer,
            learning_rate=rate,
            state=TrainState(),
            metrics=None,
        )
        self.run.graphs = graphed_passes(self.run)

    def step(self) -> torch.Tensor:
        clock: Any = _NoClock()
        assert self.run is not None
        result = train_step(self.run, itertools.repeat(self.batch), clock)
        return result.loss_sums["loss"] / len(self.batch)

    def loss(self, exact: bool = False) -> float:
        exact = exact and self.config.precision == "float32_master"
        with torch.no_grad(), autocast(self.device, bool(self.config.use_bf16) and not exact):
            return float(self.policy.total(self.model(self.batch)).mean())


def autocast(device: torch.device, on: bool) -> contextlib.AbstractContextManager:
    """bfloat16 products, or nothing."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if on else contextlib.nullcontext()
