"""Reading a config strictly: YAML with ``!include``, ``${VARIABLES}``, command-line overrides, and a check of every
key and type before draccus builds the dataclasses.

draccus alone stops at the first mistake and names neither the file nor the nearest valid key; the check here
collects all mistakes in one message.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import re
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

import draccus
import yaml
from draccus.parsers.yaml_loader import SafeLoaderWithInclusion
from draccus.utils import DecodingError, ParsingError

ConfigClass = TypeVar("ConfigClass")


class ConfigError(ValueError):
    """A mistake of the user's in a config: what is wrong, where, and what to write instead."""


class _Loader(SafeLoaderWithInclusion):
    """draccus's loader, which notes what it included, reads JSON as JSON and refuses a key given twice."""

    def __init__(self, stream: Any, files: list[Path], including: tuple[Path, ...]) -> None:
        super().__init__(stream)
        self.files = files
        self.including = including

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        seen: dict[str, int] = {}
        for key_node, _ in node.value:
            if key_node.start_mark is None:  # merged in from an included file; the keys written here win over it
                continue
            key, line = key_node.value, key_node.start_mark.line + 1
            if key_node.tag != "tag:yaml.org,2002:merge" and isinstance(key, str) and key in seen:
                raise ConfigError(f"{self.name}:{line}: the key '{key}' was already given in line {seen[key]}")
            seen[key] = line
        return super().construct_mapping(node, deep=deep)


def _include(loader: _Loader, node: Any) -> Any:
    path = Path(os.path.normpath(Path(loader.name).parent / node.value))
    line = node.start_mark.line + 1
    if not path.is_file():
        raise ConfigError(
            f"{loader.name}:{line}: !include {node.value}: there is no file {path} "
            "(includes are relative to the file that includes them)"
        )
    if path in loader.including:
        raise ConfigError(f"{loader.name}:{line}: !include {node.value}: {path} includes itself")
    return read_file(path, loader.files, loader.including)


_Loader.add_constructor("!include", _include)


def read_file(path: Path, files: list[Path], including: tuple[Path, ...] = ()) -> Any:
    """The contents of a YAML or JSON file with its includes; ``files`` collects the paths read."""
    files.append(path)
    try:
        with open(path, encoding="utf-8") as stream:
            if path.suffix == ".json":
                return json.load(stream)
            loader = _Loader(stream, files, (*including, path))
            try:
                return loader.get_single_data()
            finally:
                loader.dispose()
    except FileNotFoundError:
        raise ConfigError(f"there is no config file {path}{_similar_file(path)}") from None
    except (yaml.YAMLError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path} is not valid {path.suffix.lstrip('.').upper()}: {error}") from None


def _similar_file(path: Path) -> str:
    folder = path.parent
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {folder / near[0]}?" if near else ""


def expand_variables(tree: Any, mistakes: list[str], where: str = "") -> Any:
    """``${VAR}`` and ``${VAR:-default}`` in every text, from the environment; unset ones are added to ``mistakes``."""
    if isinstance(tree, dict):
        return {k: expand_variables(v, mistakes, f"{where}.{k}" if where else str(k)) for k, v in tree.items()}
    if isinstance(tree, list):
        return [expand_variables(v, mistakes, f"{where}.{i}") for i, v in enumerate(tree)]
    if not isinstance(tree, str):
        return tree

    def value(match: re.Match) -> str:
        name, default = match.group(1), match.group(3)
        found = os.environ.get(name) or default
        if found is None:
            mistakes.append(
                f"{where}: '{tree}' uses the environment variable {name}, which is not set; "
                f"`source set_path.sh`, `export {name}=…`, or write the path itself"
            )
        return found or ""

    return re.sub(r"\$\{(\w+)(:-([^}]*))?\}", value, tree)


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
        try:
            overrides[key] = yaml.safe_load(text) if text != "" else ""
        except yaml.YAMLError as error:
            raise ConfigError(f"--{key}: cannot read the value '{text}': {error}") from None
    return overrides


def apply_override(tree: dict[str, Any], key: str, value: Any) -> None:
    """Sets one dotted key in place; a number steps into a list (``data.train.datasets.0.root``)."""
    node: Any = tree
    *parents, last = key.split(".")
    for part in parents:
        if isinstance(node, list):
            node = node[_list_index(node, part, key)]
        elif isinstance(node.get(part), (dict, list)):
            node = node[part]
        else:
            node[part] = {}
            node = node[part]
    if isinstance(node, list):
        node[_list_index(node, last, key)] = value
    else:
        node[last] = value


def _list_index(node: list, part: str, key: str) -> int:
    if not part.isdigit() or int(part) >= len(node):
        raise ConfigError(f"--{key}: '{part}' must be a number below {len(node)}, the length of that list")
    return int(part)


# ── the check of keys and types ─────────────────────────────────────────────────────────────────────────────────


def check_tree(value: Any, kind: Any, path: str = "") -> list[str]:
    """Every mistake in a raw tree against a (data)class, as lines ``key: what is wrong``."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return []
    if origin in (typing.Union, types.UnionType):
        return _check_union(value, arguments, path)
    if isinstance(kind, type) and issubclass(kind, draccus.ChoiceRegistry):
        return _check_choice(value, kind, path)
    if dataclasses.is_dataclass(kind):
        return _check_dataclass(value, kind, path)
    if origin is typing.Literal:
        return [] if value in arguments else [f"{path}: '{value}' is not one of {', '.join(map(str, arguments))}"]
    if origin is list or origin is tuple:
        return _check_sequence(value, origin, arguments, path)
    if origin is dict:
        if not isinstance(value, dict):
            return [f"{path}: expected a mapping, got {_show(value)}"]
        return [line for k, v in value.items() for line in check_tree(v, arguments[1], f"{path}.{k}")]
    return _check_scalar(value, kind, path)


def _check_union(value: Any, kinds: tuple, path: str) -> list[str]:
    if value is None and type(None) in kinds:
        return []
    candidates = [k for k in kinds if k is not type(None)]
    # A mapping can only be meant for a dataclass or a dict: report that branch's mistakes, not "no type fits".
    structured = [k for k in candidates if dataclasses.is_dataclass(k) or typing.get_origin(k) in (dict, list)]
    if isinstance(value, (dict, list)) and structured:
        return check_tree(value, structured[0], path)
    attempts = [check_tree(value, k, path) for k in candidates if k not in structured] or [
        check_tree(value, k, path) for k in candidates
    ]
    return min(attempts, key=len)


def _check_choice(value: Any, kind: Any, path: str) -> list[str]:
    choices = kind.get_known_choices()
    if not isinstance(value, dict):
        return [f"{path}: expected a mapping with a key 'type' ({', '.join(choices)}), got {_show(value)}"]
    try:
        subclass = kind if dataclasses.is_dataclass(kind) and kind in choices.values() else choices[value["type"]]
    except KeyError:
        given = f"'{value['type']}' is not known" if "type" in value else "the key 'type' is missing"
        return [f"{path}.type: {given}; write one of {', '.join(choices)}"]
    return _check_dataclass({k: v for k, v in value.items() if k != "type"}, subclass, path)


def _check_dataclass(value: Any, kind: Any, path: str) -> list[str]:
    if not isinstance(value, dict):
        return [f"{path}: expected a mapping with the keys of {kind.__name__}, got {_show(value)}"]
    hints = typing.get_type_hints(kind)
    names = [f.name for f in dataclasses.fields(kind) if f.init]
    prefix = f"{path}." if path else ""
    lines = []
    for key, item in value.items():
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=1, cutoff=0.5)
            hint = f"did you mean '{prefix}{near[0]}'?" if near else f"valid keys: {', '.join(names)}"
            lines.append(f"{prefix}{key}: unknown key; {hint}")
        else:
            lines += check_tree(item, hints[key], f"{prefix}{key}")
    for field in dataclasses.fields(kind):
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if field.init and required and field.name not in value:
            lines.append(f"{prefix}{field.name}: missing; it has no default")
    return lines


def _check_sequence(value: Any, origin: Any, arguments: tuple, path: str) -> list[str]:
    if not isinstance(value, (list, tuple)):
        return [f"{path}: expected a list, got {_show(value)}"]
    if origin is tuple and Ellipsis not in arguments and len(value) != len(arguments):
        return [f"{path}: expected {len(arguments)} values, got {len(value)}"]
    kinds = arguments if origin is tuple and Ellipsis not in arguments else (arguments[0],) * len(value)
    return [line for i, (v, k) in enumerate(zip(value, kinds, strict=True)) for line in check_tree(v, k, f"{path}.{i}")]


def _check_scalar(value: Any, kind: Any, path: str) -> list[str]:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    fits = {
        bool: isinstance(value, bool),
        int: is_number and float(value).is_integer() and not isinstance(value, float),
        float: is_number or (isinstance(value, str) and _is_float(value)),
        str: isinstance(value, str) or is_number,
    }.get(kind, True)
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
    return [] if fits else [f"{path}: expected {names[kind]}, got {_show(value)}"]


def _is_float(text: str) -> bool:
    # YAML 1.1 reads 1e-4 as a text, because it has no dot; users write it, and draccus converts it.
    try:
        float(text)
    except ValueError:
        return False
    return True


def _show(value: Any) -> str:
    return "nothing (null)" if value is None else repr(value)


# ── the whole ───────────────────────────────────────────────────────────────────────────────────────────────────


def load(config_class: type[ConfigClass], path: Path, arguments: list[str]) -> tuple[ConfigClass, dict[str, Any]]:
    """The config object, and the raw tree it was made of (to tell what was set from what is a default).

    Raises:
        ConfigError: with every mistake, each with file, key and what to write instead.
    """
    files: list[Path] = []
    tree = read_file(path, files) or {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a mapping of keys to values at the top")
    overrides = parse_overrides(arguments)
    for key, value in overrides.items():
        apply_override(tree, key, value)
    mistakes: list[str] = []
    tree = expand_variables(tree, mistakes)
    mistakes += check_tree(tree, config_class)
    if mistakes:
        lines = "\n  ".join(f"{_where(line.split(':')[0], files, overrides)}{line}" for line in mistakes)
        raise ConfigError(f"{path} cannot be used:\n  {lines}")
    try:
        return draccus.decode(config_class, tree), tree
    except (DecodingError, ParsingError, ValueError) as error:
        # draccus wraps what a config class raised; the innermost message is the one written for the user.
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise ConfigError(f"{path} cannot be used: {cause}") from None


def _where(key: str, files: list[Path], overrides: dict[str, Any]) -> str:
    """``file:line: `` of the line that sets a key, as far as a search for its last part can tell."""
    if any(f"{key}.".startswith(f"{name}.") or name.startswith(f"{key}.") for name in overrides):
        return "command line: --"
    last = next((part for part in reversed(key.split(".")) if not part.isdigit()), key)
    for file in reversed(files):
        for number, text in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
            if re.match(rf"""[\s{{,-]*["']?{re.escape(last)}["']?\s*:""", text):
                return f"{file}:{number}: "
    return ""
