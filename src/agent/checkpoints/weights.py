"""Loads weights and accounts for them: every tensor of the model and of the file is loaded, waived by a rule, or an error."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from agent.checkpoints import tensor_reader
from agent.checkpoints.tensor_reader import Checksums
from agent.parallel import sharding


class Layout(Protocol):
    """How the files name the model's tensors."""

    @property
    def title(self) -> str:
        """Of the kind of file, for people."""

    @property
    def fresh(self) -> Sequence[tuple[str, str]]:
        """Patterns of the model's names that such files do not hold → the reason."""

    def theirs(self, name: str) -> str | None:
        """The files' name of the model's tensor."""


class Match(Protocol):
    """Where each tensor of the files goes; the three together hold every name in the files."""

    @property
    def layout(self) -> Layout:
        """How this kind of checkpoint names the tensors."""

    @property
    def sources(self) -> Mapping[str, str]:
        """The model's name → the file's."""

    @property
    def waived(self) -> Mapping[str, str]:
        """Names of the file that are left behind → the reason."""

    @property
    def extra(self) -> Sequence[str]:
        """Names of the file that nobody knows."""


Fit = Callable[[str, tuple[int, ...], tuple[int, ...]], "tuple[bool, str] | None"]
"""What a model says to a tensor of another shape: (the model's name, shape in the file, shape in the model) → (True, the
rule that allows it), and the part that both have in common is loaded and what the model has beyond it becomes zero; or
(False, what to write instead); or None, if it knows nothing of it."""


@dataclass
class Coverage:
    """What became of every tensor, by the model's own names and by the file's."""

    source: str
    expected: dict[str, str]
    """The model's name → the name to expect in the files."""
    loaded: list[str] = field(default_factory=list)
    fresh: dict[str, str] = field(default_factory=dict)
    """Not in the files by a rule → the rule."""
    missing: list[str] = field(default_factory=list)
    wrong_shape: dict[str, str] = field(default_factory=dict)
    adapted: dict[str, str] = field(default_factory=dict)
    """Loaded in another shape → the rule."""
    waived: dict[str, str] = field(default_factory=dict)
    """The files' names that are left behind → the rule."""
    extra: list[str] = field(default_factory=list)
    """The files' names that nobody knows."""

    def table(self) -> str:
        """One row per module of the model, one for names it does not know, then the rules and what they waived."""
        columns = ("expected", "loaded", "waived", "missing", "extra", "wrong shape")
        groups = (self.expected, self.loaded, self.fresh, self.missing, (), self.wrong_shape)
        rows: dict[str, list[int]] = defaultdict(lambda: [0] * len(columns))
        for column, names in enumerate(groups):
            for name in names:
                rows[name.split(".")[0]][column] += 1
        if self.extra:
            rows["(unknown)"][columns.index("extra")] = len(self.extra)
        lines = [f"weights from {self.source}:", "  " + f"{'module':<24}" + "".join(f"{c:>13}" for c in columns)]
        lines += [f"  {module:<24}" + "".join(f"{n:>13}" for n in counts) for module, counts in rows.items()]
        rules: dict[str, int] = defaultdict(int)
        for what, reasons in (("left", self.waived), ("fresh", self.fresh), ("reshaped", self.adapted)):
            for reason in reasons.values():
                rules[f"{what}: {reason}"] += 1
        lines += [f"  {count} {rule}" for rule, count in rules.items()]
        return "\n".join(lines)

    def check(self) -> None:
        """Refuses a file that does not cover the model.

        Raises:
            ValueError: names the tensors that are missing, of another shape, or unknown.
        """
        problems = [f"missing in the file: {self.expected[name]}" for name in self.missing]
        problems += [f"other shape: {self.expected[name]}: {text}" for name, text in self.wrong_shape.items()]
        problems += [f"unknown to the model: {name}" for name in self.extra]
        if problems:
            shown = "\n  ".join(problems[:12]) + (f"\n  … and {len(problems) - 12} more" if len(problems) > 12 else "")
            raise ValueError(
                f"the weights in {self.source} do not fit this model; nothing is trained from weights that only half "
                f"match.\n{self.table()}\n  {shown}\nCheck that the model JSON is the one these weights were made with."
            )


def load_into(
    tensors: Mapping[str, Tensor],
    files: list[Path],
    match: Callable[[list[str]], Match],
    fit: Fit,
    checksums: Checksums | None = None,
) -> Coverage:
    """Reads safetensors files into the model's tensors, whatever their device and number type, and accounts for each of them.

    Each file is read once, from front to back, into the memory where its tensors belong; the host needs a few
    megabytes more. Nothing is read before the accounts are in order.

    Args:
        tensors: the model's own name → tensor to fill.
        files: safetensors files.
        match: sorts the names in the files, see :class:`Match`.
        fit: see :data:`Fit`.
        checksums: gives for a file the checksum to feed with its bytes.

    Returns:
        The coverage, already checked.

    Raises:
        ValueError: if a file is damaged, or the files and the model do not cover each other.
    """
    coverage, places = account({name: tuple(tensor.shape) for name, tensor in tensors.items()}, files, match, fit)
    for path, sources in places.items():
        targets, aside = {}, {}
        for theirs, (ours, shape) in sources.items():
            target = targets[theirs] = tensors[ours]
            if shape[1:] != target.shape[1:] or shape[:1] < target.shape[:1]:  # not the first rows of the file's
                targets[theirs] = aside[ours] = torch.empty(shape, dtype=target.dtype)
        tensor_reader.stream(path, targets, checksums(path) if checksums is not None else None)
        with torch.no_grad():
            for ours, source in aside.items():
                common = tuple(slice(min(sizes)) for sizes in zip(source.shape, tensors[ours].shape, strict=True))
                whole = source.new_zeros(tensors[ours].shape)
                whole[common] = source[common]
                sharding.fill(tensors[ours], whole)
    return coverage


Places = dict[Path, dict[str, tuple[str, tuple[int, ...]]]]
"""File → name in it → the model's name, and the shape in the file."""


def account(
    shapes: Mapping[str, tuple[int, ...]], files: list[Path], match: Callable[[list[str]], Match], fit: Fit
) -> tuple[Coverage, Places]:
    """What becomes of every tensor, from the headers of the files alone.

    Args:
        shapes: the model's own name → shape.
        files: safetensors files.
        match: sorts the names in the files, see :class:`Match`.
        fit: see :data:`Fit`.

    Returns:
        The coverage, already checked, and where to read what.

    Raises:
        ValueError: if a file is damaged, or the files and the model do not cover each other.
    """
    listed: dict[str, tuple[Path, tuple[int, ...]]] = {}
    for path in files:
        for entry in tensor_reader.entries(path):
            if entry.name in listed:
                raise ValueError(
                    f"{listed[entry.name][0]} and {path} both hold {entry.name}, and nobody knows which of the two counts; "
                    "is one of them left from other weights?"
                )
            listed[entry.name] = (path, entry.shape)
    found = match(list(listed))
    fresh = {name: why for name in shapes if name not in found.sources and (why := _rule(name, found.layout.fresh))}
    coverage = Coverage(
        source=f"{files[0] if len(files) == 1 else files[0].parent} ({found.layout.title})",
        expected={name: found.layout.theirs(name) or name for name in shapes},
        fresh=fresh,
        missing=[name for name in shapes if name not in found.sources and name not in fresh],
        waived=dict(found.waived),
        extra=list(found.extra),
    )
    places: Places = {path: {} for path in files}
    for ours, theirs in found.sources.items():
        path, shape = listed[theirs]
        if shape != shapes[ours]:
            difference = fit(ours, shape, shapes[ours])
            if difference is None or not difference[0]:
                advice = f"; {difference[1]}" if difference is not None else ""
                coverage.wrong_shape[ours] = f"{list(shape)} in the file, {list(shapes[ours])} in the model{advice}"
                continue
            coverage.adapted[ours] = difference[1]
        places[path][theirs] = (ours, shape)
        coverage.loaded.append(ours)
    coverage.check()
    return coverage, places


def _rule(name: str, rules: Sequence[tuple[str, str]]) -> str | None:
    return next((why for pattern, why in rules if re.fullmatch(pattern, name)), None)
