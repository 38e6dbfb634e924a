"""Reads config files, YAML and JSON with ``!include`` and ``${VARIABLES}``, and finds the line in which a key is set."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import yaml
from draccus.parsers.yaml_loader import SafeLoaderWithInclusion

from agent.settings.check import Mistake
from agent.spelling import nearest


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
    hint = (
        "did you mean !include?"
        if nearest(node.tag, ["!include"])
        else "the only one is !include; put a text that begins so in quotes"
    )
    raise ConfigError(f"{loader.name}:{node.start_mark.line + 1}: {node.tag} is not a tag that is known; {hint}")


_Loader.add_constructor("!include", _include)
_Loader.add_constructor(None, _unknown_tag)  # type: ignore[arg-type]  # PyYAML's way to say: any other
_Loader.add_implicit_resolver(_INT, re.compile(r"[-+]?(?:0|[1-9][0-9_]*)$"), list("-+0123456789"))


def read_file(path: Path, including: tuple[Path, ...] = ()) -> Any:
    """Reads a YAML or JSON file with its includes."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"there is no config file {path}{_similar_file(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as a config file: {error}") from None
    try:
        if path.suffix == ".json":
            return _read_json(text, path)
        return read_yaml(text, str(path), (*including, Path(os.path.normpath(path))))
    except (yaml.YAMLError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path} is not valid {path.suffix.lstrip('.').upper()}: {error}") from None


def read_yaml(text: str, name: str, including: tuple[Path, ...] = ()) -> Any:
    loader = _Loader(text, name, including)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def _read_json(text: str, path: Path) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        for number, (key, _) in enumerate(pairs):
            if key in (earlier for earlier, _ in pairs[:number]):
                read_yaml(text, str(path))  # JSON is YAML too, and this reader knows the lines
                raise ConfigError(f"{path}: the key '{key}' is given twice")
        return dict(pairs)

    return json.loads(text, object_pairs_hook=unique)


def _similar_file(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir() and folder.parent.is_dir():  # `models` for `model`
        folders = [p.name for p in folder.parent.iterdir() if p.is_dir()]
        folder = folder.with_name(nearest(folder.name, folders) or folder.name)
    names = [p.name for p in folder.iterdir() if p.is_file()] if folder.is_dir() else []
    near = nearest(path.name, names)
    return f"; did you mean {folder / near}?" if near else ""


_VARIABLE = re.compile(r"\$\{(\w+)(:-([^${}]*))?\}")
_BARE_VARIABLE = re.compile(r"\$([A-Za-z_]\w*)")


def expand_variables(tree: Any, mistakes: list[Mistake], path: tuple[str, ...] = ()) -> Any:
    """Replaces ``${VAR}`` and ``${VAR:-default}`` in every text; adds variables that are not set to ``mistakes``."""
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


def file_sources(file: Path, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], str]:
    """Maps the path of a key to ``file:line: `` where it is set, through all includes and merges."""
    sources: dict[tuple[str, ...], str] = {}

    def walk(node: Any, path: tuple[str, ...]) -> None:
        if node.tag == "!include":
            sources.update(file_sources(_included_path(file, node.value), path))
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
