"""The tokens of the instructions, kept from one start to the next.

transformers takes seconds to import and needs more to read a vocabulary of 257,152 tokens. The instructions of a data set
are few and do not change, so a start whose instructions were tokenized before needs neither.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import xxhash

from agent import hub
from agent.batch import Prompt
from agent.data import cache

_VERSION = 1


class TaskTokens:
    """The tokens of every instruction, made once: workers need no tokenizer.

    Args:
        max_length: L before trimming.
        pad_token_id: what fills up a batch.
        tokens: instruction → its tokens, at most L, without padding.
        too_long: instruction → its number of tokens, where that is above ``max_length``: these are cut.
    """

    def __init__(
        self, max_length: int, pad_token_id: int, tokens: dict[str, list[int]], too_long: dict[str, int]
    ) -> None:
        self.max_length, self.pad_token_id, self.too_long = max_length, pad_token_id, too_long
        self._tokens = {task: np.asarray(ids, dtype=np.int64) for task, ids in tokens.items()}

    def __call__(self, task: str) -> np.ndarray:
        """The tokens of an instruction, (at most L,) int64, without padding."""
        return self._tokens[task]

    def largest(self) -> int:
        """The largest token id that occurs, padding included."""
        return max(self.pad_token_id, *(int(tokens.max()) for tokens in self._tokens.values()))

    def warnings(self) -> list[str]:
        """A line for every instruction that is cut."""
        return [
            f"instruction {task!r} has {count} tokens and is cut at {self.max_length}: "
            "raise model_cfg.tokenizer_max_length"
            for task, count in self.too_long.items()
        ]


def cached_task_tokens(prompt: Prompt | None, tasks: Iterable[str], root: Path) -> TaskTokens:
    """``make_task_tokens``, or the same tokens from an earlier start with the same tokenizer files and instructions.

    Args:
        prompt: how an instruction becomes tokens; None for a policy that reads none.
        tasks: the instructions of all data sets, and their paraphrases.
        root: of the data set beside which they are kept.

    Raises:
        ValueError: as ``make_task_tokens``.
    """
    texts = sorted(set(tasks))
    if prompt is None:
        return TaskTokens(0, 0, {text: [] for text in texts}, {})
    name = _name(prompt, texts)
    if name is None:
        return make_task_tokens(prompt, texts)
    tokens = cache.find(root, name, partial(_read, max_length=prompt.max_length))
    if tokens is None:
        tokens = make_task_tokens(prompt, texts)
        cache.keep(root, name, partial(_write, tokens=tokens, texts=texts))
    return tokens


def make_task_tokens(prompt: Prompt, tasks: Iterable[str]) -> TaskTokens:
    """Tokenizes instructions.

    The prompt of an instruction is cut at ``max_length``, and a batch pads it on the right, like LeRobot's
    ``TokenizerProcessorStep``.

    Raises:
        ValueError: if the tokenizer cannot be had or has no padding token, or an instruction is empty.
    """
    tokenizer, max_length = load_tokenizer(prompt.tokenizer, prompt.advice), prompt.max_length
    if tokenizer.pad_token_id is None:
        raise ValueError(f"the tokenizer at {prompt.tokenizer} (model_cfg.tokenizer_path) has no padding token")
    made: dict[str, list[int]] = {}
    too_long: dict[str, int] = {}
    for task in sorted(set(tasks)):
        if not task.strip():
            raise ValueError("an instruction is empty: every episode needs a task in words")
        text = prompt.text(task)
        tokens = tokenizer(text)["input_ids"]
        if len(tokens) > max_length:
            too_long[task] = len(tokens)
            # asked anew, because a tokenizer may keep an end token when it cuts
            tokens = tokenizer(text, max_length=max_length, truncation=True)["input_ids"]
        made[task] = list(tokens)
    return TaskTokens(max_length, int(tokenizer.pad_token_id), made, too_long)


def _name(prompt: Prompt, texts: Sequence[str]) -> str | None:
    """Of what is kept, with all that it was made from; None if the tokenizer is not on this machine yet."""
    folder = _local_folder(prompt.tokenizer)
    if folder is None:
        return None
    settings = [
        _VERSION,
        prompt.max_length,
        texts,
        [prompt.text(text) for text in texts],
        version("transformers"),
        version("tokenizers"),
    ]
    digest = xxhash.xxh3_128(json.dumps(settings).encode())
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".model", ".txt", ".jinja") and path.is_file():
            contents = path.read_bytes()
            digest.update(f"{path.name} {len(contents)}".encode())
            digest.update(contents)
    return f"tokens-{digest.hexdigest()}.json"


def _local_folder(tokenizer_path: str) -> Path | None:
    """Where the tokenizer's files lie: the folder itself, or the hub's copy in the local cache."""
    folder = Path(tokenizer_path).expanduser()
    if folder.is_dir():
        return folder
    if hub.parse(tokenizer_path) is None:
        return None
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(tokenizer_path, "tokenizer_config.json")
    return Path(config).parent if isinstance(config, str) else None


def _write(path: Path, tokens: TaskTokens, texts: Sequence[str]) -> None:
    kept = {
        "pad_token_id": tokens.pad_token_id,
        "tokens": {text: tokens(text).tolist() for text in texts},
        "too_long": tokens.too_long,
    }
    path.write_text(json.dumps(kept), encoding="utf-8")


def _read(path: Path, max_length: int) -> TaskTokens:
    kept = json.loads(path.read_text(encoding="utf-8"))
    return TaskTokens(max_length, kept["pad_token_id"], kept["tokens"], kept["too_long"])


def load_tokenizer(tokenizer_path: str, advice: str = "") -> Any:
    """The tokenizer of a local folder or of the hub, from the local cache when it is there.

    Args:
        tokenizer_path: a local folder or a hub id.
        advice: see ``Prompt``.

    Raises:
        ValueError: at once, with what to do, if it cannot be had.
    """
    from transformers import AutoTokenizer

    folder = Path(tokenizer_path).expanduser()
    looks_local = tokenizer_path.startswith((".", "/", "~")) or tokenizer_path.count("/") != 1
    if looks_local and not folder.is_dir():
        _refuse_tokenizer(tokenizer_path, "there is no such folder", None, advice)
    if folder.is_dir():
        try:
            return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        except (OSError, ValueError, KeyError, TypeError) as error:
            _refuse_tokenizer(tokenizer_path, "the folder holds no tokenizer that transformers reads", error, advice)
    try:
        # For a large vocabulary transformers asks the hub even with local_files_only, unless it is offline as a whole.
        with hub.offline():
            return AutoTokenizer.from_pretrained(tokenizer_path, local_files_only=True)
    except (OSError, ValueError):
        pass  # not in the cache
    if not _hub_answers():
        _refuse_tokenizer(tokenizer_path, "it is not in the local cache and the hub cannot be reached", None, advice)
    try:
        return AutoTokenizer.from_pretrained(tokenizer_path)
    except (OSError, ValueError) as error:  # the hub's and transformers' own errors are OSErrors
        _refuse_tokenizer(tokenizer_path, (str(error).strip().splitlines() or ["no reason given"])[0], error, advice)


def _hub_answers() -> bool:
    """One question with a time limit: transformers itself retries for minutes when there is no network."""
    import httpx
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        httpx.head(constants.ENDPOINT, timeout=10)
    except httpx.HTTPError:
        return False
    return True


def _refuse_tokenizer(tokenizer_path: str, reason: str, error: Exception | None, advice: str) -> NoReturn:
    raise ValueError(
        f"the tokenizer {tokenizer_path!r} (model_cfg.tokenizer_path) cannot be loaded: {reason}. "
        f"{f'{advice}s' if advice else 'S'}et model_cfg.tokenizer_path to a local folder with tokenizer.json and "
        "tokenizer_config.json."
    ) from error
