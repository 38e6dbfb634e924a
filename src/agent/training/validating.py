"""Validates the weights of a run on held-out samples, and keeps what the validations found; the trainer says when."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING

from agent.data.loading.loader import TrainLoader, ValidationBatches
from agent.data.recorded.dimension_names import labels_of
from agent.tracking.progress import followed
from agent.validation.measurement import DatasetNames, HeldOut, evaluate
from agent.validation.picture import draw
from agent.validation.record import Evaluation, ValidationRecords, document

if TYPE_CHECKING:
    from agent.configuration_pipeline import TrainPipelineConfig
    from agent.data.source import Source
    from agent.lifecycle.stopping import StopRequest
    from agent.training.train_state import Run

log = logging.getLogger(__name__)


def held_out(run: Run) -> ValidationBatches | None:
    """Gives this process's share of the validation set; None if the run validates on nothing."""
    if run.data.validation is None or not run.config.eval_freq:
        return None
    processes, batch = run.processes, run.config.per_device_batch_size
    return ValidationBatches(run.data.validation, run.config.eval_size, batch, processes.rank, processes.world_size)


def validate(run: Run, loader: TrainLoader, stop: StopRequest) -> dict[str, float] | None:
    """Validates the present weights, and their moving average if there is one, and keeps the details in the run folder.

    Training's random streams do not move, and its weights are afterwards what they were, bit for bit. No checkpoint may
    be under way whose tensors are not copied yet. The samples come through the workers of ``loader``, whose samples for
    training stay where they are.

    Returns:
        The numbers for ``metrics.jsonl``, empty if nothing is held out. On rank 0 the baseline of the starting weights
        is among them. None if a stop request has cut it short, on every process; nothing is kept of it then.
    """
    if run.data.validation is None:
        return {}
    what = f"validation at update {run.state.step}" if run.state.step else "validation of the starting weights"
    raw, average = _evaluate(run, loader, stop, what), None
    if raw is None:
        return None
    metrics = raw.metrics() | raw.baselines()
    if run.ema is not None and run.state.step:  # before the first update it is the weights themselves
        with run.ema.applied():
            average = _evaluate(run, loader, stop, f"{what}, averaged")
        if average is None:
            return None
        metrics |= average.metrics("val/ema_")
    if run.processes.is_main:
        metrics |= _keep(run, raw, average)
    return metrics


def validate_start(run: Run, loader: TrainLoader, stop: StopRequest) -> bool:
    """Validates the weights that the run starts from, for the baseline of all later validations.

    Returns:
        False if a stop request has cut it short.
    """
    if (batches := held_out(run)) is not None:
        log.info(
            "validation of the starting weights, %d samples: the baseline of all later ones (eval_start: false skips it)",
            batches.size,
        )
    metrics = validate(run, loader, stop)
    if metrics:
        log.info("the starting weights: %s", "  ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
    return metrics is not None


def which_may_be_best(config: TrainPipelineConfig) -> str | None:
    """Words a line for the log where most checkpoints, or most validations, have no say in which is the best."""
    if (
        not config.eval_freq
        or config.eval_freq % config.save_model_freq == 0
        or config.save_model_freq % config.eval_freq == 0
    ):
        return None
    return (
        "the link `best` is chosen among the updates that are both saved and validated: every "
        f"{math.lcm(config.eval_freq, config.save_model_freq)} updates, and the last; make eval_freq "
        f"({config.eval_freq}) and save_model_freq ({config.save_model_freq}) multiples of each other for more"
    )


def _evaluate(run: Run, loader: TrainLoader, stop: StopRequest, what: str) -> Evaluation | None:
    reader, whole = run.data.validation, held_out(run)
    assert reader is not None and whole is not None
    return evaluate(
        run.policy,
        followed(loader.validation_batches(), what, len(whole), "batch", speaks=run.processes.is_main),
        run.processes,
        held_out=HeldOut(
            whole.size, reader.unnormalize, reader.mean_actions, [_names(source) for source in reader.sources]
        ),
        thresholds=run.config.eval_thresholds,
        precision=run.precision,
        interrupted=lambda: run.processes.any(stop.pending()),
    )


def _names(source: Source) -> DatasetNames:
    return DatasetNames(source.config.repo_id, labels_of(source.metadata.features[source.config.action], "action"))


def _keep(run: Run, raw: Evaluation, average: Evaluation | None) -> dict[str, float]:
    """Writes the record and its picture; the run goes on even if that fails."""
    records, step = ValidationRecords(run.config.run_dir), run.state.step
    start = records.read(0) if step else None
    contents = document(step, raw, average, start)
    try:
        records.write(contents)
        draw(records.path(step, ".png"), contents)
    except OSError as error:
        log.error("the details of the validation at update %d could not be kept: %s", step, error)
    except Exception:  # of the drawing; the training is worth more than its picture
        log.exception("the validation at update %d could not be drawn", step)
    baseline = contents["baselines"]["start"]
    if baseline is None:
        return {}
    l1 = baseline["action_l1"]
    return {"val/baseline_start_l1": math.nan if l1 is None else l1}  # as of every other number here
