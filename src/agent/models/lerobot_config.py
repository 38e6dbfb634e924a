"""Defines and checks the keys of a model JSON that every trainable policy has, under LeRobot 0.6.1's names.

A family's config inherits from ``TrainableConfig`` and adds its own keys. This module imports no torch, because a
configuration error must show within a second.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

from agent.batch import EMPTY_CAMERA, SampleSpec
from agent.models.base import ModelConfig

STATE, ACTION = "observation.state", "action"
NORMALIZATIONS = ("IDENTITY", "MEAN_STD", "MIN_MAX", "QUANTILES", "QUANTILE10")
USE_AMP = "mixed precision is the trainer's; write false here, and use_bf16: true in the training YAML"


class SharedKey(NamedTuple):
    """Pairs a key of the training YAML with the key of the model JSON that states the same choice."""

    training: str
    """The key in the training YAML."""
    model: str
    """The key in the model JSON."""
    to_model: Callable[[Any], Any] = bool
    """Converts the YAML's value to the JSON's."""
    from_model: Callable[[Any], Any] = bool
    """Converts the JSON's value to the YAML's."""


@dataclass
class FeatureSpec:
    """Describes one input or output of a policy."""

    type: str
    """VISUAL, STATE or ACTION."""
    shape: list[int]
    """[3, height, width] of a camera, else [dimensions]."""


@dataclass
class TrainableConfig(ModelConfig):
    """Holds the keys of every policy's JSON. Fields and defaults are LeRobot 0.6.1's unless a key's text differs."""

    title: ClassVar[str]
    """The policy's name in messages, such as π0."""
    shared_keys: ClassVar[tuple[SharedKey, ...]] = (
        SharedKey("max_grad_norm", "optimizer_grad_clip_norm", float, float),
        SharedKey("use_bf16", "dtype", lambda on: "bfloat16" if on else "float32", lambda dtype: dtype == "bfloat16"),
        SharedKey("use_torch_compile", "compile_model", bool, lambda on: on or None),
        SharedKey(
            "activation_checkpointing",
            "gradient_checkpointing",
            lambda how: how != "none",
            lambda on: "full" if on else "none",
        ),
    )
    """The choices that the training YAML can state too. A part that a policy cannot freeze has no entry."""
    base_weights: ClassVar[tuple[str, ...]] = ()
    """Keys that name pretrained weights of a part of the model, such as its language model."""
    ours_alone: ClassVar[tuple[str, ...]] = ("scheduler_decay_start",)
    """Keys that LeRobot does not know, and that its ``config.json`` leaves out."""
    free_on_resume: ClassVar[tuple[str, ...]] = (
        "device",
        "compile_model",
        "compile_mode",
        "gradient_checkpointing",
        "pretrained_path",
        "pretrained_revision",
        "n_action_steps",
        "push_to_hub",
        "repo_id",
        "private",
        "tags",
        "license",
    )
    """Keys that a run may change when it continues: none of them changes what it computes from here on."""
    positive: ClassVar[tuple[str, ...]] = ("chunk_size", "max_state_dim", "max_action_dim")
    """Keys whose value is at least 1."""

    n_obs_steps: int = 1
    """Observation steps that the policy sees; one here."""
    chunk_size: int = 50
    """Actions predicted at once."""
    n_action_steps: int | None = None
    """Actions executed before predicting anew; null: ``chunk_size``."""
    input_features: dict[str, FeatureSpec] | None = field(default_factory=dict)
    """Cameras and state; empty or null: taken from the dataset."""
    output_features: dict[str, FeatureSpec] | None = field(default_factory=dict)
    """The action; empty or null: taken from the dataset."""
    max_state_dim: int = 32
    """States are padded with zeros to this size."""
    max_action_dim: int = 32
    """Actions are padded with zeros to this size."""
    image_resolution: tuple[int, int] = (224, 224)
    """Images are resized to this height and width, with padding."""
    empty_cameras: int = 0
    """Camera slots to add for cameras that the robot does not have."""
    normalization_mapping: dict[str, str] = field(
        default_factory=lambda: {"VISUAL": "IDENTITY", "STATE": "MEAN_STD", "ACTION": "MEAN_STD"}
    )
    """Normalisation per feature type: IDENTITY, MEAN_STD, MIN_MAX, QUANTILES or QUANTILE10."""
    use_relative_actions: bool = False
    """Learn actions relative to the state at the chunk's first step; they are made absolute again where they are used."""
    relative_exclude_joints: list[str] = field(default_factory=lambda: ["gripper"])
    """Action dimensions whose name contains one of these words, in any case, stay absolute."""
    action_feature_names: list[str] | None = None
    """Names of the action's dimensions, for a data set that has none of its own."""

    pretrained_path: str | None = None
    """Folder or Hub name of a policy of this type to start from."""
    pretrained_revision: str | None = None
    """Hub commit, branch or tag of ``pretrained_path``."""
    dtype: str = "float32"
    """With "bfloat16", train with bfloat16 autocast, as ``use_bf16`` does. Parameters stay float32, unlike
    LeRobot's: rounded to bfloat16, they would swallow the updates of a small learning rate. The training YAML's
    ``precision`` holds them in bfloat16 without that loss."""
    device: str | None = None
    """Where to train; null: the GPU if there is one."""
    use_amp: bool = False
    """Refused: write ``use_bf16`` in the training YAML."""
    use_peft: bool = False
    """Refused: low-rank adapters are not supported."""
    gradient_checkpointing: bool = False
    """Recompute each layer's activations in the backward pass: less memory, slower."""
    compile_model: bool = False
    """Compile the layers with torch.compile. false leaves it to the training YAML's `use_torch_compile`."""
    compile_mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs", "lite"] = (
        "max-autotune"
    )
    """Mode of torch.compile; `default` where compiling was not asked for and happens by default."""

    optimizer_lr: float = 2.5e-5
    """Peak learning rate."""
    optimizer_betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's betas."""
    optimizer_eps: float = 1e-8
    """AdamW's epsilon."""
    optimizer_weight_decay: float = 0.01
    """AdamW's weight decay."""
    optimizer_grad_clip_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    scheduler_warmup_steps: int = 1_000
    """Updates of linear warm-up."""
    scheduler_decay_steps: int | None = None
    """Update at which the cosine reaches ``scheduler_decay_lr``; null: the run's last update."""
    scheduler_decay_lr: float = 2.5e-6
    """Learning rate at the end."""
    scheduler_decay_start: Literal["after_warmup", "first_update"] | None = None
    """Where the cosine begins: at the peak when the warm-up ends, as in openpi, or counted from the first update on, as in
    LeRobot, where the rate falls at the end of the warm-up (not in LeRobot). null: what the run began with, `after_warmup`
    for a run that begins."""

    push_to_hub: bool = True
    """Carried into the saved config.json; nothing is uploaded. So are the next four."""
    repo_id: str | None = None
    """Hub name for LeRobot's upload."""
    private: bool | None = None
    """Whether that upload is private."""
    tags: list[str] | None = None
    """Tags of that upload."""
    license: str | None = None
    """License of that upload."""

    def __post_init__(self) -> None:
        self._refuse_unsupported()
        self._check_sizes()
        self._check_optimizer()
        self._check_features()

    def _refuse_unsupported(self) -> None:
        refuse(
            {
                "n_obs_steps": (self.n_obs_steps != 1, f"{self.title} sees a single observation step; write 1"),
                "use_amp": (self.use_amp, USE_AMP),
                "use_peft": (self.use_peft, "low-rank adapters are not supported; write false"),
                "dtype": (
                    self.dtype not in ("float32", "bfloat16"),
                    f"unknown {self.dtype!r}; write float32 or bfloat16",
                ),
                "pretrained_revision": (
                    self.pretrained_revision is not None and self.pretrained_path is None,
                    "it pins pretrained_path, which is not set; write null or set both",
                ),
            }
        )

    def _check_sizes(self) -> None:
        for key in self.positive:
            if getattr(self, key) < 1:
                raise ValueError(f"{key}: {getattr(self, key)} is not positive; write at least 1")
        if not 1 <= self.action_steps <= self.chunk_size:
            raise ValueError(f"n_action_steps: {self.n_action_steps} is not within 1..chunk_size ({self.chunk_size})")
        if self.empty_cameras < 0:
            raise ValueError(f"empty_cameras: {self.empty_cameras} is negative; write 0 or more")

    def _check_optimizer(self) -> None:
        for key in (
            "optimizer_weight_decay",
            "optimizer_grad_clip_norm",
            "scheduler_warmup_steps",
            "scheduler_decay_lr",
        ):
            if getattr(self, key) < 0:
                raise ValueError(f"{key}: {getattr(self, key)} is negative; write 0 or more")
        if self.optimizer_lr <= 0 or self.optimizer_eps <= 0:
            raise ValueError(f"optimizer_lr: {self.optimizer_lr}, optimizer_eps: {self.optimizer_eps}; write above 0")
        if not all(0 <= beta < 1 for beta in self.optimizer_betas):
            raise ValueError(f"optimizer_betas: {self.optimizer_betas} are not within 0 and below 1; write [0.9, 0.95]")
        if self.scheduler_decay_steps is not None and self.scheduler_decay_steps < 1:
            raise ValueError(f"scheduler_decay_steps: {self.scheduler_decay_steps}; write at least 1, or null")

    def _check_features(self) -> None:
        for section, allowed in (("input_features", ("VISUAL", "STATE")), ("output_features", ("ACTION",))):
            for key, spec in (getattr(self, section) or {}).items():
                if spec.type not in allowed:
                    why = (
                        f"{self.title} reads no environment state"
                        if spec.type == "ENV"
                        else f"type {spec.type!r} is not one"
                    )
                    raise ValueError(f"{section}.{key}: {why}; remove it or write {' or '.join(allowed)}")
                if spec.type == "VISUAL" and (len(spec.shape) != 3 or spec.shape[0] != 3):
                    raise ValueError(f"{section}.{key}: shape {spec.shape} of a camera; write [3, height, width]")
                name, limit = (STATE, "max_state_dim") if spec.type == "STATE" else (ACTION, "max_action_dim")
                if spec.type != "VISUAL" and (key != name or len(spec.shape) != 1):
                    raise ValueError(
                        f"{section}.{key}: {self.title} knows one {spec.type}; write {name} with shape [dimensions]"
                    )
                if spec.type != "VISUAL" and not 1 <= spec.shape[0] <= getattr(self, limit):
                    raise ValueError(
                        f"{section}.{key}: {spec.shape[0]} dimensions do not fit in {limit} "
                        f"({getattr(self, limit)}); raise {limit}"
                    )
        for key, value in self.normalization_mapping.items():
            choices = {"VISUAL": ("IDENTITY",), "STATE": NORMALIZATIONS, "ACTION": NORMALIZATIONS}.get(key)
            if choices is None:
                raise ValueError(f"normalization_mapping.{key}: no such feature type; write VISUAL, STATE or ACTION")
            if value not in choices:
                raise ValueError(f"normalization_mapping.{key}: {value!r} is no choice; write {' or '.join(choices)}")

    @property
    def action_steps(self) -> int:
        """Returns ``n_action_steps`` with its default filled in."""
        return self.chunk_size if self.n_action_steps is None else self.n_action_steps

    @property
    def camera_slots(self) -> list[str]:
        """Lists the cameras in the order of ``input_features``, then the empty ones, which LeRobot's config.json has twice."""
        cameras = [key for key, spec in (self.input_features or {}).items() if spec.type == "VISUAL"]
        return list(dict.fromkeys(cameras + [f"{EMPTY_CAMERA}{i}" for i in range(self.empty_cameras)]))

    @property
    def state_dim(self) -> int | None:
        """Returns the dimensions of the robot's state; None if no feature states them."""
        spec = (self.input_features or {}).get(STATE)
        return None if spec is None else spec.shape[0]

    @property
    def action_dim(self) -> int | None:
        """Returns the dimensions of the robot's action; None if no feature states them."""
        spec = (self.output_features or {}).get(ACTION)
        return None if spec is None else spec.shape[0]

    def adopt_features(self, spec: SampleSpec, action_names: Sequence[str] | None) -> None:
        """Fills in the data set's features, for a config that leaves them open."""
        assert spec.state_dim is not None and spec.action_dim is not None
        known = self.input_features or {}
        images = {
            slot: known.get(slot, FeatureSpec("VISUAL", [3, *self.image_resolution])) for slot in spec.camera_slots
        }
        self.input_features = {**images, STATE: FeatureSpec("STATE", [spec.state_dim])}
        self.output_features = {ACTION: FeatureSpec("ACTION", [spec.action_dim])}
        if self.use_relative_actions and action_names is not None:  # LeRobot decides by them what is relative
            self.action_feature_names = list(action_names)
        self._check_features()

    def to_lerobot(self, last_update: int = 30_000) -> dict[str, Any]:
        """Returns ``config.json`` as LeRobot 0.6.1 writes it; LeRobot loads it if the sizes are standard ones.

        ``last_update`` stands in for a null ``scheduler_decay_steps``, which LeRobot does not know.
        """
        out = {"type": self.type, **{key: value for key, value in asdict(self).items() if key not in self.ours_alone}}
        out |= {key: list(out[key]) for key in ("image_resolution", "optimizer_betas")}
        out["input_features"] = out["input_features"] or {}
        for slot in self.camera_slots:  # only empty cameras can be new
            out["input_features"].setdefault(slot, {"type": "VISUAL", "shape": [3, *self.image_resolution]})
        out["output_features"] = out["output_features"] or {}
        out["n_action_steps"] = self.action_steps
        out["scheduler_decay_steps"] = self.scheduler_decay_steps or last_update
        return out


def refuse(refusals: Mapping[str, tuple[bool, str]]) -> None:
    """Raises a ValueError for the first key whose value is refused.

    Args:
        refusals: key → whether it is refused, and why or what to write instead.
    """
    for key, (refused, reason) in refusals.items():
        if refused:
            raise ValueError(f"{key}: {reason}")
