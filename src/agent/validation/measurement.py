"""Validation on held-out episodes: the flow-matching loss, and the error of sampled actions beside two baselines."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import xxhash

from agent.batch import ValidationBatch, to_device
from agent.validation.record import Chunk, DatasetErrors, Errors, Evaluation

if TYPE_CHECKING:
    from torch import Tensor

    from agent.models.policy import Policy
    from agent.parallel.processes import Processes

CHUNKS = 8  # shown of a validation set, evenly spaced


class DatasetNames(NamedTuple):
    """How a validation data set and its action dimensions are called."""

    name: str
    dimensions: list[str]
    """(a,)"""


@dataclass(frozen=True)
class HeldOut:
    """A whole validation set, of which every process has a share."""

    size: int
    """Samples."""
    unnormalize: Callable[[Tensor, ValidationBatch], np.ndarray]
    """From normalised actions (B, T, A) of a batch to (B, T, a) in the units of each sample's data set."""
    mean_actions: np.ndarray
    """(data sets, a) mean of the training actions, the first baseline."""
    datasets: Sequence[DatasetNames]
    """By the number in a batch's ``provenance``."""


@dataclass(frozen=True)
class _Row:
    """What is kept of a sample: sums over its real numbers, small enough to be gathered from every process."""

    index: int
    provenance: tuple[int, int, int]
    loss: float
    steps: np.ndarray
    """(T,) bool, not padded."""
    by_dimension: np.ndarray
    """(3, a) float64, error sums of policy, last action and mean action."""
    by_step: np.ndarray
    """(3, T) float64, the same."""
    within: np.ndarray
    """(3, thresholds) numbers within each threshold, the same."""
    shown: tuple[list[list[float]], list[list[float]]] | None
    """Recorded and predicted (T, a), of the few that are kept whole."""


def evaluate(
    policy: Policy,
    batches: Iterable[ValidationBatch],
    processes: Processes,
    *,
    held_out: HeldOut,
    thresholds: list[float],
    precision: Callable[[], AbstractContextManager],
    interrupted: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
    """One validation; the result is the same on every process and for any number of them.

    Args:
        policy: the policy, not wrapped by DDP.
        batches: this process's share of the validation set, as many as every other process has.
        processes: the process group.
        held_out: what the whole set is.
        thresholds: distances for ``acc``.
        precision: makes the autocast context.
        interrupted: asked after each batch, by all processes together, which get the same answer.

    Returns:
        None if it was interrupted before the last batch. Otherwise:
        The loss (flow matching, fixed noise and times) is a mean over samples; the errors are means over every unpadded
        step and real dimension, in the data set's own units. On an episode's first frame nothing was recorded before;
        there the last-action baseline is the mean action.
    """
    import torch

    was_training = policy.training
    policy.eval()
    shown = {number * held_out.size // CHUNKS for number in range(CHUNKS)}
    rows: list[_Row] = []
    with torch.no_grad():
        for number, item in enumerate(batches):
            if number and interrupted():
                policy.train(was_training)
                return None
            batch = to_device(item.batch, processes.device)
            with precision():
                losses = policy.total(policy(batch))
                sampled = policy.sample_actions(batch.observation, batch.draws)
            predicted = held_out.unnormalize(sampled.float().cpu(), item)
            rows += _rows(item, losses.tolist(), predicted, held_out.mean_actions, thresholds, shown)
    policy.train(was_training)
    # Added up in the order of the samples, so that the number of processes cannot change the last digit.
    everything = sorted((row for share in processes.gather(rows) for row in share), key=lambda row: row.index)
    return _summary(everything, held_out.datasets, thresholds)


def _rows(
    item: ValidationBatch,
    losses: list[float],
    predicted: np.ndarray,
    mean_actions: np.ndarray,
    thresholds: list[float],
    shown: set[int],
) -> list[_Row]:
    provenance = item.batch.provenance.numpy()
    means = mean_actions[provenance[:, 0], : item.actions.shape[-1]]
    last = np.where(item.has_previous[:, None], item.previous_action, means)
    own = item.batch.actions.dim_mask.numpy().sum(axis=1)  # a robot's own dimensions come first
    rows = []
    for place, index in enumerate(item.index.tolist()):
        if index < 0:
            continue
        dims, steps = slice(0, int(own[place])), ~item.batch.actions.is_pad[place].numpy()
        truth = item.actions[place, :, dims].astype(np.float64)
        guesses = (predicted[place, :, dims], last[place, None, dims], means[place, None, dims])
        # What is past the episode's end counts for nothing, whatever it is.
        errors = np.stack([np.where(steps[:, None], np.abs(guess - truth), 0.0) for guess in guesses])
        rows.append(
            _Row(
                index=index,
                provenance=tuple(map(int, provenance[place])),  # type: ignore[arg-type]
                loss=losses[place],
                steps=steps,
                by_dimension=errors.sum(axis=1),
                by_step=errors.sum(axis=2),
                within=np.array([[(e[steps] <= threshold).sum() for threshold in thresholds] for e in errors]),
                shown=(item.actions[place, :, dims].tolist(), predicted[place, :, dims].tolist())
                if index in shown
                else None,
            )
        )
    return rows


def _summary(rows: list[_Row], datasets: Sequence[DatasetNames], thresholds: list[float]) -> Evaluation:
    policy, last, mean = (_errors(rows, which, thresholds) for which in range(3))
    there = sorted({row.provenance[0] for row in rows})
    names = [datasets[number].dimensions for number in there]
    chunks = [
        Chunk(datasets[row.provenance[0]].name, *row.provenance[1:], recorded, predicted, row.steps.tolist())
        for row in rows
        if row.shown is not None
        for recorded, predicted in [row.shown]
    ]
    identity = xxhash.xxh3_64()
    for row in rows:
        identity.update(f"{datasets[row.provenance[0]].name} {row.provenance[1:]}\n".encode())
    return Evaluation(
        loss=float(np.array([row.loss for row in rows], dtype=np.float64).sum() / len(rows)),
        errors=policy,
        last=last,
        mean=mean,
        names=names[0]
        if all(some == names[0] for some in names)
        else [f"action {number}" for number in range(len(policy.per_dimension_l1))],
        datasets=[_of_dataset(rows, number, datasets[number], thresholds) for number in there]
        if len(there) > 1
        else [],
        chunks=chunks,
        samples=len(rows),
        validation_set=identity.hexdigest(),
    )


def _of_dataset(rows: list[_Row], number: int, names: DatasetNames, thresholds: list[float]) -> DatasetErrors:
    own = [row for row in rows if row.provenance[0] == number]
    policy, last, mean = (_errors(own, which, thresholds) for which in range(3))
    return DatasetErrors(names.name, names.dimensions, policy, {"last": last, "mean": mean})


def _errors(rows: list[_Row], which: int, thresholds: list[float]) -> Errors:
    """Means over the rows: of all numbers, by dimension, by step. Robots may differ in their dimensions."""
    widest = max(row.by_dimension.shape[1] for row in rows)
    by_dimension, of_dimension = np.zeros(widest), np.zeros(widest)
    by_step, of_step = np.zeros(len(rows[0].steps)), np.zeros(len(rows[0].steps))
    for row in rows:
        dims = row.by_dimension.shape[1]
        by_dimension[:dims] += row.by_dimension[which]
        of_dimension[:dims] += row.steps.sum()
        by_step += row.by_step[which]
        of_step += row.steps * dims
    numbers = of_dimension.sum()
    within = sum(row.within[which] for row in rows)
    acc = {f"{t:g}": float(count / numbers) for t, count in zip(thresholds, within, strict=True)}
    # A step that is padded in every sample has no error.
    per_step = np.divide(by_step, of_step, out=np.full(len(of_step), np.nan), where=of_step > 0)
    return Errors(float(by_dimension.sum() / numbers), (by_dimension / of_dimension).tolist(), per_step.tolist(), acc)
