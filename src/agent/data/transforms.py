"""Pure functions from a sample to a sample: resizing, padding, instructions to tokens."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from agent import hub
from agent.reproducibility import stream

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class SampleSpec:
    """What the model wants of a sample, as plain values: the data code knows no model."""

    chunk_size: int
    """T, actions per sample."""
    max_state_dim: int
    """S, to which the state is padded."""
    max_action_dim: int
    """A, to which the actions are padded."""
    image_resolution: tuple[int, int]
    """Height and width of what the model sees."""
    tokenizer_max_length: int
    """Most tokens of an instruction."""
    camera_slots: tuple[str, ...] = ()
    """The model's camera features; empty to infer them, with the dimensions, from the first data set."""
    state_dim: int | None = None
    """The robot's own state dimensions; None to infer."""
    action_dim: int | None = None
    """The robot's own action dimensions; None to infer."""


def fitted_size(old: tuple[int, int], new: tuple[int, int]) -> tuple[int, int]:
    """Height and width of the largest picture with the proportions of ``old`` that fits into ``new``."""
    ratio = max(old[1] / new[1], old[0] / new[0])
    # openpi's truncation can round a side of a very long image to nothing
    return max(1, int(old[0] / ratio)), max(1, int(old[1] / ratio))


def resize_with_pad(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Resizes without distortion and centres on black, as openpi does.

    Args:
        image: (3, H, W) uint8.

    Returns:
        (3, height, width) uint8; differs from openpi's float result by rounding only.
    """
    import torch
    from torch.nn.functional import interpolate, pad

    old_height, old_width = image.shape[-2:]
    if (old_height, old_width) == (height, width):
        return image
    new_height, new_width = fitted_size((old_height, old_width), (height, width))
    resized = interpolate(image[None].float(), (new_height, new_width), mode="bilinear", align_corners=False)[0]
    resized = resized.round_().clamp_(0, 255).to(torch.uint8)
    top, left = (height - new_height) // 2, (width - new_width) // 2
    return pad(resized, (left, width - new_width - left, top, height - new_height - top))


def pad_vector(values: np.ndarray, size: int) -> np.ndarray:
    """(…, d) → (…, size), zeros behind.

    Raises:
        ValueError: if d is larger than ``size``.
    """
    missing = size - values.shape[-1]
    if missing < 0:
        raise ValueError(f"{values.shape[-1]} dimensions do not fit into {size}")
    padded = np.zeros((*values.shape[:-1], size), dtype=values.dtype)  # np.pad takes ten times as long
    padded[..., : values.shape[-1]] = values
    return padded


class TaskTokens:
    """The tokens of every instruction, made once: workers need no tokenizer.

    An instruction ends with exactly the newline that π0's prompts end with, is cut at ``max_length`` and padded
    on the right, like LeRobot's ``Pi0NewLineProcessor`` and ``TokenizerProcessorStep``.

    Args:
        tokenizer_path: a local folder or a hub id.
        max_length: L before trimming.
        tasks: the instructions of all data sets, and their paraphrases.

    Raises:
        ValueError: if the tokenizer cannot be had or has no padding token, or an instruction is empty.
    """

    def __init__(self, tokenizer_path: str, max_length: int, tasks: Iterable[str]) -> None:
        tokenizer = load_tokenizer(tokenizer_path)
        if tokenizer.pad_token_id is None:
            raise ValueError(f"the tokenizer at {tokenizer_path} (model_cfg.tokenizer_path) has no padding token")
        self.max_length = max_length
        self.pad_token_id = int(tokenizer.pad_token_id)
        self.too_long: dict[str, int] = {}
        """Instruction → its number of tokens, where that is above ``max_length``: these are cut."""
        self._tokens: dict[str, np.ndarray] = {}
        for task in sorted(set(tasks)):
            if not task.strip():
                raise ValueError("an instruction is empty: every episode needs a task in words")
            text = task if task.endswith("\n") else task + "\n"
            tokens = tokenizer(text)["input_ids"]
            if len(tokens) > max_length:
                self.too_long[task] = len(tokens)
                # asked anew, because a tokenizer may keep an end token when it cuts
                tokens = tokenizer(text, max_length=max_length, truncation=True)["input_ids"]
            self._tokens[task] = np.asarray(tokens, dtype=np.int64)

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


def load_tokenizer(tokenizer_path: str) -> Any:
    """The tokenizer of a local folder or of the hub, from the local cache when it is there.

    Raises:
        ValueError: at once, with what to do, if it cannot be had.
    """
    from transformers import AutoTokenizer

    folder = Path(tokenizer_path).expanduser()
    looks_local = tokenizer_path.startswith((".", "/", "~")) or tokenizer_path.count("/") != 1
    if looks_local and not folder.is_dir():
        _refuse_tokenizer(tokenizer_path, "there is no such folder", None)
    if folder.is_dir():
        try:
            return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        except (OSError, ValueError, KeyError, TypeError) as error:
            _refuse_tokenizer(tokenizer_path, "the folder holds no tokenizer that transformers reads", error)
    try:
        # For a large vocabulary transformers asks the hub even with local_files_only, unless it is offline as a whole.
        with hub.offline():
            return AutoTokenizer.from_pretrained(tokenizer_path, local_files_only=True)
    except (OSError, ValueError):
        pass  # not in the cache
    if not _hub_answers():
        _refuse_tokenizer(tokenizer_path, "it is not in the local cache and the hub cannot be reached", None)
    try:
        return AutoTokenizer.from_pretrained(tokenizer_path)
    except (OSError, ValueError) as error:  # the hub's and transformers' own errors are OSErrors
        _refuse_tokenizer(tokenizer_path, (str(error).strip().splitlines() or ["no reason given"])[0], error)


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


def _refuse_tokenizer(tokenizer_path: str, reason: str, error: Exception | None) -> NoReturn:
    raise ValueError(
        f"the tokenizer {tokenizer_path!r} (model_cfg.tokenizer_path) cannot be loaded: {reason}. "
        "google/paligemma-3b-pt-224 is gated: accept its licence at "
        "https://huggingface.co/google/paligemma-3b-pt-224 and run `hf auth login`; or set "
        "model_cfg.tokenizer_path to a local folder with tokenizer.json and tokenizer_config.json."
    ) from error


def load_paraphrases(path: str, tasks: Iterable[str]) -> tuple[dict[str, list[str]], list[str]]:
    """The paraphrases of ``{instruction: [paraphrases]}`` and the tasks that have none.

    Raises:
        ValueError: if the file cannot be read, has another form, or knows none of the tasks.
    """
    form = 'task_paraphrase is a JSON file of the form {"instruction": ["paraphrase", …], …}'
    try:
        content = json.loads(Path(path).expanduser().read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); {form}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; {form}")
    for task, texts in content.items():
        if not isinstance(texts, list) or not texts or not all(isinstance(t, str) and t.strip() for t in texts):
            raise ValueError(f"{path}: the entry of {task!r} is not a list of non-empty strings; {form}")
    wanted = sorted(set(tasks))
    missing = [task for task in wanted if task not in content]
    if len(missing) == len(wanted):
        raise ValueError(f"{path} has an entry for none of the tasks, such as {wanted[0]!r}; {form}")
    return content, missing


def paraphrase(task: str, paraphrases: dict[str, list[str]], seed: int, k: int) -> str:
    """The instruction of sample ``k``: with probability 0.5 one of its paraphrases."""
    if task not in paraphrases:
        return task
    generator = stream(seed, "paraphrase", k)
    if generator.random() < 0.5:
        return task
    return paraphrases[task][int(generator.integers(len(paraphrases[task])))]
