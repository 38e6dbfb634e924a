"""This code's training step and LeRobot's, ready to be timed against each other: same weights, same batch, one device.

Used by `train_step.py` and `memory.py`. Neither step reads data: the batch lies on the device. Both are forward,
backward, clipping and AdamW as the respective training loop does them, with fused AdamW on both sides.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from agent.batch import Batch, SampleSpec, to_device
from agent.configuration_pipeline import TrainPipelineConfig, reconcile
from agent.data.configuration import DataConfig
from agent.data.samples.reader import Sample, collate
from agent.models.common.sizes import GemmaVariant, VisionVariant
from agent.models.flow_matching import FlowDraws
from agent.models.lerobot_config import FeatureSpec
from agent.models.pi import adapter
from agent.models.pi.configuration import PI0Config
from agent.models.pi.model import PI0
from agent.optim.learning_rate import LearningRate
from agent.optim.optimizer import freeze, make_optimizer
from agent.parallel.launch import Launch
from agent.parallel.processes import Processes
from agent.parallel.wrap import parallelize
from agent.settings.plan import Plan
from agent.training.step import train_step
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
SIZES: dict[str, dict[str, Any]] = {"reduced": REDUCED, "full": {}}


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


def make_batch(config: PI0Config, present: int, size: int, tokens: int, draws: int = 1) -> Batch:
    """A batch as the loader makes it: ``present`` of the model's cameras, instructions of ``tokens`` tokens.

    ``draws`` above 1 gives each sample so many pairs of noise and time, which LeRobot does not know.
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

    def sample(k: int) -> Sample:
        chunk = (config.chunk_size, config.max_action_dim)
        dim_mask = np.arange(config.max_action_dim) < ACTION_DIM
        pixels = (3, *config.image_resolution)
        return Sample(
            images={
                camera(i): torch.from_numpy(random.integers(0, 256, pixels, dtype=np.uint8)) for i in range(present)
            },
            state=random.standard_normal(config.max_state_dim, np.float32)
            * (np.arange(config.max_state_dim) < STATE_DIM),
            tokens=random.integers(1, config.language.vocab_size, tokens),
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


def make_weights(config: PI0Config, device: torch.device) -> dict[str, torch.Tensor]:
    """Weights of which every part does something: attention is not uniform, norms and biases are not trivial."""
    with torch.device("meta"):
        policy = PI0(config)
    policy.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    policy.init_weights(generator)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator, device=device)
    return {name: tensor.cpu() for name, tensor in policy.state_dict().items()}


class Contender:
    """Something that trains on one batch again and again.

    On a GPU only the one whose turn it is lies there; the others wait in host memory without gradients and optimizer
    state, because two full models with float32 masters do not fit one card.
    """

    name: str
    device: torch.device

    def module(self) -> torch.nn.Module:
        """The model, to be moved."""
        raise NotImplementedError

    def arm(self) -> None:
        """A fresh optimizer over the module's parameters where they are now."""
        raise NotImplementedError

    def step(self) -> torch.Tensor:
        """One update; the mean loss before it, still on the device."""
        raise NotImplementedError

    def loss(self, exact: bool = False) -> float:
        """The mean loss of the batch, without an update; ``exact`` in float32, if the weights are."""
        raise NotImplementedError

    def wake(self) -> None:
        """To the device, ready to train."""
        self.module().to(self.device)
        self.arm()

    def rest(self) -> None:
        """Away from a GPU. On a CPU nothing moves and the optimizer goes on."""
        raise NotImplementedError


@dataclass
class _NoClock:
    """In place of the trainer's clock: nothing waits for data here."""

    waiting_for_data = staticmethod(contextlib.nullcontext)


class Ours(Contender):
    """`agent.training.step.train_step` over a model that `agent.parallel.wrap` has wrapped."""

    def __init__(
        self, config: TrainPipelineConfig, batch: Batch, weights: dict[str, Any], device: torch.device
    ) -> None:
        self.config, self.device = config, device
        self.name = "agent " + ("bfloat16" if config.use_bf16 else "float32")
        model_cfg: Any = config.model_cfg
        with torch.device("meta"):
            self.policy = PI0(model_cfg)
        if config.precision == "bfloat16_stochastic":
            self.policy.to(torch.bfloat16)
        self.policy.to_empty(device=device)
        self.policy.load_state_dict(weights)
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

    def module(self) -> torch.nn.Module:
        return self.policy

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

    def step(self) -> torch.Tensor:
        clock: Any = _NoClock()
        assert self.run is not None
        result = train_step(self.run, itertools.repeat(self.batch), clock)
        return result.loss_sums["loss"] / len(self.batch)

    def loss(self, exact: bool = False) -> float:
        with torch.no_grad(), _autocast(self.device, bool(self.config.use_bf16) and not exact):
            return float(self.policy.total(self.model(self.batch)).mean())

    def rest(self) -> None:
        if self.device.type == "cuda":
            self.run = None
            self.policy.zero_grad(set_to_none=True)
            _leave_gpu(self.policy)


class LeRobot(Contender):
    """LeRobot 0.6.1's `PI0Policy`, trained as its `lerobot_train.update_policy` does.

    Args:
        dtype: the policy's `dtype`; bfloat16 also turns Accelerate's autocast on, as there.
        compiled: the policy's `compile_model`.
        checkpointing: the policy's `gradient_checkpointing`.
    """

    def __init__(
        self,
        ours: PI0Config,
        batch: Batch,
        weights: dict[str, Any],
        device: torch.device,
        *,
        dtype: str = "float32",
        compiled: bool = False,
        checkpointing: bool = False,
    ) -> None:
        self.device, self.dtype = device, dtype
        self.name = f"LeRobot {dtype}" + compiled * " compiled" + checkpointing * " checkpointed"
        config = lerobot_config(ours, device, dtype=dtype, compile_model=compiled, gradient_checkpointing=checkpointing)
        with lerobot_of_size(ours) as modeling, torch.device(device):
            self.policy = modeling.PI0Policy(config)
        self.policy.load_state_dict(adapter.to_lerobot(weights, ours), strict=True)
        self.policy.train()
        self.batch = lerobot_batch(ours, batch, device)
        self.policy.model.sample_noise = lambda shape, where: self.batch["noise"]
        self.policy.model.sample_time = lambda size, where: self.batch["time"]
        self.optimizer: torch.optim.Optimizer | None = None

    def module(self) -> torch.nn.Module:
        return self.policy

    def arm(self) -> None:
        if self.optimizer is None:
            preset = self.policy.config.get_optimizer_preset()
            self.optimizer = torch.optim.AdamW(
                self.policy.parameters(),
                lr=preset.lr,
                betas=preset.betas,
                eps=preset.eps,
                weight_decay=preset.weight_decay,
                fused=True,
            )

    def step(self) -> torch.Tensor:
        assert self.optimizer is not None
        # As its training sets it, on a GPU.
        tf32, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, True
        with _autocast(self.device, self.dtype == "bfloat16"):
            loss, _ = self.policy.forward(self.batch)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), MAX_GRAD_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        loss.item(), norm.item()  # its training logs them, and waits for them
        torch.backends.cuda.matmul.allow_tf32 = tf32
        return loss.detach()

    def loss(self, exact: bool = False) -> float:
        with torch.no_grad(), _autocast(self.device, self.dtype == "bfloat16" and not exact):
            return float(self.policy.forward(self.batch)[0])

    def rest(self) -> None:
        if self.device.type == "cuda":
            self.optimizer = None
            self.policy.zero_grad(set_to_none=True)
            _leave_gpu(self.policy)


def _autocast(device: torch.device, on: bool) -> contextlib.AbstractContextManager:
    return torch.autocast(device.type, dtype=torch.bfloat16) if on else contextlib.nullcontext()


def _leave_gpu(module: torch.nn.Module) -> None:
    module.to("cpu")
    gc.collect()
    torch.cuda.empty_cache()


def lerobot_config(ours: PI0Config, device: torch.device, **changes: Any) -> Any:
    """LeRobot's config of the same model."""
    from lerobot.configs import FeatureType, PolicyFeature
    from lerobot.policies.pi0.configuration_pi0 import PI0Config as Theirs

    shape = (3, *ours.image_resolution)
    features = {slot: PolicyFeature(FeatureType.VISUAL, shape) for slot in ours.camera_slots}
    return Theirs(
        device=str(device),
        chunk_size=ours.chunk_size,
        n_action_steps=ours.chunk_size,
        image_resolution=tuple(ours.image_resolution),
        tokenizer_max_length=ours.tokenizer_max_length,
        input_features=features | {"observation.state": PolicyFeature(FeatureType.STATE, (STATE_DIM,))},
        output_features={"action": PolicyFeature(FeatureType.ACTION, (ACTION_DIM,))},
        push_to_hub=False,
        **changes,
    )


def lerobot_batch(ours: PI0Config, batch: Batch, device: torch.device) -> dict[str, torch.Tensor]:
    """What LeRobot's preprocessor hands to the policy: absent cameras are missing keys, instructions are padded."""
    observation = batch.observation
    missing = ours.tokenizer_max_length - observation.tokens.shape[1]
    tree = {slot: image.float() / 255 for slot, image in observation.images.items()} | {
        "observation.state": observation.state[:, :STATE_DIM],
        "observation.language.tokens": torch.nn.functional.pad(observation.tokens, (0, missing)),
        "observation.language.attention_mask": torch.nn.functional.pad(observation.token_mask, (0, missing)),
        "action": batch.actions.values[..., :ACTION_DIM],
        "noise": batch.draws.noise,
        "time": batch.draws.time,
    }
    return {name: tensor.to(device) for name, tensor in tree.items()}


@contextlib.contextmanager
def lerobot_of_size(ours: PI0Config) -> Iterator[Any]:
    """LeRobot's modelling module, which builds policies of this config's sizes meanwhile; it has names for two only."""
    import lerobot.policies.pi0.modeling_pi0 as modeling

    def sizes(variant: str) -> SimpleNamespace:
        table = ours.language if variant == "gemma_2b" else ours.expert
        return SimpleNamespace(**vars(table), num_heads=table.heads, num_kv_heads=table.kv_heads)

    vlm, expert = modeling.PaliGemmaForConditionalGenerationWithPiGemma, modeling.PiGemmaForCausalLM
    original = modeling.get_gemma_config

    class Vlm(vlm):
        def __init__(self, config: Any) -> None:
            vision, text = config.vision_config, config.text_config
            vision.hidden_size, vision.intermediate_size = ours.vision.width, ours.vision.mlp_dim
            vision.num_hidden_layers, vision.num_attention_heads = ours.vision.depth, ours.vision.heads
            vision.patch_size = ours.vision.patch_size
            vision.projection_dim, text.vocab_size = ours.language.width, ours.language.vocab_size
            super().__init__(config)

    class Expert(expert):
        def __init__(self, config: Any) -> None:
            config.vocab_size = ours.expert.vocab_size
            super().__init__(config)

    modeling.get_gemma_config = sizes
    modeling.PaliGemmaForConditionalGenerationWithPiGemma, modeling.PiGemmaForCausalLM = Vlm, Expert
    try:
        yield modeling
    finally:
        modeling.get_gemma_config = original
        modeling.PaliGemmaForConditionalGenerationWithPiGemma, modeling.PiGemmaForCausalLM = vlm, expert
