"""From an instruction to tokens, as a saved policy's processors make them."""

from __future__ import annotations

import logging
from functools import lru_cache
from pathlib import Path
from typing import Any

from agent.deployment.processors import Processors

log = logging.getLogger(__name__)


class InstructionTokens:
    """Tokens of instructions; those of the last thousand are kept.

    Args:
        tokenizer: Hugging Face's.
        processors: what is done before it, and how many tokens are left.
        vocabulary: tokens that the model knows.
    """

    def __init__(self, tokenizer: Any, processors: Processors, vocabulary: int) -> None:
        self._tokenizer, self._processors, self._vocabulary = tokenizer, processors, vocabulary
        self.pad = int(tokenizer.pad_token_id)
        """The token that fills up."""
        self._kept = lru_cache(maxsize=1000)(self._made)

    def __call__(self, task: str) -> tuple[int, ...]:
        """The tokens of an instruction, without padding; a longer one than the policy takes is cut, and that logged.

        Raises:
            ValueError: if the model does not know one.
        """
        return self._kept(task)

    def _made(self, task: str) -> tuple[int, ...]:
        text = task if task.endswith("\n") or not self._processors.newline else task + "\n"
        ids, most = self._tokenizer(text)["input_ids"], self._processors.max_tokens
        if len(ids) > most:
            log.warning("instruction %.200r has %d tokens and is cut at %d", task, len(ids), most)
            ids = self._tokenizer(text, max_length=most, truncation=True)["input_ids"]
        if ids and max(ids) >= self._vocabulary:  # on a GPU it would end the process
            raise ValueError(
                f"task: {task!r:.60} gives token {max(ids)}, the model's vocabulary has {self._vocabulary}; is the tokenizer "
                "another model's?"
            )
        return tuple(ids)


def load_instruction_tokens(
    pretrained: Path, processors: Processors, name: str | None, vocabulary: int
) -> InstructionTokens:
    """With the tokenizer that the processors name, or another.

    Args:
        pretrained: the checkpoint's folder, for messages.
        processors: of the checkpoint.
        name: folder or hub name of a tokenizer to take instead.
        vocabulary: tokens that the model knows.

    Raises:
        ValueError: if it cannot be had, with what to do.
    """
    from agent.data.samples.task_tokens import load_tokenizer

    try:
        tokenizer = load_tokenizer(name or processors.tokenizer)
    except ValueError as error:
        raise ValueError(
            f"{error} For the checkpoint {pretrained}, whose processors name it, another can be given: --tokenizer FOLDER"
        ) from None
    if tokenizer.pad_token_id is None:
        raise ValueError(
            f"the tokenizer {name or processors.tokenizer} has no padding token; give another: --tokenizer"
        )
    return InstructionTokens(tokenizer, processors, vocabulary)
