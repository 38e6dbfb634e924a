"""Checks the training config for keys without effect, and for values that are allowed but hardly ever meant."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent.lifecycle.software import slow_bfloat16
from agent.preflight.context import Context
from agent.preflight.report import Row

if TYPE_CHECKING:
    from agent.configuration_pipeline import TrainPipelineConfig
    from agent.simulation.configuration import SimulationConfig


def check(context: Context) -> list[Row]:
    """Warns of what a careful reader would question; unknown keys and impossible values were refused before."""
    config = context.config
    unused = [f"{key} has no effect, because {why}" for key, why in _unused(context)]
    rows = [Row("config: keys", "warn", text, "take it out, or change what it depends on") for text in unused] or [
        Row("config: keys", "pass", f"{_given(config)} keys differ from their defaults; all are known and used")
    ]
    odd = [Row("config: values", "warn", text, change) for text, change in _odd(context)]
    return rows + (odd or [Row("config: values", "pass", "nothing unusual")])


def validates(config: TrainPipelineConfig) -> bool:
    """Says whether the run will validate."""
    return bool(config.eval_freq and (config.data.val.datasets or config.data.val.fraction))


def _given(config: TrainPipelineConfig) -> int:
    """Counts the values that differ from their defaults, those of nested configs too."""
    count = 0
    for item in fields(config):
        value, default = getattr(config, item.name), _default(item)
        if is_dataclass(value) and type(value) is type(default):
            count += sum(getattr(value, inner.name) != getattr(default, inner.name) for inner in fields(value))
        else:
            count += value != default
    return count


def _default(item: Field) -> Any:
    return item.default_factory() if item.default_factory is not MISSING else item.default


def _unused(context: Context) -> Iterator[tuple[str, str]]:
    """Yields each key that was set without effect, and the reason."""
    config, data = context.config, context.config.data
    changed = {item.name for item in fields(config) if getattr(config, item.name) != _default(item)}
    if config.n_updates is not None and "n_epochs" in changed:
        yield "n_epochs", "n_updates is given"
    if not config.eval_freq:
        yield from ((key, "eval_freq is 0") for key in ("eval_size", "eval_thresholds") if key in changed)
        if data.val.datasets:
            yield "data.val.datasets", "eval_freq is 0"
    elif not validates(config):
        keys = ("eval_freq", "eval_size", "eval_thresholds")
        yield from ((key, "data.val.fraction is 0: nothing is held out") for key in keys if key in changed)
    if len(data.train.datasets) == 1 and data.train.datasets[0].weight is not None:
        yield "data.train.datasets.0.weight", "there is one data set"
    for number, dataset in enumerate(data.val.datasets):
        for key in ("weight", "augmentation"):
            if getattr(dataset, key) is not None:
                yield (
                    f"data.val.datasets.{number}.{key}",
                    "validation takes every picture as it is, and all data sets alike",
                )
    if data.val.datasets and data.val.fraction != type(data.val)().fraction:
        yield "data.val.fraction", "data.val.datasets is given"
    if config.load_from_checkpoint is not None:
        given = (key for key in context.model.base_weights if getattr(context.model, key) is not None)
        yield from ((f"model_cfg.{key}", "load_from_checkpoint is given") for key in given)
    if not data.train.num_workers and data.train.prefetch_factor != type(data.train)().prefetch_factor:
        yield "data.train.prefetch_factor", "data.train.num_workers is 0"
    if config.parallel == "fsdp" and context.gpus[0] == 1:
        yield "parallel: fsdp", "there is one GPU"
    # An average is float32 all the same, unless that says otherwise.
    if config.precision == "bfloat16_stochastic" and config.save_dtype == "bfloat16" and config.ema_decay is None:
        yield "save_dtype", "precision: bfloat16_stochastic saves bfloat16"


def _odd(context: Context) -> Iterator[tuple[str, str]]:
    """Yields what is unusual, and what to write instead."""
    config, model = context.config, context.model
    for key, value, low, high in (
        ("model_cfg.optimizer_lr", model.optimizer_lr, 1e-7, 2e-3),
        ("model_cfg.optimizer_weight_decay", model.optimizer_weight_decay, 0, 0.5),
        ("n_epochs", config.n_epochs if config.n_updates is None else 1, 0, 200),
    ):
        if not low <= value <= high:
            yield f"{key} is {value:g}, which is outside of what is usual ({low:g} to {high:g})", f"look at {key} again"
    if model.scheduler_decay_lr > model.optimizer_lr:
        yield (
            f"the learning rate rises from {model.optimizer_lr:g} to {model.scheduler_decay_lr:g}",
            "write a model_cfg.scheduler_decay_lr below model_cfg.optimizer_lr",
        )
    if not config.max_grad_norm:
        yield "gradients are not clipped", "write max_grad_norm: 1.0, unless that is meant"
    if config.use_bf16 is False and context.kinds[0]:
        yield "a GPU is asked for and computes in float32, which takes several times as long", "write use_bf16: true"
    kinds, source = context.kinds
    if config.fp8 != "none" and (old := [gpu.name for gpu in kinds if not gpu.fp8]):
        yield f"fp8: {config.fp8} needs arithmetic in 8 bits, which {', '.join(old)} lacks", "write fp8: none"
    if config.use_bf16 and (not kinds or source == "the GPU here"):
        slow = slow_bfloat16("cuda" if context.visible_gpus else "cpu")
        if slow is not None:
            yield slow, "write use_bf16: false, or name another GPU, which the job will get, with --check_gpu"
    if config.eval_cfg is not None:
        yield from _simulated(config.eval_cfg)
    if config.debug:
        yield "debug is true: no loader workers, and every operation is watched for NaN", "write debug: false to train"


def _simulated(simulation: SimulationConfig) -> Iterator[tuple[str, str]]:
    """Yields what would keep the evaluation in simulation from starting."""
    if simulation.start != "by_hand" and not Path(simulation.script).is_file():
        yield (
            f"eval_cfg.start is {simulation.start}, and there is no {simulation.script} in {Path.cwd()}",
            "write the path of a script in eval_cfg.script, like slurms/eval_scripts/pi0_metaworld.sh",
        )
    if simulation.start == "sbatch" and shutil.which("sbatch") is None:
        yield (
            "eval_cfg.start is sbatch, and there is no sbatch here",
            "write by_hand or process, unless the job has one (a container often has none)",
        )
