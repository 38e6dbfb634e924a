"""Reads ``meta/info.json`` of a data set, and the JSON lines of older formats, and checks every value.

Whoever wrote a data set may have written anything. An error names the data set, the file and the key, says what stands
there, and what is to stand there instead.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_REPAIR = "copy the file again, or write what was recorded"


def read_json_object(name: str, path: Path) -> dict[str, Any]:
    """Reads the object in a JSON file.

    Args:
        name: of the data set, for errors.
        path: of the file.

    Raises:
        ValueError: if the file holds something else, or no JSON.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # UnicodeDecodeError is one
        raise ValueError(f"{name}: {path} is not valid JSON ({error}); copy it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{name}: {path} holds a {type(content).__name__}, not an object; copy it again")
    return content


def check_info(name: str, path: Path, info: Mapping[str, Any]) -> None:
    """Holds the values of a v3 ``info.json`` that are read here against what they must be.

    ``splits`` is not among them: see ``split_bounds``.

    Raises:
        ValueError: naming the first keys that are missing or hold something else.
    """
    _check_values(
        name,
        path,
        info,
        fps=_is_rate(info.get("fps")),
        total_episodes=_is_count(info.get("total_episodes")),
        features=isinstance(info.get("features"), dict),
        data_path=isinstance(info.get("data_path"), str),
        robot_type=isinstance(info.get("robot_type"), str | None),
    )
    _check_features(name, path, info, {"chunk_index": 0, "file_index": 0})


def check_v2_info(name: str, path: Path, info: Mapping[str, Any]) -> None:
    """Checks the values that the conversion from v2.0 reads, likewise."""
    _check_values(
        name,
        path,
        info,
        chunks_size=_is_count(info.get("chunks_size")),
        features=isinstance(info.get("features"), dict),
        data_path=isinstance(info.get("data_path"), str),
    )
    _check_features(name, path, info, {"episode_chunk": 0, "episode_index": 0})


def _check_values(name: str, path: Path, info: Mapping[str, Any], **fine: bool) -> None:
    if wrong := [key for key, is_fine in fine.items() if not is_fine]:
        found = ", ".join(f"{key} {info.get(key)!r:.40}" for key in wrong)
        raise ValueError(f"{name}: {path} has {found}; {_REPAIR}")


def _check_features(name: str, path: Path, info: Mapping[str, Any], numbers: Mapping[str, int]) -> None:
    for key, feature in info["features"].items():
        _check_feature(name, path, key, feature)
    _check_template(name, path, "data_path", info["data_path"], numbers)
    for key, feature in info["features"].items():
        if feature["dtype"] != "video":
            continue
        if not isinstance(info.get("video_path"), str):
            raise ValueError(f"{name}: {path} says that {key} is a video and has no video_path; copy the file again")
        _check_template(name, path, "video_path", info["video_path"], {**numbers, "video_key": key})


def splits_of(name: str, path: Path, info: Mapping[str, Any], episodes: int) -> dict[str, Any]:
    """Returns what ``info.json`` says of each split, unread; ``train`` is all episodes where it names none.

    Raises:
        ValueError: if ``splits`` is no object.
    """
    splits = info.get("splits") or {"train": f"0:{episodes}"}
    if not isinstance(splits, dict):
        raise ValueError(
            f"{name}: {path} has splits {splits!r:.60}; write {json.dumps({'train': f'0:{episodes}'})} there, or name "
            "`episodes` instead of `split`"
        )
    return splits


def split_bounds(name: str, path: Path, split: str, value: Any, episodes: int) -> tuple[int, int]:
    """Reads what ``splits_of`` says of a split: its first episode, and the one behind its last.

    Raises:
        ValueError: if that is no pair of numbers, or reaches beyond the ``episodes`` that there are.
    """
    match = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", value) if isinstance(value, str) else None
    if match is None or not int(match[1]) <= int(match[2]) <= episodes:
        said = value if isinstance(value, str) else json.dumps(value)
        raise ValueError(
            f"{name}: {path} says that split {split!r} is the episodes {said:.60}, of which there are {episodes}: correct it "
            f"there to FIRST:END, such as 0:{episodes}, or name `episodes` instead of `split`"
        )
    return int(match[1]), int(match[2])


def read_lines(name: str, path: Path, **kinds: type) -> Iterator[dict[str, Any]]:
    """Reads the objects of a file of JSON lines, as formats before v3 have them.

    Args:
        name: of the data set, for errors.
        path: of the file.
        kinds: key → type that each object must have under it.

    Raises:
        ValueError: if the file is missing, or naming the first line that is empty or something else.
    """
    if not path.is_file():
        raise ValueError(f"{name}: {path} is missing; copy it again")
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                raise ValueError(f"{name}: {empty_line(path, number)}")
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(
                    f"{name}: line {number} of {path} is not valid JSON ({error}); copy the file again"
                ) from error
            for key, kind in kinds.items():
                if not isinstance(row, dict) or not isinstance(row.get(key), kind) or isinstance(row[key], bool):
                    raise ValueError(
                        f"{name}: line {number} of {path} needs a {kind.__name__} `{key}`, it is {line.strip()[:60]}; {_REPAIR}"
                    )
            yield row


def first_empty_line(path: Path) -> str | None:
    """Says where the first empty line of a file is, over which LeRobot's converter stumbles; None without one."""
    if not path.is_file():
        return None
    with path.open(encoding="utf-8", errors="replace") as file:
        return next((empty_line(path, number) for number, line in enumerate(file, 1) if not line.strip()), None)


def empty_line(path: Path, number: int) -> str:
    """Says that a line is empty, and how to take it out."""
    return (
        f"line {number} of {path} is empty, which LeRobot's converter does not read: take empty lines out with "
        f"sed -i '/^\\s*$/d' {shlex.quote(str(path))}"
    )


def _check_feature(name: str, path: Path, key: str, feature: Any) -> None:
    known = feature if isinstance(feature, dict) else {}
    shape, dtype = known.get("shape"), known.get("dtype")
    if not isinstance(shape, list) or not all(isinstance(size, int) for size in shape) or not isinstance(dtype, str):
        raise ValueError(
            f"{name}: {path} describes {key} as {json.dumps(feature):.60}, which needs a dtype and a shape, "
            f'such as {{"dtype": "float32", "shape": [7], "names": null}}; {_REPAIR}'
        )
    if dtype in ("video", "image") and len(shape) not in (2, 3):
        raise ValueError(
            f"{name}: {path} says that the pictures of {key} have the shape {shape}, which needs height, width and channels, "
            f"such as [480, 640, 3]; {_REPAIR}"
        )
    for part in ("info", "video_info"):
        if not isinstance(known.get(part), dict | None):
            raise ValueError(
                f"{name}: {path} has features.{key}.{part} {known[part]!r:.40}, which must be an object or null; {_REPAIR}"
            )


def _check_template(name: str, path: Path, key: str, template: str, values: Mapping[str, Any]) -> None:
    try:
        template.format(**values)
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{name}: {path} has {key} {template!r}, which cannot be filled in with {', '.join(values)} "
            f"({type(error).__name__}: {error}); {_REPAIR}"
        ) from error


def _is_rate(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
