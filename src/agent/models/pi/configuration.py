"""Every field of π0's model JSON. Imports no torch: a configuration error must show within a second."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from typing import Any, ClassVar, Literal

from agent.models.base import ModelConfig, Reading
from agent.models.pi import vintages

STATE, ACTION = "observation.state", "action"
EMPTY_CAMERA = "observation.images.empty_camera_"
NORMALIZATIONS = ("IDENTITY", "MEAN_STD", "MIN_MAX", "QUANTILES", "QUANTILE10")


@dataclass
class GemmaVariant:
    """Sizes of a Gemma transformer."""

    width: int
    """Size of a token's vector."""
    depth: int
    """Layers."""
    mlp_dim: int
    """Hidden size of a layer's MLP."""
    heads: int
    """Query heads of the attention."""
    kv_heads: int
    """Key and value heads, each shared by ``heads`` / ``kv_heads`` query heads."""
    head_dim: int
    """Size of a head."""
    vocab_size: int = 257152
    """Rows of the token embedding."""


@dataclass
class VisionVariant:
    """Sizes of a SigLIP vision tower."""

    width: int = 1152
    """Size of a patch's vector."""
    depth: int = 27
    """Layers."""
    mlp_dim: int = 4304
    """Hidden size of a layer's MLP."""
    heads: int = 16
    """Heads of the attention."""
    patch_size: int = 14
    """Side of a patch in pixels."""


@dataclass
class FeatureSpec:
    """One input or output."""

    type: str
    """VISUAL, STATE or ACTION."""
    shape: list[int]
    """[3, height, width] of a camera, else [dimensions]."""


GEMMA = {
    "gemma_2b": GemmaVariant(width=2048, depth=18, mlp_dim=16384, heads=8, kv_heads=1, head_dim=256),
    "gemma_300m": GemmaVariant(width=1024, depth=18, mlp_dim=4096, heads=8, kv_heads=1, head_dim=256),
}
VISION = {"so400m": VisionVariant()}


def resolve(key: str, value: Any, known: dict[str, Any]) -> Any:
    """The table of sizes behind a variant's name; a table stands for itself."""
    if not isinstance(value, str):
        return value
    if value not in known:
        keys = ", ".join(f.name for f in fields(next(iter(known.values()))))
        near = get_close_matches(value, known, n=1) or list(known)
        raise ValueError(f"{key}: no variant {value!r}; write {' or '.join(near)}, or a table of {keys}")
    return known[value]


@ModelConfig.register_subclass("pi0")
@dataclass
class PI0Config(ModelConfig):
    """π0 (https://arxiv.org/abs/2410.24164). Fields and defaults are LeRobot 0.6.1's unless the text says more."""

    older_names: ClassVar[dict[str, str]] = vintages.RENAMED

    paligemma_variant: GemmaVariant | str = "gemma_2b"
    """Sizes of the language model: "gemma_2b", "gemma_300m" or a table."""
    action_expert_variant: GemmaVariant | str = "gemma_300m"
    """Sizes of the action expert; depth, heads and head_dim equal the language model's."""
    vision_variant: VisionVariant | str = "so400m"
    """Sizes of the vision tower: "so400m" or a table (not in LeRobot)."""
    dtype: str = "float32"
    """With "bfloat16", train with bfloat16 autocast, as ``use_bf16`` does. Parameters stay float32, unlike
    LeRobot's: rounded to bfloat16, they would swallow the updates of a small learning rate. The training YAML's
    ``precision`` holds them in bfloat16 without that loss."""
    tokenizer_path: str = "google/paligemma-3b-pt-224"
    """Folder or Hub name of the tokenizer (not in LeRobot, which fixes it)."""
    tokenizer_max_length: int = 48
    """Instructions are padded or cut to this many tokens."""
    pretrained_path: str | None = None
    """Folder or Hub name of a π0 policy to start from."""
    pretrained_revision: str | None = None
    """Hub commit, branch or tag of ``pretrained_path``."""
    paligemma_pretrained_path: str | None = None
    """Folder or Hub name of a PaliGemma to start vision and language from, with a fresh expert (not in LeRobot)."""

    n_obs_steps: int = 1
    """Observation steps; π0 sees one."""
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
    """Images are resized to this size, with padding; square, a multiple of the patch size."""
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

    device: str | None = None
    """Where to train; null: the GPU if there is one."""
    use_amp: bool = False
    """Refused: write ``use_bf16`` in the training YAML."""
    use_peft: bool = False
    """Refused: low-rank adapters are not supported."""
    gradient_checkpointing: bool = False
    """Recompute each layer's activations in the backward pass: less memory, slower."""
    compile_model: bool = False
    """Compile the layers with torch.compile."""
    compile_mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs", "lite"] = (
        "max-autotune"
    )
    """Mode of torch.compile."""
    freeze_vision_encoder: bool = False
    """Do not train the vision tower (its projector still trains)."""
    train_expert_only: bool = False
    """Train the action expert and its projections alone."""
    freeze_lm_head: bool = False
    """Do not train the token embedding, which is PaliGemma's tied language head (not in LeRobot)."""

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

    @classmethod
    def read(cls, values: dict[str, Any]) -> Reading:
        """See ``ModelConfig``; knows LeRobot's ``config.json`` of 2025."""
        variant = values.get("action_expert_variant", cls.action_expert_variant)
        expert = asdict(GEMMA[variant]) if isinstance(variant, str) and variant in GEMMA else variant
        width = expert.get("width") if isinstance(expert, dict) else None  # what is wrong there is said elsewhere
        return vintages.read(values, width, {f.name: f.default for f in fields(cls)})

    def __post_init__(self) -> None:
        self._refuse_unsupported()
        self._check_sizes()
        self._check_features()

    def _refuse_unsupported(self) -> None:
        refusals = {
            "n_obs_steps": (self.n_obs_steps != 1, "π0 sees a single observation step; write 1"),
            "use_amp": (self.use_amp, vintages.USE_AMP),
            "use_peft": (
                self.use_peft,
                "low-rank adapters are not supported; write false, and freeze with "
                "train_expert_only or freeze_vision_encoder",
            ),
            "rtc_config": (
                self.rtc_config is not None,
                "real-time chunking is an option of inference; write null, and set it in LeRobot when deploying",
            ),
            "dtype": (self.dtype not in ("float32", "bfloat16"), f"unknown {self.dtype!r}; write float32 or bfloat16"),
            "pretrained_revision": (
                self.pretrained_revision is not None and self.pretrained_path is None,
                "it pins pretrained_path, which is not set; write null or set both",
            ),
            "paligemma_pretrained_path": (
                None not in (self.paligemma_pretrained_path, self.pretrained_path),
                "pretrained_path brings these weights too; write one of them",
            ),
        }
        for key, (refused, reason) in refusals.items():
            if refused:
                raise ValueError(f"{key}: {reason}")

    def _check_sizes(self) -> None:
        for key in ("chunk_size", "max_state_dim", "max_action_dim", "num_inference_steps", "tokenizer_max_length"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}: {getattr(self, key)} is not positive; write at least 1")
        if not 1 <= self.action_steps <= self.chunk_size:
            raise ValueError(f"n_action_steps: {self.n_action_steps} is not within 1..chunk_size ({self.chunk_size})")
        if self.empty_cameras < 0:
            raise ValueError(f"empty_cameras: {self.empty_cameras} is negative; write 0 or more")
        if not (
            0 <= self.time_sampling_offset < self.time_sampling_offset + self.time_sampling_scale <= 1 + 1e-9
            and min(self.time_sampling_beta_alpha, self.time_sampling_beta_beta) > 0
        ):
            raise ValueError("time_sampling_*: time leaves (0, 1]; write scale 0.999, offset 0.001, alpha, beta > 0")
        self._check_optimizer()
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
                    why = "π0 reads no environment state" if spec.type == "ENV" else f"type {spec.type!r} is not one"
                    raise ValueError(f"{section}.{key}: {why}; remove it or write {' or '.join(allowed)}")
                if spec.type == "VISUAL" and (len(spec.shape) != 3 or spec.shape[0] != 3):
                    raise ValueError(f"{section}.{key}: shape {spec.shape} of a camera; write [3, height, width]")
                name, limit = (STATE, "max_state_dim") if spec.type == "STATE" else (ACTION, "max_action_dim")
                if spec.type != "VISUAL" and (key != name or len(spec.shape) != 1):
                    raise ValueError(f"{section}.{key}: π0 knows one {spec.type}; write {name} with shape [dimensions]")
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
    def language(self) -> GemmaVariant:
        """Sizes of the language model."""
        return resolve("paligemma_variant", self.paligemma_variant, GEMMA)

    @property
    def expert(self) -> GemmaVariant:
        """Sizes of the action expert."""
        return resolve("action_expert_variant", self.action_expert_variant, GEMMA)

    @property
    def vision(self) -> VisionVariant:
        """Sizes of the vision tower."""
        return resolve("vision_variant", self.vision_variant, VISION)

    @property
    def action_steps(self) -> int:
        """``n_action_steps`` with its default filled in."""
        return self.chunk_size if self.n_action_steps is None else self.n_action_steps

    @property
    def camera_slots(self) -> list[str]:
        """Cameras in the order of ``input_features``, then the empty ones (a LeRobot config.json lists those twice)."""
        cameras = [key for key, spec in (self.input_features or {}).items() if spec.type == "VISUAL"]
        return list(dict.fromkeys(cameras + [f"{EMPTY_CAMERA}{i}" for i in range(self.empty_cameras)]))

    @property
    def state_dim(self) -> int | None:
        """Dimensions of the robot's state; None when no feature says."""
        spec = (self.input_features or {}).get(STATE)
        return None if spec is None else spec.shape[0]

    @property
    def action_dim(self) -> int | None:
        """Dimensions of the robot's action; None when no feature says."""
        spec = (self.output_features or {}).get(ACTION)
        return None if spec is None else spec.shape[0]

    def adopt_features(
        self, cameras: tuple[str, ...], state_dim: int, action_dim: int, action_names: Sequence[str] | None
    ) -> None:
        """Takes over what the data set has, for a config that leaves its features open."""
        image = FeatureSpec("VISUAL", [3, *self.image_resolution])
        self.input_features = {
            **{slot: (self.input_features or {}).get(slot, image) for slot in cameras},
            STATE: FeatureSpec("STATE", [state_dim]),
        }
        self.output_features = {ACTION: FeatureSpec("ACTION", [action_dim])}
        if self.use_relative_actions and action_names is not None:  # LeRobot decides by them what is relative
            self.action_feature_names = list(action_names)
        self._check_features()

    def to_lerobot(self, last_update: int = 30_000) -> dict[str, Any]:
        """What LeRobot 0.6.1 writes as config.json; it loads there if the sizes are standard ones.

        ``last_update`` stands in for a null ``scheduler_decay_steps``, which LeRobot does not know.
        """
        ours_alone = (
            "tokenizer_path paligemma_pretrained_path freeze_lm_head vision_variant scheduler_decay_start"
        ).split()
        out = {"type": "pi0", **{key: value for key, value in asdict(self).items() if key not in ours_alone}}
        out |= {key: list(out[key]) for key in ("image_resolution", "optimizer_betas")}
        out["input_features"] = out["input_features"] or {}
        for slot in self.camera_slots:  # only empty cameras can be new
            out["input_features"].setdefault(slot, {"type": "VISUAL", "shape": [3, *self.image_resolution]})
        out["output_features"] = out["output_features"] or {}
        out["n_action_steps"] = self.action_steps
        out["scheduler_decay_steps"] = self.scheduler_decay_steps or last_update
        # A table that has a name goes by it; LeRobot refuses any other by itself, which is right.
        for key, table in (("paligemma_variant", self.language), ("action_expert_variant", self.expert)):
            out[key] = next((name for name, known in GEMMA.items() if known == table), asdict(table))
        if self.vision != VISION["so400m"]:
            out["vision_variant"] = asdict(self.vision)
        return out
