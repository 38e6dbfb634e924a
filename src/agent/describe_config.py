"""Describes every config key with type, default and meaning, read from the dataclasses.

``uv run python -m agent.describe_config > docs/configuration.md`` writes the page; ``--help`` shows the same.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import re
import textwrap
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from agent.configuration_pipeline import TrainPipelineConfig
from agent.models.base import ModelConfig
from agent.models.registry import PlaceholderConfig
from agent.spelling import literal

_INTRODUCTION = """# Configuration

Generated from the code by `uv run python -m agent.describe_config > docs/configuration.md`; do not edit.

A training run is described by one YAML file in `config/train/`. It includes a model config (`config/model/*.json`)
and the data sets. Every key can be overridden on the command line with its dotted name, and the command line wins
over the YAML, which wins over the defaults below.

* `!include FILE` takes another YAML or JSON file, relative to the including one.
* `{<<: !include ../model/X.json, chunk_size: 8}` includes a file and changes values of it; one that is a
  mapping itself is replaced whole. `--model_cfg.paligemma_variant.width 64` changes a single value at any depth.
* Other paths (`root`, `tokenizer_path`, `load_from_checkpoint`, …) are relative to the folder in which the command is
  started; the scripts in `slurms/` start it in the repository's root.
* `${VAR}` in a text is taken from the environment and must be set; `${VAR:-default}` need not be.
* `--KEY VALUE` and `--KEY=VALUE` are the same, a list is one value (`--eval_thresholds '[0.1, 0.2]'`), and an entry of a
  list has its number (`--data.train.datasets.0.root PATH`).
* An unknown key, a wrong type or a missing file is an error before anything is built.
"""


@dataclass(frozen=True)
class Entry:
    """Describes one config key."""

    name: str
    kind: str
    default: str
    text: str


@functools.cache
def field_texts(kind: type) -> dict[str, str]:
    """Maps each field name to the text literal below it in the class, base classes included."""
    texts: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body  # type: ignore[attr-defined]
        for statement, following in zip(body, body[1:], strict=False):
            if isinstance(statement, ast.AnnAssign) and isinstance(following, ast.Expr):
                if isinstance(following.value, ast.Constant) and isinstance(following.value.value, str):
                    texts[statement.target.id] = " ".join(following.value.value.split())  # type: ignore[union-attr]
    return texts


def entries(kind: Any, prefix: str = "") -> Iterator[Entry]:
    """Yields all keys of a config class, nested ones after their parent."""
    hints, texts = typing.get_type_hints(kind), field_texts(kind)
    for field in dataclasses.fields(kind):
        name, hint = f"{prefix}{field.name}", hints[field.name]
        yield Entry(name, _kind(hint), _default(field), texts.get(field.name, ""))
        inner = _inner_dataclass(hint)
        if inner is not None and not issubclass(inner, ModelConfig):
            marker = {list: ".N.", dict: ".NAME."}.get(_container(hint), ".")
            yield from entries(inner, f"{name}{marker}")


def _inner_dataclass(hint: Any) -> Any:
    """Finds the config class that a type hint holds, at whatever depth; None if it holds none."""
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return hint
    return next((inner for arg in typing.get_args(hint) if (inner := _inner_dataclass(arg)) is not None), None)


def _container(hint: Any) -> Any:
    """Says whether a list, a dict or nothing (None) holds the config class in a type hint, which may be optional."""
    origin = typing.get_origin(hint)
    if origin in (list, dict):
        return origin
    return next((_container(arg) for arg in typing.get_args(hint) if _inner_dataclass(arg) is not None), None)


def _kind(hint: Any) -> str:
    text = hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)
    text = re.sub(r"\b(?:agent|typing|types)(?:\.\w+)*\.(?=\w)", "", text)
    return re.sub(r"^Optional\[(.*)\]$", r"\1 | None", text).replace("NoneType", "None").replace("None", "null")


def _default(field: dataclasses.Field) -> str:
    if field.default is not dataclasses.MISSING:
        value = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        return "required"
    if dataclasses.is_dataclass(value):
        return ""
    return literal(value)


def _sections() -> Iterator[tuple[str, str, list[Entry]]]:
    yield "Training YAML", "`config/train/*.yaml`", list(entries(TrainPipelineConfig))
    for name, kind in ModelConfig.get_known_choices().items():
        if not issubclass(kind, PlaceholderConfig):
            yield f"Model JSON of type `{name}`", "`config/model/*.json`, and `model_cfg.*`", list(entries(kind))


def as_markdown() -> str:
    """Writes the page ``docs/configuration.md``."""
    parts = [_INTRODUCTION]
    for title, where, rows in _sections():
        parts.append(f"\n## {title}\n\n{where}\n\n| key | type | default | meaning |\n| --- | --- | --- | --- |\n")
        cells = ([f"`{e.name}`", f"`{e.kind}`", f"`{e.default}`" if e.default else "", e.text] for e in rows)
        parts += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |\n" for row in cells]
    return "".join(parts)


def as_help() -> str:
    """Writes the same for a terminal."""
    lines = []
    for title, where, rows in _sections():
        lines.append(f"{title} ({where.replace('`', '')}):")
        for entry in rows:
            lines.append(f"  --{entry.name}  [{entry.default or entry.kind}]")
            lines += textwrap.wrap(entry.text, 108, initial_indent="        ", subsequent_indent="        ")
    return "\n".join(lines)


if __name__ == "__main__":
    print(as_markdown(), end="")
