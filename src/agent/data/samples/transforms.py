"""Changes samples by pure functions: padding and paraphrasing."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from agent.reproducibility import stream


def pad_vector(values: np.ndarray, size: int) -> np.ndarray:
    """Pads (…, d) to (…, size) with zeros behind.

    Raises:
        ValueError: if d is larger than ``size``.
    """
    missing = size - values.shape[-1]
    if missing < 0:
        raise ValueError(f"{values.shape[-1]} dimensions do not fit into {size}")
    padded = np.zeros((*values.shape[:-1], size), dtype=values.dtype)  # np.pad takes ten times as long
    padded[..., : values.shape[-1]] = values
    return padded


def load_paraphrases(path: str, tasks: Iterable[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Reads the file ``{instruction: [paraphrases]}``; returns it, and the tasks that it lacks.

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
    """Chooses the words of sample ``k``: with probability 0.5 one of the paraphrases."""
    if task not in paraphrases:
        return task
    generator = stream(seed, "paraphrase", k)
    if generator.random() < 0.5:
        return task
    return paraphrases[task][int(generator.integers(len(paraphrases[task])))]
