"""Defines the training config: every key of ``config/train/*.yaml``, and how the keys agree with those of the model JSON."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import draccus
import yaml

from agent.data.configuration import DataConfig
from agent.models import registry
from agent.models.base import ModelConfig
from agent.models.family import Family
from agent.models.lerobot_config import TrainableConfig
from agent.settings.files import ConfigError
from agent.settings.gpus import check_name
from agent.settings.plan import accumulation_steps
from agent.settings.strict import cannot_use, load
from agent.simulation.configuration import SimulationConfig
from agent.tracking.wandb_sink import WandbConfig


@dataclass
class TrainPipelineConfig:
    """One training run. Precedence: these defaults < the YAML file < the command line."""

    model_cfg: ModelConfig
    """The model, usually `!include ../model/X.json`; `{<<: !include ../model/X.json, chunk_size: 8}` changes values."""
    data: DataConfig
    """The data sets to train on and to validate with."""
    name: str | None = None
    """Name of the run and of its folder `${VLA_LOG_DIR}/<name>`; the stem of the config file when not given."""
    seed: int = 42
    """Seed of every random draw: order of the samples, noise, times, fresh weights."""
    debug: bool = False
    """Log every detail, load data in the main process, no wandb, and let autograd name the operation that made a NaN."""
    check: bool = False
    """Train nothing: check the config, the data, the weights and the machine, say what to change, and leave with 0 or 2."""
    check_gpu: str | None = None
    """The GPU that the job will get, for the predictions of `check`: a100-40g, a100-80g, h100, h200, b200, a6000, l40s,
    3090, 4090 or 5090. Not set: what the SLURM script asks for, or the one that is here."""
    load_from_checkpoint: str | None = None
    """Weights to start from: a folder, a `.safetensors` file or a hub id. Only weights; the run starts at update 0."""
    resume_run: bool = True
    """Continue from this run's own newest checkpoint when there is one."""
    resume_changes: bool = False
    """Allow a resume although keys that change the mathematics or the data differ from the checkpoint's config."""
    global_batch_size: int = 32
    """Samples per optimizer update, over all GPUs and accumulation steps."""
    per_device_batch_size: int = 32
    """Samples that one GPU holds at once. Accumulation steps = global / (per device × number of processes)."""
    flow_samples_per_observation: int = 1
    """Independent pairs of noise and time per observation. The action expert runs once for each, over images and
    instruction that are computed once; a sample's loss is the mean over them."""
    n_epochs: float = 1.0
    """Passes over the training frames. Not used when `n_updates` is given."""
    n_updates: int | None = None
    """Optimizer updates of the run; wins over `n_epochs`."""
    max_grad_norm: float | None = None
    """Clip the gradient's norm to this. Not set: the model JSON's `optimizer_grad_clip_norm`. 0 turns clipping off."""
    use_bf16: bool | None = None
    """bfloat16 autocast over float32 parameters. Not set: true when the model JSON's `dtype` is bfloat16, or
    `precision` bfloat16_stochastic."""
    use_torch_compile: bool | None = None
    """Compile the model's blocks. Not set: on a GPU, and where the model JSON's `compile_model` is true."""
    cuda_graph: Literal["auto", "none"] = "none"
    """`auto` runs micro-batches of up to 8 equally long samples from a CUDA graph where that is faster, on one GPU; the numbers
    are the same."""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """How AdamW's two moments are held: float32, 8 bytes a trained number, or blocks of eight bits, 2 bytes."""
    precision: Literal["float32_master", "bfloat16_stochastic"] = "float32_master"
    """How weights and gradients are held: float32, or bfloat16 in half the memory. Each update is computed in float32 and
    rounded up or down at random so that small ones are kept in the mean; the randomness follows from the seed. Implies
    `use_bf16`, and weights are saved in bfloat16."""
    fp8: Literal["none", "mlp"] = "none"
    """`mlp` computes the products of the language model's MLPs in 8 bits, on GPUs that have such arithmetic (H100, H200, B200,
    L40S, 4090, 5090): faster, with more rounding. Weights and checkpoints are the same. Wants `use_bf16`."""
    ema_decay: float | None = None
    """Keep an exponential moving average of the trained weights with this decay, 0.999 for instance: float32, validated
    beside the weights (`val/ema_…`) and saved as `pretrained_model_ema`. Not set: none."""
    activation_checkpointing: Literal["none", "blocks", "full"] | None = None
    """Activations that the backward pass computes again: `full` all of a layer's, which takes least memory; `blocks` only
    what is elementwise, not matrix products and attention; `none`. Not set: `full` when the model JSON's
    `gradient_checkpointing` is true, else `none`."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """With several GPUs: `ddp`, a copy of model and optimizer on each; `fsdp`, a share of them on each, for models that do
    not fit otherwise. Results and checkpoints are the same."""
    freeze_lm_head: bool | None = None
    """Freeze the language head, in π0 the same table as the token embedding. Not set: the model JSON's value."""
    freeze_vlm: bool | None = None
    """Train only the action expert and its projections. Not set: the model JSON's `train_expert_only`."""
    deterministic: bool = False
    """On a GPU: only deterministic kernels, so that two runs agree bit for bit. Slower. A CPU always is."""
    task_paraphrase: str | None = None
    """JSON of instruction → list of paraphrases; each sample takes one of them with probability 0.5."""
    save_model_freq: int = 1000
    """Updates between checkpoints; the last update is always saved."""
    checkpoint_interval_minutes: float | None = None
    """Save also when this much time has passed since the last checkpoint."""
    keep_checkpoints: int = 2
    """Newest checkpoints to keep; the one with the lowest `val/action_l1`, to which the link `best` leads, stays too."""
    keep_training_states: int | None = None
    """Of these, how many keep what a resume needs, which is two thirds of the bytes; all when not given."""
    save_dtype: Literal["float32", "bfloat16"] = "float32"
    """Number type of the weights in `pretrained_model`. With bfloat16 these take half the space, and the float32 weights
    that a resume needs are kept with the training state."""
    check_replicas_every: int = 1
    """Before every N-th checkpoint, compare weights and optimizer of all processes; 0 never."""
    skip_nonfinite: int = 0
    """How many updates in a row may be skipped because their gradient is not finite; the next one ends the run."""
    hang_timeout_minutes: float = 30.0
    """End the run, with every process's stack in the log, when an update takes so long, or the start, a validation or a
    checkpoint four times as long; 0 waits for ever."""
    log_freq: int = 10
    """Updates between lines in `metrics.jsonl`, the log and wandb."""
    eval_freq: int = 1000
    """Updates between validations, and one after the last update; 0 turns validation off."""
    eval_size: int = 256
    """Held-out samples in a validation, the same ones every time."""
    eval_start: bool = True
    """Validate also the weights that a run starts from, once, before the first update: a baseline for all later ones."""
    eval_thresholds: list[float] = field(default_factory=lambda: [0.05, 0.1, 0.2])
    """Validation reports the fraction of action values within each of these distances, in the action's own unit."""
    eval_cfg: SimulationConfig | None = None
    """Evaluation of checkpoints in simulation, by a process of its own; none when not given."""
    use_wandb: bool = True
    """Log to Weights & Biases as well; `metrics.jsonl` is always written."""
    wandb: WandbConfig = field(default_factory=WandbConfig)
    """Weights & Biases settings."""

    def __post_init__(self) -> None:
        for key in (
            "global_batch_size",
            "per_device_batch_size",
            "flow_samples_per_observation",
            "save_model_freq",
            "keep_checkpoints",
            "log_freq",
        ):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} must be at least 1, got {getattr(self, key)}")
        for key in (
            "eval_freq",
            "eval_size",
            "max_grad_norm",
            "seed",
            "skip_nonfinite",
            "check_replicas_every",
            "hang_timeout_minutes",
        ):
            if (getattr(self, key) or 0) < 0:
                raise ValueError(f"{key} must not be negative, got {getattr(self, key)}")
        if self.keep_training_states is not None and not 1 <= self.keep_training_states <= self.keep_checkpoints:
            raise ValueError(
                f"keep_training_states must be between 1 and keep_checkpoints ({self.keep_checkpoints}), "
                f"got {self.keep_training_states}"
            )
        if self.seed >= 2**63:
            raise ValueError(f"seed must be below 2**63, got {self.seed}")
        if self.checkpoint_interval_minutes is not None and self.checkpoint_interval_minutes <= 0:
            raise ValueError(
                f"checkpoint_interval_minutes must be above 0, or null for none; got {self.checkpoint_interval_minutes}"
            )
        if self.n_updates is not None and self.n_updates < 1:
            raise ValueError(f"n_updates must be at least 1, got {self.n_updates}")
        if self.n_updates is None and self.n_epochs <= 0:
            raise ValueError(f"n_epochs must be above 0, got {self.n_epochs}")
        if self.name is not None and (self.name in ("", "..") or Path(self.name).name != self.name):
            raise ValueError(f"name must be usable as a folder's name, got '{self.name}'")
        if self.check_gpu is not None:
            check_name(self.check_gpu)
        if self.eval_freq and self.eval_size < 1:
            raise ValueError("eval_size must be at least 1; eval_freq: 0 turns validation off")
        if min(self.eval_thresholds, default=1.0) <= 0 or len(set(self.eval_thresholds)) < len(self.eval_thresholds):
            raise ValueError(
                f"eval_thresholds must be distances above 0, each given once, such as [0.05, 0.1], got {self.eval_thresholds}"
            )
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(
                f"ema_decay must be between 0 and 1, like 0.999, or null for no average; got {self.ema_decay}"
            )
        if self.precision == "bfloat16_stochastic" and self.use_bf16 is False:
            raise ValueError(
                "precision: bfloat16_stochastic computes in bfloat16; write use_bf16: true, or precision: float32_master"
            )
        if self.fp8 != "none" and self.use_bf16 is False:
            raise ValueError("fp8: mlp rounds what bfloat16 computes; write use_bf16: true, or fp8: none")
        if self.eval_cfg is not None:
            self.eval_cfg.check(self.save_model_freq)
        if isinstance(self.model_cfg, registry.PlaceholderConfig):
            raise ValueError(self.model_cfg.cannot_train())

    @property
    def trainable(self) -> TrainableConfig:
        """The model config, of a type that can be trained."""
        assert isinstance(self.model_cfg, TrainableConfig)
        return self.model_cfg

    @property
    def family(self) -> Family[Any]:
        """Everything about the type of policy."""
        return registry.family(self.trainable)

    @property
    def run_dir(self) -> Path:
        """`${VLA_LOG_DIR}/<name>`, or `runs/<name>` when the variable is not set."""
        assert self.name is not None
        return Path(os.environ.get("VLA_LOG_DIR") or "runs").expanduser() / self.name


# Keys of the training YAML that name a part of the model, which not every model has.
_FREEZING = ("freeze_vlm", "freeze_lm_head")


def reconcile(config: TrainPipelineConfig) -> list[str]:
    """Makes YAML and model JSON agree, in place; the YAML wins where it sets a value. Returns lines for the log."""
    model = config.trainable
    lines = []
    if config.use_bf16 is None and config.precision == "bfloat16_stochastic":
        config.use_bf16 = True
    for key, model_key, to_model, from_model in model.shared_keys:
        chosen, stated = getattr(config, key), getattr(model, model_key)
        if chosen is None:
            setattr(config, key, from_model(stated))
        elif to_model(chosen) != stated:
            lines.append(f"{key}: {chosen} of the training config wins over {model_key}: {stated} of the model config")
            setattr(model, model_key, to_model(chosen))
    for key in _FREEZING:
        if key not in {shared.training for shared in model.shared_keys}:
            if getattr(config, key):
                raise ValueError(f"{key}: {model.title} has no such part to freeze; remove the line")
            setattr(config, key, False)
    # Their own checks once more, on the values they have now.
    model.__post_init__()
    config.__post_init__()
    lines += _starting_weights(config, model)
    if config.debug:
        config.use_wandb = False
        config.data.train.num_workers = 0
        lines.append("debug: true turns wandb and loader workers off")
    return lines


def _starting_weights(config: TrainPipelineConfig, model: TrainableConfig) -> list[str]:
    """Fills in ``load_from_checkpoint`` from the model JSON; a line for each path there that is not followed."""
    pretrained = model.pretrained_path
    if pretrained is not None and model.pretrained_revision:
        pretrained = f"{pretrained}@{model.pretrained_revision}"
    if config.load_from_checkpoint is None:
        if pretrained is None:
            return []
        config.load_from_checkpoint = str(pretrained)
        return [f"load_from_checkpoint: {pretrained}, from the model config's pretrained_path"]
    stated = {"pretrained_path": pretrained, **{key: getattr(model, key) for key in model.base_weights}}
    return [
        f"load_from_checkpoint: {config.load_from_checkpoint} of the training config wins over {key}: {path} of the model config"
        for key, path in stated.items()
        if path not in (None, config.load_from_checkpoint)
    ]


def load_config(path: str | Path, arguments: list[str], world_size: int) -> tuple[TrainPipelineConfig, list[str]]:
    """Reads, checks and completes a training config, without importing torch.

    Args:
        path: the YAML file.
        arguments: overrides from the command line.
        world_size: the number of processes that torchrun started.

    Returns:
        The config and lines for the log.

    Raises:
        ConfigError: for every mistake that can be found without data, weights or a GPU.
    """
    path = Path(path)
    config = load(TrainPipelineConfig, path, arguments)
    if config.name is None:
        config.name = path.stem
    mistakes: list[str] = []
    lines: list[str] = list(config.model_cfg.notes)
    checks: tuple[Callable[[], Any], ...] = (
        lambda: lines.extend(reconcile(config)),
        lambda: _check_data(config),
    )
    if not config.check:  # which is not about this machine, and lists these beside all else
        checks += (
            lambda: accumulation_steps(config, world_size),
            lambda: config.wandb.check() if config.use_wandb else None,
        )
    for check in checks:
        try:
            check()
        except ValueError as error:
            mistakes.append(str(error))
    if mistakes:
        raise cannot_use(path, mistakes)
    return config, lines


def _check_data(config: TrainPipelineConfig) -> None:
    if not config.data.train.datasets:
        raise ConfigError("data.train.datasets is empty; list at least one {repo_id: …, root: …}")
    if config.data.statistics == "checkpoint" and config.load_from_checkpoint is None:
        raise ConfigError(
            "data.statistics: checkpoint needs load_from_checkpoint, whose statistics these are; or write dataset"
        )


def dump(config: TrainPipelineConfig) -> dict[str, Any]:
    """The resolved config as plain data."""
    return draccus.encode(config)


def dump_yaml(config: TrainPipelineConfig) -> str:
    """The resolved config as YAML; ``--config_path`` takes it back."""
    return yaml.safe_dump(dump(config), sort_keys=False, allow_unicode=True)
