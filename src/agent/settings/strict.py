"""Reads a config strictly: files, overrides of the command line and model configs of older versions, with a check of every
key and type before draccus builds the dataclasses.

draccus alone stops at the first mistake and names neither the file nor the nearest valid key; here all mistakes go
into one message, each with the line that made it.
"""

from __future__ import annotations

import re
import typing
from copy import copy
from pathlib import Path
from typing import Any, TypeVar

import draccus
import yaml
from draccus.utils import DecodingError, ParsingError

from agent.models.base import ModelConfig, Reading
from agent.settings.check import UNKNOWN, Mistake, check_tree, explain
from agent.settings.files import ConfigError, expand_variables, file_sources, read_file, read_yaml

ConfigClass = TypeVar("ConfigClass")


def parse_overrides(arguments: list[str]) -> dict[str, Any]:
    """``--a.b value``, ``--a.b=value`` and ``--flag`` → {"a.b": value}; values are read as YAML."""
    overrides: dict[str, Any] = {}
    position = 0
    while position < len(arguments):
        argument = arguments[position]
        position += 1
        if not argument.startswith("--") or len(argument) == 2:
            raise ConfigError(f"cannot read the argument '{argument}'; overrides look like --global_batch_size 64")
        key, equals, text = argument[2:].partition("=")
        if not equals:
            has_value = position < len(arguments) and not arguments[position].startswith("--")
            text = arguments[position] if has_value else "true"
            position += has_value
            if text.startswith("="):
                raise ConfigError(f"--{key}: there are no spaces around '='; write --{key} VALUE")
        try:
            overrides[key] = read_yaml(text, f"--{key}") if text != "" else ""
        except yaml.YAMLError as error:
            raise ConfigError(f"--{key}: cannot read the value '{text}': {error}") from None
    return overrides


def apply_override(tree: dict[str, Any], key: str, value: Any) -> tuple[str, ...]:
    """Sets one dotted key in place; a number steps into a list (``data.train.datasets.0.root``).

    Returns:
        The way to the key.
    """
    node: Any = tree
    path: list[str] = []
    parts = key.split(".")
    while True:
        here, parts = _first_key(node, parts)
        path.append(here)
        place: Any = _list_index(node, here, key) if isinstance(node, list) else here
        if not parts:
            node[place] = value
            return tuple(path)
        child = node.get(place) if isinstance(node, dict) else node[place]
        # A copy: what the file says in one place by an anchor in another (&, *) is one object.
        node[place] = copy(child) if isinstance(child, (dict, list)) else {}
        node = node[place]


def _first_key(node: Any, parts: list[str]) -> tuple[str, list[str]]:
    """Splits a dotted name into its first key and the rest. A key may hold dots itself, as ``observation.state`` does."""
    for length in range(len(parts), 1, -1):
        if isinstance(node, dict) and ".".join(parts[:length]) in node:
            return ".".join(parts[:length]), parts[length:]
    return parts[0], parts[1:]


def _list_index(node: list, part: str, key: str) -> int:
    if not part.isdigit() or int(part) >= len(node):
        raise ConfigError(f"--{key}: '{part}' must be a number below {len(node)}, the length of that list")
    return int(part)


# ── saying where ────────────────────────────────────────────────────────────────────────────────────────────────


def _add_override(sources: dict[tuple[str, ...], str], path: tuple[str, ...]) -> None:
    for known in [p for p in sources if p[: len(path)] == path]:
        del sources[known]
    for length in range(1, len(path) + 1):
        part = path[:length]
        if not any(known[:length] == part and len(known) > length for known in sources):
            sources[part] = "command line: --"


def _where(path: tuple[str, ...], sources: dict[tuple[str, ...], str]) -> str:
    """Says where a key is set, or the nearest one above it."""
    return next((sources[path[:n]] for n in range(len(path), 0, -1) if path[:n] in sources), "")


def _locate(text: str, sources: dict[tuple[str, ...], str]) -> str:
    """Completes a config class's message, which begins with a key, with the whole key and where it is set if that is clear."""
    name = re.match(r"[\w.]*", text)[0].rstrip(".")  # type: ignore[index]
    found = [(path, where) for path, where in sources.items() if f".{'.'.join(path)}".endswith(f".{name}")]
    if not name or len(found) != 1:
        return text
    path, where = found[0]
    return f"{where}{'.'.join(path)}{text[len(name) :]}"


# ── model configs of older versions ─────────────────────────────────────────────────────────────────────────────


def _model_class(config_class: type, tree: dict[str, Any], key: str) -> type[ModelConfig] | None:
    """Finds the class that a key's ``type`` chooses; None for a key that holds no model, or one that the check refuses."""
    kind, value = typing.get_type_hints(config_class).get(key), tree.get(key)
    if not (isinstance(kind, type) and issubclass(kind, ModelConfig) and isinstance(value, dict)):
        return None
    return kind.get_known_choices().get(str(value.get("type")))


def _twin(config_class: type, tree: dict[str, Any], path: tuple[str, ...]) -> tuple[str, str] | None:
    """Finds the key of another version that means the same as the one at ``path``; None if there is none."""
    model = _model_class(config_class, tree, path[0])
    if model is None or len(path) == 1:
        return None
    other = model.older_names | {new: old for old, new in model.older_names.items()}
    return (path[0], other[path[1]]) if path[1] in other else None


def _read_models(config_class: type, tree: dict[str, Any]) -> dict[str, Reading]:
    """Rewrites every model config to today's keys, in place; returns key of the model → its reading."""
    readings = {}
    for key in tree:
        if (model := _model_class(config_class, tree, key)) is not None:
            readings[key] = model.read(tree[key])
    tree |= {key: reading.values for key, reading in readings.items()}
    return readings


def _follow_renaming(sources: dict[tuple[str, ...], str], key: str, names: dict[str, str]) -> None:
    """Gives today's keys of a model the lines of the older keys that they were read from."""
    for old, new in names.items():
        if (key, old) in sources:
            for known in [path for path in sources if path[:2] == (key, new)]:
                del sources[known]
            for path in [path for path in sources if path[:2] == (key, old)]:
                sources[key, new, *path[2:]] = f"{sources[path]}{old} → "


# ── the whole ───────────────────────────────────────────────────────────────────────────────────────────────────


def load(config_class: type[ConfigClass], path: Path, arguments: list[str]) -> ConfigClass:
    """Reads, checks and builds the config. What the user should know of an older model config is in its ``notes``.

    Raises:
        ConfigError: with every mistake, each with file, key and what to write instead.
    """
    tree = read_file(path)
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a mapping of keys to values at the top")
    if "type" in tree:
        raise ConfigError(
            f"{path} is a model config; --config_path takes a training config, which includes a model config"
        )
    overrides, replaced = [], []
    for key, value in parse_overrides(arguments).items():
        overrides.append(apply_override(tree, key, value))
        if (twin := _twin(config_class, tree, overrides[-1])) is not None:  # the command line wins
            tree[twin[0]].pop(twin[1], None)
            replaced.append(twin)
    tree, mistakes, readings = _check(config_class, tree)
    text = ""
    if not mistakes:
        try:
            config = draccus.decode(config_class, tree)
        except (DecodingError, ParsingError, ValueError) as error:
            # draccus wraps what a config class raised; the innermost message is the one written for the user.
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            text = str(cause)
        else:
            for key, reading in readings.items():
                getattr(config, key).notes = tuple(f"{key}.{note}" for note in reading.notes)
            return config
    sources = file_sources(path)
    for twin in replaced:
        sources = {known: where for known, where in sources.items() if known[:2] != twin}
    for override in overrides:
        _add_override(sources, override)
    for key in readings:
        model = _model_class(config_class, tree, key)
        _follow_renaming(sources, key, model.older_names if model is not None else {})
    lines = [_where(mistake.path, sources) + explain(mistake, config_class, tree) for mistake in mistakes]
    raise cannot_use(path, lines or [_locate(text, sources)])


def _check(config_class: type, tree: dict[str, Any]) -> tuple[dict[str, Any], list[Mistake], dict[str, Reading]]:
    """Fills in variables, rewrites models to today's keys, and finds every mistake; returns tree, mistakes and readings."""
    unset: list[Mistake] = []
    tree = expand_variables(tree, unset)
    readings = _read_models(config_class, tree)
    mistakes = [Mistake((key, name), text) for key, reading in readings.items() for name, text in reading.mistakes]
    mistakes += check_tree(tree, config_class)
    unknown = {mistake.path for mistake in mistakes if mistake.text == UNKNOWN}
    empty = {mistake.path for mistake in unset} - unknown
    # What is wrong within a key that has to go anyway would only distract, and so would the type of what is not set.
    mistakes = [mistake for mistake in mistakes if mistake.path not in empty]
    unset = [mistake for mistake in unset if not unknown & {mistake.path[:n] for n in range(len(mistake.path) + 1)}]
    return tree, unset + mistakes, readings


def cannot_use(path: Path, mistakes: list[str]) -> ConfigError:
    """Writes one message for all mistakes in a config."""
    if len(mistakes) == 1:
        return ConfigError(f"{path} cannot be used: {mistakes[0]}")
    return ConfigError("\n  ".join([f"{path} cannot be used:", *mistakes]))
