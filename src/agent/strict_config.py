"""Reading a config strictly: YAML with ``!include``, ``${VARIABLES}``, command-line overrides, and a check of every
key and type before draccus builds the dataclasses.

draccus alone stops at the first mistake and names neither the file nor the nearest valid key; here all mistakes go
into one message, each with the line that made it.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import typing
from copy import copy
from pathlib import Path
from typing import Any, TypeVar

import draccus
import yaml
from draccus.parsers.yaml_loader import SafeLoaderWithInclusion
from draccus.utils import DecodingError, ParsingError

from agent.config_check import UNKNOWN, Mistake, check_tree, explain
from agent.models.base import ModelConfig, Reading

ConfigClass = TypeVar("ConfigClass")


class ConfigError(ValueError):
    """A mistake of the user's in a config: what is wrong, where, and what to write instead."""


_INT, _TIMESTAMP = "tag:yaml.org,2002:int", "tag:yaml.org,2002:timestamp"


class _Loader(SafeLoaderWithInclusion):
    """draccus's loader, which notes what it included, reads JSON as JSON and refuses a key given twice.

    YAML 1.1 would read `007` as 7, `12:30` as 750 and `2026-01-31` as a date, which changes a name; here they are texts.
    """

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_INT, _TIMESTAMP)]
        for first, resolvers in SafeLoaderWithInclusion.yaml_implicit_resolvers.items()
    }

    def __init__(self, stream: Any, name: str, including: tuple[Path, ...] = ()) -> None:
        super().__init__(stream)
        self.name = name
        self.including = including

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Here and not in construct_mapping: a merge (<<) writes the merged keys into the node.
        node = super().compose_mapping_node(anchor)
        seen: dict[str, int] = {}
        for key_node, _ in node.value:
            key, line = key_node.value, key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise ConfigError(f"{self.name}:{line}: a list or mapping cannot be a key")
            if key in seen and key_node.tag != "tag:yaml.org,2002:merge":
                raise ConfigError(f"{self.name}:{line}: the key '{key}' was already given in line {seen[key]}")
            seen[key] = line
        return node


def _include(loader: _Loader, node: Any) -> Any:
    where = f"{loader.name}:{node.start_mark.line + 1}: !include"
    if not isinstance(node, yaml.ScalarNode):
        raise ConfigError(f"{where}: expected one file name")
    path = _included_path(Path(loader.name), node.value)
    if not path.is_file():
        wrong = f"{path} is a folder" if path.is_dir() else f"there is no file {path}{_similar_file(path)}"
        raise ConfigError(f"{where} {node.value}: {wrong} (includes are relative to the file that includes them)")
    if path in loader.including:
        raise ConfigError(f"{where} {node.value}: {path} includes itself")
    return read_file(path, loader.including)


def _included_path(including: Path, name: str) -> Path:
    mistakes: list[Mistake] = []
    expanded = expand_variables(name, mistakes)
    if mistakes:
        raise ConfigError(f"{including}: !include {mistakes[0].text}")
    return Path(os.path.normpath(including.parent / expanded))


def _unknown_tag(loader: _Loader, node: Any) -> Any:
    near = difflib.get_close_matches(node.tag, ["!include"])
    hint = "did you mean !include?" if near else "the only one is !include; put a text that begins so in quotes"
    raise ConfigError(f"{loader.name}:{node.start_mark.line + 1}: {node.tag} is not a tag that is known; {hint}")


_Loader.add_constructor("!include", _include)
_Loader.add_constructor(None, _unknown_tag)  # type: ignore[arg-type]  # PyYAML's way to say: any other
_Loader.add_implicit_resolver(_INT, re.compile(r"[-+]?(?:0|[1-9][0-9_]*)$"), list("-+0123456789"))


def read_file(path: Path, including: tuple[Path, ...] = ()) -> Any:
    """The contents of a YAML or JSON file with its includes."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"there is no config file {path}{_similar_file(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as a config file: {error}") from None
    try:
        if path.suffix == ".json":
            return _read_json(text, path)
        return _read_yaml(text, str(path), (*including, Path(os.path.normpath(path))))
    except (yaml.YAMLError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path} is not valid {path.suffix.lstrip('.').upper()}: {error}") from None


def _read_yaml(text: str, name: str, including: tuple[Path, ...] = ()) -> Any:
    loader = _Loader(text, name, including)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def _read_json(text: str, path: Path) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        for number, (key, _) in enumerate(pairs):
            if key in (earlier for earlier, _ in pairs[:number]):
                _read_yaml(text, str(path))  # JSON is YAML too, and this reader knows the lines
                raise ConfigError(f"{path}: the key '{key}' is given twice")
        return dict(pairs)

    return json.loads(text, object_pairs_hook=unique)


def _similar_file(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir() and folder.parent.is_dir():  # `models` for `model`
        folders = [p.name for p in folder.parent.iterdir() if p.is_dir()]
        folder = folder.with_name((difflib.get_close_matches(folder.name, folders, n=1) or [folder.name])[0])
    names = [p.name for p in folder.iterdir() if p.is_file()] if folder.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {folder / near[0]}?" if near else ""


_VARIABLE = re.compile(r"\$\{(\w+)(:-([^${}]*))?\}")
_BARE_VARIABLE = re.compile(r"\$([A-Za-z_]\w*)")


def expand_variables(tree: Any, mistakes: list[Mistake], path: tuple[str, ...] = ()) -> Any:
    """``${VAR}`` and ``${VAR:-default}`` in every text, from the environment; unset ones are added to ``mistakes``."""
    if isinstance(tree, dict):
        return {k: expand_variables(v, mistakes, (*path, str(k))) for k, v in tree.items()}
    if isinstance(tree, list):
        return [expand_variables(v, mistakes, (*path, str(i))) for i, v in enumerate(tree)]
    if not isinstance(tree, str):
        return tree

    def value(match: re.Match) -> str:
        name, default = match.group(1), match.group(3)
        found = os.environ.get(name) or default
        if found is None:
            text = (
                f"'{tree}' uses the environment variable {name}, which is not set; "
                f"`source set_path.sh`, `export {name}=…`, or write the path itself"
            )
            mistakes.append(Mistake(path, text))
        return found or ""

    rest = _VARIABLE.sub("", tree)
    if "${" in rest:
        mistakes.append(Mistake(path, f"cannot read '{tree}'; write ${{VAR}} or ${{VAR:-default}}, one not in another"))
    elif bare := _BARE_VARIABLE.search(rest):  # else a folder of this very name would be made, or looked for
        mistakes.append(Mistake(path, f"'{tree}' has a variable without braces; write ${{{bare[1]}}}"))
    return _VARIABLE.sub(value, tree)


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
            overrides[key] = _read_yaml(text, f"--{key}") if text != "" else ""
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
    """The next key of a dotted name, and the rest. A key may hold dots itself, as ``observation.state`` does."""
    for length in range(len(parts), 1, -1):
        if isinstance(node, dict) and ".".join(parts[:length]) in node:
            return ".".join(parts[:length]), parts[length:]
    return parts[0], parts[1:]


def _list_index(node: list, part: str, key: str) -> int:
    if not part.isdigit() or int(part) >= len(node):
        raise ConfigError(f"--{key}: '{part}' must be a number below {len(node)}, the length of that list")
    return int(part)


# ── saying where ────────────────────────────────────────────────────────────────────────────────────────────────


def _file_sources(file: Path, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], str]:
    """Way to a key → ``file:line: `` where it is set, through all includes and merges."""
    sources: dict[tuple[str, ...], str] = {}

    def walk(node: Any, path: tuple[str, ...]) -> None:
        if node.tag == "!include":
            sources.update(_file_sources(_included_path(file, node.value), path))
        elif isinstance(node, yaml.MappingNode):
            # What is merged in comes first: the keys written beside it win.
            for key, value in sorted(node.value, key=lambda pair: pair[0].tag != "tag:yaml.org,2002:merge"):
                if key.tag == "tag:yaml.org,2002:merge":
                    for merged in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                        walk(merged, path)
                else:
                    own = (*path, key.value)
                    for known in [known for known in sources if known[: len(own)] == own]:
                        del sources[known]  # what a merged file says below this key is replaced with it
                    sources[own] = f"{file}:{key.start_mark.line + 1}: "
                    walk(value, own)
        elif isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                sources[*path, str(index)] = f"{file}:{item.start_mark.line + 1}: "
                walk(item, (*path, str(index)))

    try:
        root = yaml.compose(file.read_text(encoding="utf-8-sig"), Loader=yaml.SafeLoader)
    except yaml.YAMLError:  # JSON that YAML cannot read, indented with tabs: then the including line has to do
        root = None
    if root is not None:
        walk(root, path)
    return sources


def _add_override(sources: dict[tuple[str, ...], str], path: tuple[str, ...]) -> None:
    for known in [p for p in sources if p[: len(path)] == path]:
        del sources[known]
    for length in range(1, len(path) + 1):
        part = path[:length]
        if not any(known[:length] == part and len(known) > length for known in sources):
            sources[part] = "command line: --"


def _where(path: tuple[str, ...], sources: dict[tuple[str, ...], str]) -> str:
    """Where a key is set, or the nearest one above it."""
    return next((sources[path[:n]] for n in range(len(path), 0, -1) if path[:n] in sources), "")


def _locate(text: str, sources: dict[tuple[str, ...], str]) -> str:
    """A message of a config class, which begins with a key, with the whole key and where it is set, if that is clear."""
    name = re.match(r"[\w.]*", text)[0].rstrip(".")  # type: ignore[index]
    found = [(path, where) for path, where in sources.items() if f".{'.'.join(path)}".endswith(f".{name}")]
    if not name or len(found) != 1:
        return text
    path, where = found[0]
    return f"{where}{'.'.join(path)}{text[len(name) :]}"


# ── model configs of older vintages ─────────────────────────────────────────────────────────────────────────────


def _model_class(config_class: type, tree: dict[str, Any], key: str) -> type[ModelConfig] | None:
    """The class that a key's ``type`` chooses; None for a key that holds no model, or one that the check refuses."""
    kind, value = typing.get_type_hints(config_class).get(key), tree.get(key)
    if not (isinstance(kind, type) and issubclass(kind, ModelConfig) and isinstance(value, dict)):
        return None
    return kind.get_known_choices().get(str(value.get("type")))


def _twin(config_class: type, tree: dict[str, Any], path: tuple[str, ...]) -> tuple[str, str] | None:
    """The way to the key of another vintage that means the same as the one at ``path``, if there is such a name."""
    model = _model_class(config_class, tree, path[0])
    if model is None or len(path) == 1:
        return None
    other = model.older_names | {new: old for old, new in model.older_names.items()}
    return (path[0], other[path[1]]) if path[1] in other else None


def _read_models(config_class: type, tree: dict[str, Any]) -> dict[str, Reading]:
    """Puts every model config under today's keys, in place; key of the model → its reading."""
    readings = {}
    for key in tree:
        if (model := _model_class(config_class, tree, key)) is not None:
            readings[key] = model.read(tree[key])
    tree |= {key: reading.values for key, reading in readings.items()}
    return readings


def _follow_renaming(sources: dict[tuple[str, ...], str], key: str, names: dict[str, str]) -> None:
    """Gives today's keys of a model the places of the older ones that they were read from."""
    for old, new in names.items():
        if (key, old) in sources:
            for known in [path for path in sources if path[:2] == (key, new)]:
                del sources[known]
            for path in [path for path in sources if path[:2] == (key, old)]:
                sources[key, new, *path[2:]] = f"{sources[path]}{old} → "


# ── the whole ───────────────────────────────────────────────────────────────────────────────────────────────────


def load(config_class: type[ConfigClass], path: Path, arguments: list[str]) -> ConfigClass:
    """The config object. What there is to say about a model config of an older vintage is in its ``notes``.

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
    sources = _file_sources(path)
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
    """The tree with variables filled in and models under today's keys; every mistake in it; the models' readings."""
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
    """The one message for all mistakes in a config."""
    if len(mistakes) == 1:
        return ConfigError(f"{path} cannot be used: {mistakes[0]}")
    return ConfigError("\n  ".join([f"{path} cannot be used:", *mistakes]))
