"""Builds π0's prompt: the instruction and a newline, as in openpi and LeRobot's ``Pi0NewLineProcessor``."""

from __future__ import annotations

from agent.batch import Prompt
from agent.models.pi.configuration import PI0Config

_GATED = (
    "google/paligemma-3b-pt-224 is gated: accept its licence at "
    "https://huggingface.co/google/paligemma-3b-pt-224 and run `hf auth login`; or "
)


def prompt(config: PI0Config) -> Prompt:
    """Says how an instruction is turned into π0's tokens."""
    return Prompt(
        tokenizer=config.tokenizer_path,
        max_length=config.tokenizer_max_length,
        text=with_newline,
        vocabulary=config.language.vocab_size,
        vocabulary_key="vocab_size in model_cfg.paligemma_variant",
        advice=_GATED,
    )


def with_newline(task: str) -> str:
    """Returns the instruction with one newline at its end, which π0's prompts need; an existing one is kept."""
    return task if task.endswith("\n") else task + "\n"
