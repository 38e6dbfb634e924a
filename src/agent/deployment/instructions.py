"""Turns instructions into tokens in the way that a saved policy's processors describe."""

from __future__ import annotations

import logging
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from agent.batch import Prompt
from agent.deployment.processors import Processors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


class InstructionTokens:
    """Tokenizes instructions and caches the tokens of the last thousand.

    Args:
        tokenizer: the Hugging Face tokenizer.
        prompt: the policy's prompt.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> None:
        self._tokenizer, self._prompt = tokenizer, prompt
        self.pad = int(tokenizer.pad_token_id)
        """The id of the padding token."""
        self._kept = lru_cache(maxsize=1000)(self._made)

    def __call__(self, task: str) -> tuple[int, ...]:
        """Returns the token ids of an instruction, without padding.

        An instruction that is longer than the policy accepts is cut, with a warning in the log.

        Raises:
            ValueError: if a token is not in the model's vocabulary.
        """
        return self._kept(task)

    def _made(self, task: str) -> tuple[int, ...]:
        text, most = self._prompt.text(task), self._prompt.max_length
        ids = self._tokenizer(text)["input_ids"]
        if len(ids) > most:
            log.warning("instruction %.200r has %d tokens and is cut at %d", task, len(ids), most)
            ids = self._tokenizer(text, max_length=most, truncation=True)["input_ids"]
        if ids and max(ids) >= self._prompt.vocabulary:  # on a GPU such a token would end the process
            raise ValueError(
                f"task: {task!r:.60} gives token {max(ids)}, the model's vocabulary has {self._prompt.vocabulary}; is the "
                "tokenizer another model's?"
            )
        return tuple(ids)


class NoTokens:
    """Stands in for ``InstructionTokens`` for a policy that reads no instructions."""

    pad = 0

    def __call__(self, task: str) -> tuple[int, ...]:
        """Returns no tokens."""
        return ()


def load_instruction_tokens(pretrained: Path, processors: Processors, name: str | None) -> InstructionTokens | NoTokens:
    """Loads the tokenizer that the processors name, or another one.

    Args:
        pretrained: the checkpoint's folder, for messages.
        processors: the checkpoint's processors.
        name: folder or hub name of a tokenizer to use instead; None for the checkpoint's own.

    Raises:
        ValueError: if the tokenizer cannot be loaded; the message says what to do.
    """
    from agent.data.samples.task_tokens import load_tokenizer

    prompt = processors.prompt
    if prompt is None:
        return NoTokens()
    try:
        tokenizer = load_tokenizer(name or prompt.tokenizer, prompt.advice)
    except ValueError as error:
        raise ValueError(
            f"{error} For the checkpoint {pretrained}, whose processors name it, another can be given: --tokenizer FOLDER"
        ) from None
    if tokenizer.pad_token_id is None:
        raise ValueError(f"the tokenizer {name or prompt.tokenizer} has no padding token; give another: --tokenizer")
    return InstructionTokens(tokenizer, prompt)
