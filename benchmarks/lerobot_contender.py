"""LeRobot's own policy at the sizes of ours, and its training step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from contenders import ACTION_DIM, MAX_GRAD_NORM, STATE_DIM, Contender, autocast, make_weights

from agent.batch import Batch
from agent.models.pi import adapter
from agent.models.pi.configuration import PI0Config


class LeRobot(Contender):
    """LeRobot 0.6.1's `PI0Policy`, trained as its `lerobot_train.update_policy` does.

    Args:
        dtype: the policy's `dtype`; bfloat16 also turns Accelerate's autocast on, as there.
        compile_mode: the policy's, with `compile_model`; None for eager.
        checkpointing: the policy's `gradient_checkpointing`.
    """

    def __init__(
        self,
        ours: PI0Config,
        batch: Batch,
        device: torch.device,
        *,
        dtype: str = "float32",
        compile_mode: str | None = None,
        checkpointing: bool = False,
    ) -> None:
        self.device, self.dtype = device, dtype
        compiled = {"compile_model": True, "compile_mode": compile_mode} if compile_mode else {}
        self.name = f"LeRobot {dtype}" + bool(compiled) * " compiled" + checkpointing * " checkpointed"
        config = lerobot_config(ours, device, dtype=dtype, gradient_checkpointing=checkpointing, **compiled)
        tf32 = torch.get_float32_matmul_precision()
        with lerobot_of_size(ours) as modeling, torch.device(device):
            self.policy = modeling.PI0Policy(config)
        torch.set_float32_matmul_precision(tf32)  # `compile_model` lowers it for the whole process
        self.policy.load_state_dict(adapter.to_lerobot(make_weights(ours, device), ours), strict=True)
        self.policy.train()
        self.batch = lerobot_batch(ours, batch, device)
        self.policy.model.sample_noise = lambda shape, where: self.batch["noise"]
        self.policy.model.sample_time = lambda size, where: self.batch["time"]
        self.optimizer: torch.optim.Optimizer | None = None

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
        with autocast(self.device, self.dtype == "bfloat16"):
            loss, _ = self.policy.forward(self.batch)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), MAX_GRAD_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        loss.item(), norm.item()  # its training logs them, and waits for them
        torch.backends.cuda.matmul.allow_tf32 = tf32
        return loss.detach()

    def loss(self, exact: bool = False) -> float:
        with torch.no_grad(), autocast(self.device, self.dtype == "bfloat16" and not exact):
            return float(self.policy.forward(self.batch)[0])


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
        num_inference_steps=ours.num_inference_steps,
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
