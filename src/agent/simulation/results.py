"""Keeps the results of an evaluation in simulation: a line for each episode, and a summary with confidence intervals."""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from agent.safe_files import lock, write_text

log = logging.getLogger(__name__)
EPISODES, SETTINGS, SUMMARY = "episodes.jsonl", "settings.json", "results.json"
Z95 = 1.959963984540054
"""The 97.5% quantile of the standard normal distribution."""


@dataclass(frozen=True)
class EpisodeResult:
    """How an episode ended; all but ``seconds`` follows from checkpoint, settings, task and number."""

    task: str
    episode: int
    environment_seed: int
    success: bool
    steps: int
    """Steps until the success, or all that were allowed."""
    reward: float
    """Meta-World's reward, summed over the steps."""
    seconds: float


def wilson(successes: int, episodes: int) -> tuple[float, float]:
    """Computes the 95% interval of a success rate (Wilson, 1927); unlike mean ± deviation it holds near 0 and 1."""
    assert 0 <= successes <= episodes and episodes > 0, (successes, episodes)
    rate, z2 = successes / episodes, Z95**2
    middle = (rate + z2 / (2 * episodes)) / (1 + z2 / episodes)
    half = Z95 / (1 + z2 / episodes) * math.sqrt(rate * (1 - rate) / episodes + z2 / (4 * episodes**2))
    return max(0.0, middle - half), min(1.0, middle + half)


class ResultsFolder:
    """The results of one checkpoint under one set of settings; an evaluation that was stopped continues from it.

    Args:
        path: made if it is not there.
        settings: everything that an episode's outcome depends on.

    Raises:
        ValueError: if the folder holds results of other settings, or another process is writing to it.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path, self.settings = path, settings
        path.mkdir(parents=True, exist_ok=True)
        held = f"--out: another evaluation is writing to {path}; wait for it or name another"
        self._lock = lock(path / ".lock", "evaluation", lambda _: held)
        self.done: dict[tuple[str, int], EpisodeResult] = {}
        try:
            self._check_settings()
            self._read_episodes()
        except ValueError:
            self.close()
            raise

    def _check_settings(self) -> None:
        file = self.path / SETTINGS
        if not file.is_file():
            write_text(file, json.dumps(self.settings, indent=1) + "\n")
            return
        try:
            old = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"--out: {file} is not JSON ({error}); name another folder, or remove this one") from None
        keys = [*old, *(key for key in self.settings if key not in old)]
        changed = [
            f"{key}: {old.get(key)} → {self.settings.get(key)}"
            for key in keys
            if old.get(key) != self.settings.get(key)
        ]
        if changed:
            raise ValueError(
                f"--out: {self.path} holds results of another evaluation ({'; '.join(changed)}); name another folder, or "
                "remove this one"
            )

    def _read_episodes(self) -> None:
        file = self.path / EPISODES
        if not file.is_file():
            return
        text = file.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        if whole != text:  # a process that was killed while it wrote
            write_text(file, whole)
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                result = EpisodeResult(**json.loads(line))
            except (ValueError, TypeError) as error:
                raise ValueError(f"--out: {file}, line {number}, is no result ({error}); remove the line") from None
            self.done[result.task, result.episode] = result

    def add(self, result: EpisodeResult) -> None:
        """Keeps a result, on the disk when this returns."""
        if (result.task, result.episode) in self.done:  # done once more for its video
            return
        self.done[result.task, result.episode] = result
        with open(self.path / EPISODES, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(asdict(result)) + "\n")
            stream.flush()
            os.fsync(stream.fileno())

    def summarize(self, tasks: Sequence[str], episodes: int) -> dict[str, Any]:
        """Writes ``results.json`` about all episodes that were played, and returns its contents.

        Args:
            tasks: that come first; earlier ones of this folder follow.
            episodes: of each of them that are done at least. An evaluation that was stopped may have left gaps; what is
                behind one is left out.
        """
        counts = {task: self._unbroken(task) for task in dict.fromkeys([*tasks, *(task for task, _ in self.done)])}
        assert all(counts[task] >= episodes for task in tasks), (counts, tasks, episodes)
        rows, everything = [], []
        for task, count in counts.items():
            if not count:
                continue
            results = [self.done[task, episode] for episode in range(count)]
            wins = [result for result in results if result.success]
            low, high = wilson(len(wins), count)
            rows.append(
                {
                    "task": task,
                    "episodes": count,
                    "successes": len(wins),
                    "success_rate": len(wins) / count,
                    "wilson95": [low, high],
                    "mean_steps_to_success": sum(r.steps for r in wins) / len(wins) if wins else None,
                    "mean_reward": sum(r.reward for r in results) / count,
                    "seconds": sum(r.seconds for r in results),
                }
            )
            everything += [asdict(result) for result in results]
        summary = {"settings": self.settings, "tasks": rows, "episodes": everything}
        write_text(self.path / SUMMARY, json.dumps(summary, indent=1) + "\n")
        return summary

    def _unbroken(self, task: str) -> int:
        """Counts the episodes of a task that were played, from the first on without a gap."""
        return next(number for number in itertools.count() if (task, number) not in self.done)

    def close(self) -> None:
        """Gives the folder's lock back."""
        os.close(self._lock)


def table(summary: dict[str, Any]) -> str:
    """Writes the summary as a table for people."""
    width = max(len(row["task"]) for row in summary["tasks"])
    lines = [f"{'task':<{width}}  successes     rate   95% interval     steps to success"]
    for row in summary["tasks"]:
        low, high = (100 * bound for bound in row["wilson95"])
        steps = row["mean_steps_to_success"]
        lines.append(
            f"{row['task']:<{width}}  {row['successes']:>4} of {row['episodes']:<4}{100 * row['success_rate']:>7.1f}%"
            f"   {low:5.1f} to {high:5.1f}%   {'–' if steps is None else format(steps, '.0f'):>8}"
        )
    return "\n".join(lines)
