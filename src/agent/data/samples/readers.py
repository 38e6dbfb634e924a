"""Makes what reads the samples of a run: one reader for training, one for validation, with the tokens that they share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xxhash

from agent.batch import SampleSpec
from agent.data.normalization.robot import Robot
from agent.data.samples.augmentation import augmentations
from agent.data.samples.reader import Draw, SampleReader
from agent.data.samples.task_tokens import cached_task_tokens
from agent.data.samples.wording import Wording, collect
from agent.data.source import Source


@dataclass(frozen=True)
class Readers:
    """What reads the samples of a run."""

    training: SampleReader
    validation: SampleReader | None
    """None when nothing is held out."""
    tokens: list[np.ndarray]
    """Of every text that a sample may be read with, in the order of the texts."""
    report: list[str]
    """Lines for the log: instructions without paraphrases, augmented pictures, instructions that are cut."""


def make_readers(
    sources: tuple[Sequence[Source], Sequence[Source]],
    robots: Sequence[Robot],
    spec: SampleSpec,
    wording: Wording,
    digest: xxhash.xxh3_128,
    *,
    seed: int,
    draw: Draw,
    validation_draw: Draw,
) -> Readers:
    """Collects the instructions, makes their tokens, and puts readers together.

    Args:
        sources: for training and for validation.
        robots: of each source, those of validation last.
        spec: what the model wants of a sample.
        wording: how instructions become tokens.
        digest: gets which training frame has which instruction.
        seed, draw, validation_draw: see ``build_data``.

    Raises:
        ValueError: if an instruction, the paraphrases, the tokenizer or the augmentation is not as it must be.
    """
    training, validation = sources
    instructions, count = collect(training, validation, wording, digest), len(training)
    for source in [*training, *validation]:
        source.table.release()  # every page was touched
    changes = [
        augmentations(s.config.augmentation, s.recorded_sizes(), spec.camera_slots, spec.image_resolution, str(s))
        for s in training
    ]
    augmented = [f"{s}: pictures of {', '.join(c)} are augmented" for s, c in zip(training, changes, strict=True) if c]
    texts, place = instructions.texts, training[0].metadata.root
    tokens = cached_task_tokens(wording.prompt, texts, place)
    paraphrases = instructions.paraphrases
    return Readers(
        training=SampleReader(training, robots[:count], tokens, spec, draw, seed, paraphrases, changes),
        validation=SampleReader(validation, robots[count:], tokens, spec, validation_draw, seed)
        if validation
        else None,
        tokens=[tokens(text) for text in sorted(set(texts))],
        report=[*instructions.report, *augmented, *tokens.warnings()],
    )
