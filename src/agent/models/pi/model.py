"""Implements π0 in plain PyTorch: a SigLIP vision tower, a Gemma language model and a Gemma action expert.

Images and instruction form the prefix, which attends to itself. Robot state and noisy actions form the suffix: at
each layer the expert attends to that layer's prefix keys and values and to the suffix. See π0
(https://arxiv.org/abs/2410.24164), PaliGemma (https://arxiv.org/abs/2407.07726) and openpi. The results are those of
LeRobot 0.6.1, but the order of the computation differs: the prefix never waits for the suffix, and tensors that the loss
does not reach are not computed. Shape suffixes are explained in ``agent.batch``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from agent.batch import EMPTY_CAMERA, Batch, Draws, Observation
from agent.models.common.gemma import Gemma
from agent.models.common.modules import (
    Conv2d,
    Embedding,
    Float32Linear,
    KeysValues,
    LayerNorm,
    Linear,
    RMSNorm,
    Rope,
    rotary,
)
from agent.models.common.packing import Arrangement, arrange
from agent.models.common.siglip import Vision
from agent.models.flow_matching import FlowDraws, euler, interpolate, per_sample_loss
from agent.models.pi.configuration import PI0Config
from agent.models.policy import Policy


def sinusoidal(time: Tensor, width: int, min_period: float, max_period: float) -> Tensor:
    """Embeds time as (…, width): sines, then cosines, of periods from ``min_period`` to ``max_period``."""
    fraction = torch.linspace(0.0, 1.0, width // 2, dtype=torch.float64, device=time.device)
    period = min_period * (max_period / min_period) ** fraction
    # In float64, because the shortest period gives angles above a thousand, which would lose four digits in float32.
    angles = (1.0 / period * 2 * math.pi) * time[..., None]
    return torch.cat((angles.sin(), angles.cos()), dim=-1).type_as(time)


def prepare_images(images: Tensor, resolution: tuple[int, int]) -> Tensor:
    """Converts images (B, 3, H, W), uint8 in [0, 255] or float in [0, 1], to float32 in [-1, 1] at the model's size.

    Images of another size are scaled to fit and padded with black on both sides, as in openpi's ``resize_with_pad``.
    """
    images = images.float() / 255.0 if images.dtype == torch.uint8 else images.float()
    height, width = resolution
    if images.shape[-2:] != (height, width):
        ratio = max(images.shape[-1] / width, images.shape[-2] / height)
        size = (int(images.shape[-2] / ratio), int(images.shape[-1] / ratio))
        images = F.interpolate(images, size=size, mode="bilinear", align_corners=False).clamp(0.0, 1.0)
        top, left = (height - size[0]) // 2, (width - size[1]) // 2
        images = F.pad(images, (left, width - size[1] - left, top, height - size[0] - top))
    return images * 2.0 - 1.0


class Prefix(NamedTuple):
    """Holds what the suffix needs of images and instruction: keys and values, its own positions, and its mask."""

    keys_values: list[KeysValues]
    rope: Rope
    """Cosine and sine of the suffix's positions."""
    mask: Tensor
    """(B or 1, 1, 1 + K·T, N + 1 + K·T) bool: which tokens each token of the suffix attends to."""


class PI0(Policy):
    """Is π0's network. After building it, on any device, call ``init_weights`` or load weights."""

    loss_weights: ClassVar[Mapping[str, float]] = {"flow": 1.0}

    def __init__(self, config: PI0Config) -> None:
        super().__init__()
        self.config = config
        language, expert = config.language, config.expert
        self.vision = Vision(config.vision, config.image_resolution[0])
        self.projector = Linear(config.vision.width, language.width)
        self.language = Gemma(language, embedding=True)
        self.expert = Gemma(expert, embedding=False)
        self.state_proj = Linear(config.max_state_dim, expert.width)
        self.action_in_proj = Linear(config.max_action_dim, expert.width)
        self.action_time_mlp_in = Linear(2 * expert.width, expert.width)
        self.action_time_mlp_out = Linear(expert.width, expert.width)
        self.action_out_proj = Float32Linear(expert.width, config.max_action_dim)

    # ---- contract

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Returns the flow-matching loss of each sample, (B,) float32."""
        errors = self.velocity_errors(batch)
        return {"flow": per_sample_loss(errors, batch.actions.is_pad, batch.actions.dim_mask)}

    def velocity_errors(self, batch: Batch) -> Tensor:
        """Returns the squared error of the predicted velocity, float32, in the shape of the noise, padding included."""
        assert isinstance(batch.draws, FlowDraws)
        noise, time = batch.draws.noise, batch.draws.time
        noisy, target = interpolate(batch.actions.values, noise, time)
        prefix = self.encode_prefix(batch.observation, draws=1 if time.dim() == 1 else time.shape[1])
        return (target - self.velocity(prefix, batch.observation.state, noisy, time)).square()

    @torch.no_grad()
    def sample_actions(self, observation: Observation, draws: Draws, num_steps: int | None = None) -> Tensor:
        """Predicts normalised actions (B, T, A) from initial noise (B, T, A); the prefix is computed once."""
        assert isinstance(draws, FlowDraws)
        prefix = self.encode_prefix(observation)
        return euler(
            lambda noisy_BTA, time_B: self.velocity(prefix, observation.state, noisy_BTA, time_B),
            draws.noise,
            num_steps or self.config.num_inference_steps,
        )

    def frozen_parameters(self) -> dict[str, str]:
        """Lists the parameters that must not be trained, see ``Policy``."""
        config, last = self.config, f"language.layers.{len(self.language.layers) - 1}."
        unreached = "of the last prefix layer, only keys and values reach the loss"
        rules = {  # the first rule that matches gives the reason
            "language.norm.": "the prefix's final norm does not reach the loss",
            f"{last}self_attn.q_proj.": unreached,
            f"{last}self_attn.o_proj.": unreached,
            f"{last}post_attention_layernorm.": unreached,
            f"{last}mlp.": unreached,
        }
        if not self.cameras:
            rules |= dict.fromkeys(("vision.", "projector."), "the model has no camera")
        if config.train_expert_only:
            for part in ("vision.", "projector.", "language."):
                rules.setdefault(part, "train_expert_only")
        if config.freeze_vision_encoder:
            rules.setdefault("vision.", "freeze_vision_encoder")
        if config.freeze_lm_head:
            rules["language.embedding."] = "freeze_lm_head"
        names = [name for name, _ in self.named_parameters()]
        return {name: why for name in names for why in [v for k, v in rules.items() if name.startswith(k)][:1]}

    def wrap_units(self) -> list[nn.Module]:
        """Lists the layers of all three transformers, see ``Policy``."""
        return [*self.vision.layers, *self.language.layers, *self.expert.layers]

    def shard_units(self) -> list[nn.Module]:
        """Adds the token embedding, the largest tensor, see ``Policy``."""
        return [self.language.embedding, *self.wrap_units()]

    def fp8_layers(self) -> list[nn.Module]:
        """Lists the layers of the language model's MLPs, most of π0's arithmetic; the last MLP does not reach the loss."""
        named = self.language.layers[:-1].named_modules()
        return [module for name, module in named if ".mlp." in name and isinstance(module, Linear)]

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Draws weights as Hugging Face's SigLIP and Gemma and torch's ``Linear`` do, see ``Policy``."""
        for name, module in self.named_modules():
            if isinstance(module, RMSNorm):
                nn.init.zeros_(module.weight)
            elif isinstance(module, LayerNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, Conv2d):
                # This is LeCun's normal distribution.
                fan_in = module.weight[0].numel()
                nn.init.trunc_normal_(module.weight, std=fan_in**-0.5 / 0.87962566103423978, generator=generator)
                assert module.bias is not None
                nn.init.zeros_(module.bias)
            elif isinstance(module, Embedding):
                std = module.embedding_dim**-0.5 if name.startswith("vision.") else 0.02
                nn.init.normal_(module.weight, std=std, generator=generator)
            elif isinstance(module, Linear):
                self._init_linear(name, module, generator)

    def _init_linear(self, name: str, module: Linear, generator: torch.Generator) -> None:
        if name.startswith("vision."):
            nn.init.xavier_uniform_(module.weight, generator=generator)
            nn.init.normal_(module.bias, std=1e-6, generator=generator)
        elif name.startswith(("language.", "expert.")):
            nn.init.normal_(module.weight, std=0.02, generator=generator)
        else:
            bound = module.in_features**-0.5
            nn.init.uniform_(module.weight, -bound, bound, generator=generator)
            nn.init.uniform_(module.bias, -bound, bound, generator=generator)

    # ---- forward pass

    @property
    def cameras(self) -> list[str]:
        """Lists the camera slots that can hold an image."""
        return [slot for slot in self.config.camera_slots if not slot.startswith(EMPTY_CAMERA)]

    def embed_images(self, images: Tensor) -> Tensor:
        """Embeds images (B, 3, H, W) in [-1, 1] as tokens (B, P, D)."""
        train = not (self.config.freeze_vision_encoder or self.config.train_expert_only)
        with torch.set_grad_enabled(train and torch.is_grad_enabled()):
            hidden = self.vision.patch_embedding(images).flatten(2).transpose(1, 2)
            # The residual stream is float32, under autocast and with bfloat16 weights too.
            hidden = hidden + self.vision.position_embedding.weight.float()
            for layer in self.vision.layers:
                hidden = layer(hidden)
            hidden = self.vision.post_layernorm(hidden)
        return self.projector(hidden)

    def embed_prefix(self, observation: Observation) -> tuple[Tensor, Arrangement]:
        """Returns the real tokens of cameras and instruction, (B, N, D) or packed (1, N, D), and how they are arranged."""
        slots = [slot for slot in self.config.camera_slots if slot in observation.images]
        assert len(slots) == len(observation.images), (
            f"the batch has cameras {sorted(observation.images)}, the model knows {self.config.camera_slots}"
        )
        assert slots or not self.cameras, f"the batch has no image; the model expects some of {self.cameras}"
        tokens, patches = observation.tokens, self.config.patches_per_camera
        arranged = arrange(observation.parts(), slots, patches, tokens.shape[1], tokens.device)
        images = []
        for slot, rows in zip(slots, arranged.rows, strict=True):
            present = observation.images[slot] if rows is None else observation.images[slot][rows]
            images.append(prepare_images(present, self.config.image_resolution))
        # All cameras go through in one call, so that the tower gets one large batch instead of several small ones.
        seen = self.embed_images(torch.cat(images)).float().split([len(x) for x in images]) if images else []
        words = tokens[:, : arranged.words] if isinstance(arranged.words, int) else tokens.flatten()[arranged.words]
        embedding = self.language.embedding
        # Gemma scales its token embeddings; image tokens stay as they are. The residual stream, to which every layer adds a
        # little, is float32 under autocast too.
        return arranged.join(seen, embedding(words).float() * embedding.embedding_dim**0.5), arranged

    def encode_prefix(self, observation: Observation, draws: int = 1) -> Prefix:
        """Computes each layer's keys and values of the prefix, and positions and mask of a suffix of K draws."""
        train = not self.config.train_expert_only
        with torch.set_grad_enabled(train and torch.is_grad_enabled()):
            hidden, arranged = self.embed_prefix(observation)
            rope = rotary(arranged.positions, self.config.language.head_dim)
            keys_values, last = [], len(self.language.layers) - 1
            for i, layer in enumerate(self.language.layers):
                hidden, own = layer(hidden, rope, arranged.packing, None, i == last)
                keys_values.append(arranged.spread(own))
        # The suffix is the state, then the actions of each draw. Its positions continue after the real tokens of the prefix,
        # for each draw as if it were the only one. The state attends to the prefix and itself, so it is the same for all
        # draws; the actions also attend to the state and to the actions of their own draw.
        chunk, device = self.config.chunk_size, hidden.device
        draw_of = torch.arange(draws * chunk, device=device) // chunk
        positions = arranged.lengths + F.pad(torch.arange(draws * chunk, device=device) % chunk + 1, (1, 0))
        block = F.pad(draw_of[:, None] == draw_of, (0, 0, 1, 0))
        block = F.pad(block, (1, 0), value=True)
        real = torch.ones_like(arranged.positions, dtype=torch.bool) if arranged.mask is None else arranged.mask
        seen = torch.cat((real[:, None].expand(-1, len(block), -1), block.expand(len(real), -1, -1)), dim=-1)
        return Prefix(keys_values, rotary(positions, self.config.expert.head_dim), seen[:, None])

    def embed_suffix(self, state_BS: Tensor, noisy: Tensor, time: Tensor) -> Tensor:
        """Returns the tokens of the state and of the noisy actions mixed with time, (B, 1 + K·T, D)."""
        time_D = sinusoidal(time, self.config.expert.width, self.config.min_period, self.config.max_period)
        actions = self.action_in_proj(noisy)
        mixed = torch.cat((actions, time_D.unsqueeze(-2).expand_as(actions).type_as(actions)), dim=-1)
        actions = self.action_time_mlp_out(F.silu(self.action_time_mlp_in(mixed)))
        return torch.cat((self.state_proj(state_BS)[:, None], actions.flatten(1, -2)), dim=1).float()

    def velocity(self, prefix: Prefix, state_BS: Tensor, noisy: Tensor, time: Tensor) -> Tensor:
        """Predicts the velocity, float32, at noisy actions (B, T, A) and time (B,), or (B, K, T, A) and (B, K)."""
        assert noisy.shape[-2] == self.config.chunk_size, noisy.shape
        hidden = self.embed_suffix(state_BS, noisy, time)
        for layer, past in zip(self.expert.layers, prefix.keys_values, strict=True):
            hidden, _ = layer(hidden, prefix.rope, prefix.mask, past)
        with torch.autocast(hidden.device.type, enabled=False):
            return self.action_out_proj(self.expert.norm(hidden)[:, 1:].float()).view_as(noisy)
