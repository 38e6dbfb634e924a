"""Defines and checks the keys of π0's model JSON. It imports no torch: a configuration error must show within a second."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

from agent.models.base import Reading
from agent.models.common.sizes import GEMMA, VISION, GemmaVariant, VisionVariant, patches_per_camera, resolve
from agent.models.lerobot_config import SharedKey, TrainableConfig, refuse
from agent.models.pi import vintages


@dataclass
class PI0Config(TrainableConfig):
    """Holds π0's keys. Fields and defaults are LeRobot 0.6.1's unless a key's text differs."""

    title: ClassVar[str] = "π0"
    older_names: ClassVar[dict[str, str]] = vintages.RENAMED
    shared_keys: ClassVar[tuple[SharedKey, ...]] = (
        *TrainableConfig.shared_keys,
        SharedKey("freeze_vlm", "train_expert_only"),
        SharedKey("freeze_lm_head", "freeze_lm_head"),
    )
    base_weights: ClassVar[tuple[str, ...]] = ("paligemma_pretrained_path",)
    ours_alone: ClassVar[tuple[str, ...]] = (
        *TrainableConfig.ours_alone,
        "tokenizer_path",
        "paligemma_pretrained_path",
        "freeze_lm_head",
        "vision_variant",
    )
    free_on_resume: ClassVar[tuple[str, ...]] = (
        *TrainableConfig.free_on_resume,
        *base_weights,
        "num_inference_steps",
        "tokenizer_path",
    )
    positive: ClassVar[tuple[str, ...]] = (*TrainableConfig.positive, "num_inference_steps", "tokenizer_max_length")

    paligemma_variant: GemmaVariant | str = "gemma_2b"
    """Sizes of the language model: "gemma_2b", "gemma_300m" or a table."""
    action_expert_variant: GemmaVariant | str = "gemma_300m"
    """Sizes of the action expert; depth, heads and head_dim equal the language model's."""
    vision_variant: VisionVariant | str = "so400m"
    """Sizes of the vision tower: "so400m" or a table (not in LeRobot)."""
    tokenizer_path: str = "google/paligemma-3b-pt-224"
    """Folder or Hub name of the tokenizer (not in LeRobot, which fixes it)."""
    tokenizer_max_length: int = 48
    """Instructions are padded or cut to this many tokens."""
    paligemma_pretrained_path: str | None = None
    """Folder or Hub name of a PaliGemma to start vision and language from, with a fresh expert (not in LeRobot)."""

    num_inference_steps: int = 10
    """Euler steps when sampling actions."""
    time_sampling_beta_alpha: float = 1.5
    """First parameter of the Beta distribution of flow-matching time."""
    time_sampling_beta_beta: float = 1.0
    """Second parameter of that Beta distribution."""
    time_sampling_scale: float = 0.999
    """Time is Beta · scale + offset, in (0, 1]."""
    time_sampling_offset: float = 0.001
    """See ``time_sampling_scale``."""
    min_period: float = 4e-3
    """Shortest period of the sinusoidal embedding of time."""
    max_period: float = 4.0
    """Longest period of that embedding."""
    rtc_config: dict[str, Any] | None = None
    """Real-time chunking: LeRobot's option at deployment, refused here."""

    freeze_vision_encoder: bool = False
    """Do not train the vision tower (its projector still trains)."""
    train_expert_only: bool = False
    """Train the action expert and its projections alone."""
    freeze_lm_head: bool = False
    """Do not train the token embedding, which is PaliGemma's tied language head (not in LeRobot)."""

    @classmethod
    def read(cls, values: dict[str, Any]) -> Reading:
        """Reads today's files and LeRobot's ``config.json`` of 2025, see ``ModelConfig``."""
        variant = values.get("action_expert_variant", cls.action_expert_variant)
        expert = asdict(GEMMA[variant]) if isinstance(variant, str) and variant in GEMMA else variant
        # A mistake in the expert's sizes is reported later, when the value is decoded.
        width = expert.get("width") if isinstance(expert, dict) else None
        return vintages.read(values, width, {f.name: f.default for f in fields(cls)})

    def _refuse_unsupported(self) -> None:
        refuse(
            {
                "use_peft": (
                    self.use_peft,
                    "low-rank adapters are not supported; write false, and freeze with "
                    "train_expert_only or freeze_vision_encoder",
                ),
                "rtc_config": (
                    self.rtc_config is not None,
                    "real-time chunking is an option of inference; write null, and set it in LeRobot when deploying",
                ),
                "paligemma_pretrained_path": (
                    None not in (self.paligemma_pretrained_path, self.pretrained_path),
                    "pretrained_path brings these weights too; write one of them",
                ),
            }
        )
        super()._refuse_unsupported()

    def _check_sizes(self) -> None:
        super()._check_sizes()
        if not (
            0 <= self.time_sampling_offset < self.time_sampling_offset + self.time_sampling_scale <= 1 + 1e-9
            and min(self.time_sampling_beta_alpha, self.time_sampling_beta_beta) > 0
        ):
            raise ValueError("time_sampling_*: time leaves (0, 1]; write scale 0.999, offset 0.001, alpha, beta > 0")
        if not 0 < self.min_period < self.max_period:
            raise ValueError(f"min_period: {self.min_period} is not within 0..max_period ({self.max_period})")
        for key in ("heads", "kv_heads", "head_dim", "depth"):
            ours, theirs = getattr(self.expert, key), getattr(self.language, key)
            if ours != theirs:
                raise ValueError(
                    f"action_expert_variant: {key} is {ours} but paligemma_variant's is {theirs}; the "
                    "expert attends to the language model layer by layer: write the same"
                )
        for key, table in (("paligemma_variant", self.language), ("action_expert_variant", self.expert)):
            if min(asdict(table).values()) < 1 or table.heads % table.kv_heads or table.head_dim % 2 or table.width % 2:
                raise ValueError(f"{key}: {table} needs positive sizes, heads a multiple of kv_heads, even dims")
        if min(asdict(self.vision).values()) < 1 or self.vision.width % self.vision.heads:
            raise ValueError(f"vision_variant: {self.vision} needs positive sizes, width a multiple of heads")
        height, width = self.image_resolution
        if height != width or height < 1 or height % self.vision.patch_size:
            raise ValueError(
                f"image_resolution: {height}×{width} is not square and divisible by the patch size "
                f"{self.vision.patch_size}; write for example [224, 224]"
            )

    @property
    def language(self) -> GemmaVariant:
        """Returns the sizes of the language model."""
        return resolve("paligemma_variant", self.paligemma_variant, GEMMA)

    @property
    def expert(self) -> GemmaVariant:
        """Returns the sizes of the action expert."""
        return resolve("action_expert_variant", self.action_expert_variant, GEMMA)

    @property
    def vision(self) -> VisionVariant:
        """Returns the sizes of the vision tower."""
        return resolve("vision_variant", self.vision_variant, VISION)

    def to_lerobot(self, last_update: int = 30_000) -> dict[str, Any]:
        """Returns LeRobot's ``config.json``, see ``TrainableConfig``.

        A table of sizes that has a name is written as this name; LeRobot refuses other tables by itself.
        """
        out = super().to_lerobot(last_update)
        for key, table in (("paligemma_variant", self.language), ("action_expert_variant", self.expert)):
            out[key] = next((name for name, known in GEMMA.items() if known == table), asdict(table))
        if self.vision != VISION["so400m"]:
            out["vision_variant"] = asdict(self.vision)
        return out

    @property
    def patches_per_camera(self) -> int:
        """Returns the number of tokens of an image."""
        return patches_per_camera(self.vision, self.image_resolution[0])
