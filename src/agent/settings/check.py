"""Checks a raw config tree against the config classes: every key and every type, and finds all mistakes at once."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Iterator
from typing import Any, NamedTuple

import draccus

from agent.models import other_models
from agent.settings import older_keys
from agent.spelling import literal, nearest

UNKNOWN = "unknown key"
MISSING = "missing; it has no default"


class Mistake(NamedTuple):
    """One mistake: the way to the key, and what is wrong with it."""

    path: tuple[str, ...]
    text: str

    @property
    def key(self) -> str:
        """The dotted name."""
        return ".".join(self.path)


def check_tree(value: Any, kind: Any, path: tuple[str, ...] = ()) -> list[Mistake]:
    """Finds every mistake in a raw tree against a (data)class."""
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
        return [] if value in arguments else [Mistake(path, _no_choice(value, arguments))]
    if origin is list or origin is tuple:
        return _check_sequence(value, origin, arguments, path)
    if origin is dict:
        if not isinstance(value, dict):
            return [_expected("a mapping", value, path)]
        return [mistake for k, v in value.items() for mistake in check_tree(v, arguments[1], (*path, str(k)))]
    return _check_scalar(value, kind, path)


def _check_union(value: Any, kinds: tuple, path: tuple[str, ...]) -> list[Mistake]:
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


def _check_choice(value: Any, kind: Any, path: tuple[str, ...]) -> list[Mistake]:
    choices = kind.get_known_choices()
    if not isinstance(value, dict):
        return [_expected(f"a mapping with a key 'type' ({', '.join(choices)})", value, path)]
    name = value.get("type")
    if "type" not in value:
        return [Mistake((*path, "type"), f"missing; write one of {', '.join(choices)}")]
    if not isinstance(name, str) or name not in choices:
        return [Mistake((*path, "type"), f"{_show(name)} {other_models.unknown_type(str(name), choices)}")]
    return _check_dataclass({k: v for k, v in value.items() if k != "type"}, choices[name], path)


def _check_dataclass(value: Any, kind: Any, path: tuple[str, ...]) -> list[Mistake]:
    fields = [f for f in dataclasses.fields(kind) if f.init]
    names = [f.name for f in fields]
    if not isinstance(value, dict):
        return [_expected(f"a mapping with the keys {', '.join(names)};", value, path)]
    hints = typing.get_type_hints(kind)
    mistakes = []
    for key, item in value.items():
        if key not in names:
            mistakes.append(Mistake((*path, str(key)), UNKNOWN))
        else:
            mistakes += check_tree(item, hints[key], (*path, key))
    for field in fields:
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and field.name not in value:
            mistakes.append(Mistake((*path, field.name), MISSING))
    return mistakes


def _check_sequence(value: Any, origin: Any, arguments: tuple, path: tuple[str, ...]) -> list[Mistake]:
    of_any_length = origin is list or Ellipsis in arguments
    if not isinstance(value, (list, tuple)):
        instead, given = "", value.split(",") if isinstance(value, str) else [value]
        if isinstance(value, dict):
            instead = "begin each entry with `- `"
        elif of_any_length and not _check_sequence([_number(item) for item in given], origin, arguments, path):
            instead = f"write [{', '.join(str(item).strip() for item in given)}]"
        return [_expected("a list" if of_any_length else f"a list of {len(arguments)} values", value, path, instead)]
    if not of_any_length and len(value) != len(arguments):
        return [Mistake(path, f"expected {len(arguments)} values, got {len(value)}")]
    kinds = (arguments[0],) * len(value) if of_any_length else arguments
    pairs = enumerate(zip(value, kinds, strict=True))
    return [mistake for i, (v, k) in pairs for mistake in check_tree(v, k, (*path, str(i)))]


def _number(text: Any) -> Any:
    """Reads a text as YAML would if it is a number; else gives it back without blanks around it."""
    for kind in (int, float):
        try:
            return kind(text)
        except (TypeError, ValueError):
            continue
    return text.strip() if isinstance(text, str) else text


def _check_scalar(value: Any, kind: Any, path: tuple[str, ...]) -> list[Mistake]:
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    fits = {
        bool: isinstance(value, bool),
        int: is_whole,
        # nan and inf are never meant, and nan passes every comparison with a limit unseen.
        float: not isinstance(value, bool) and _is_finite(value),
        str: isinstance(value, str) or is_whole,
    }.get(kind, True)
    if fits:
        return []
    in_quotes = " (in quotes)" if isinstance(value, (bool, float)) else ""
    names = {bool: "true or false", int: "a whole number", float: "a number", str: f"a text{in_quotes}"}
    instead = ""
    if kind is int and not isinstance(value, bool) and _is_finite(value) and float(value).is_integer():
        instead = f"write {int(float(value))}"  # 1e5, 300.0, "300"
    elif kind is bool and str(value).lower() in ("true", "false", "0", "1"):
        instead = f"write {_show(str(value).lower() in ('true', '1'))}"
    return [_expected(names[kind], value, path, instead)]


def _is_finite(value: Any) -> bool:
    # YAML 1.1 reads 1e-4 as a text, because it has no dot; users write it, and draccus converts it.
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError):
        return False


def _expected(what: str, value: Any, path: tuple[str, ...], instead: str = "") -> Mistake:
    separator = "" if what.endswith(";") else ","
    if isinstance(value, str) and value.startswith("!include"):
        instead = f"take the quotes away: {value}"
    elif isinstance(value, str) and value.endswith((".yaml", ".yml", ".json")):
        instead = f"write !include {value}"
    return Mistake(path, f"expected {what}{separator} got {_show(value)}" + (f"; {instead}" if instead else ""))


def _no_choice(value: Any, choices: tuple) -> str:
    near = nearest(str(value).lower(), map(str, choices))
    hint = f"; did you mean '{near}'?" if near else ""
    return f"{_show(value)} is not one of {', '.join(map(str, choices))}{hint}"


def _show(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return "nothing (null)" if value is None else literal(value)
    text = repr(value)
    if len(text) > 100 and isinstance(value, dict):  # an included file, for instance
        return f"a mapping with the keys {', '.join(map(str, list(value)[:4]))}, …"
    return text if len(text) <= 100 else f"{text[:80]}…"


def explain(mistake: Mistake, kind: Any, tree: Any) -> str:
    """Writes ``key: what is wrong``, with what replaces an older key, or the nearest valid key for an unknown one."""
    key, value = mistake.key, _value_at(tree, mistake.path)
    if mistake.text == UNKNOWN and (instead := older_keys.instead(key, value)) is not None:
        return f"{key}: {instead}"
    if mistake.text != UNKNOWN:
        instead = older_keys.MISSING.get(key) if mistake.text == MISSING else older_keys.instead_of_value(key, value)
        return f"{key}: {mistake.text}" + (f"; {instead}" if instead else "")
    *parents, last = mistake.path
    valid = list(_valid_keys(kind, tree))
    siblings = [key[-1] for key in valid if key[:-1] == tuple(parents)]

    def sibling(cutoff: float) -> list[list[str]]:
        found = nearest(last, siblings, cutoff)
        return [] if found is None else [[*parents, found]]

    # Nearest first: a slip of the pen here, the very key elsewhere (`num_workers` at the top), a resemblance.
    near = sibling(0.75) or [list(key) for key in valid if key[-1] == last][:2] or sibling(0.5)
    meant = "' or '".join(".".join(key) for key in near)
    return f"{key}: {UNKNOWN}; " + (f"did you mean '{meant}'?" if near else f"valid keys: {', '.join(siblings)}")


def _value_at(tree: Any, path: tuple[str, ...]) -> Any:
    for part in path:
        if isinstance(tree, dict):
            tree = tree.get(part)
        else:
            tree = tree[int(part)] if isinstance(tree, list) else None
    return tree


def _valid_keys(kind: Any, value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yields every key that a config of this class may have, for the list entries and model type that ``value`` has."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        for candidate in arguments:
            yield from _valid_keys(candidate, value, path)
    elif origin is list and isinstance(value, list):
        for index, item in enumerate(value):
            yield from _valid_keys(arguments[0], item, (*path, str(index)))
    elif origin is dict and isinstance(value, dict):
        for key, item in value.items():
            yield from _valid_keys(arguments[1], item, (*path, str(key)))
    values = value if isinstance(value, dict) else {}
    if isinstance(kind, type) and issubclass(kind, draccus.ChoiceRegistry):
        kind = kind.get_known_choices().get(str(values.get("type")))
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        for field in dataclasses.fields(kind):
            yield (*path, field.name)
            yield from _valid_keys(hints[field.name], values.get(field.name), (*path, field.name))
