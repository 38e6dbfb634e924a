"""Collects the instructions of a run: those that its data sets hold, and other words for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import xxhash

from agent.batch import Prompt
from agent.data.samples.transforms import load_paraphrases
from agent.data.source import Source


@dataclass(frozen=True)
class Wording:
    """How instructions are worded, and become tokens."""

    prompt: Prompt | None
    """From an instruction to its tokens; None for a policy that reads none."""
    task_paraphrase: str | None = None
    """A JSON file of instruction → paraphrases, for training samples."""


@dataclass(frozen=True)
class Instructions:
    """Every text that a sample may be read with."""

    texts: list[str]
    paraphrases: dict[str, list[str]]
    """Instruction → other words for it, for training samples."""
    report: list[str]
    """Lines for the log."""


def collect(
    training: Sequence[Source], validation: Sequence[Source], wording: Wording, digest: xxhash.xxh3_128
) -> Instructions:
    """Collects the instructions that occur and their paraphrases; which training frame has which one goes into the digest.

    Raises:
        ValueError: if a frame has no instruction, or the paraphrases cannot be used.
    """
    tasks = sorted({task for source in [*training, *validation] for task in source.tasks()})
    paraphrases: dict[str, list[str]] = {}
    report: list[str] = []
    if wording.task_paraphrase is not None:
        trained = sorted({task for source in training for task in source.tasks()})
        paraphrases, missing = load_paraphrases(wording.task_paraphrase, trained)
        if missing:
            report.append(f"{len(missing)} of {len(trained)} instructions have no paraphrase: {missing[:5]}")
    _digest_tasks(training, {task: number for number, task in enumerate(tasks)}, digest)
    texts = [*tasks, *(text for task in tasks for text in paraphrases.get(task, []))]
    return Instructions(texts, paraphrases, report)


def _digest_tasks(training: Sequence[Source], order: Mapping[str, int], digest: xxhash.xxh3_128) -> None:
    """Hashes which frame has which instruction, whatever its number is in ``meta/tasks.parquet``."""
    for source in training:
        known = np.asarray(sorted(source.metadata.tasks))
        number = np.asarray([order.get(source.metadata.tasks[index], -1) for index in known.tolist()])
        for block in source.blocks("task_index"):
            digest.update(number[np.searchsorted(known, block[:, 0].astype(np.int64))])
