"""Reads RLDS episodes as TFDS stores them, TFRecord files of ``tf.train.Example``, without TensorFlow.

Both formats are a few lines long and have not changed since 2016: a record is its length, a checksum, its bytes and
a checksum; an example is a map from a name to a list of bytes, floats or integers. Of an episode, each name of a step
(``steps/observation/image_0``) holds the values of all its steps, one after the other.

https://www.tensorflow.org/tutorials/load_data/tfrecord, https://protobuf.dev/programming-guides/encoding
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from agent.data.recorded.info_file import read_json_object

Values = list[bytes] | np.ndarray
"""Of one name: bytes, or (values,) float32 or int64."""


@dataclass(frozen=True)
class Tree:
    """One split of a TFDS folder."""

    name: str
    folder: Path
    shards: list[Path]
    episodes: list[int]
    """Of each shard."""
    features: dict[str, str]
    """Name of a step's feature, ``observation/image_0`` → the kind that TFDS calls it: Image, Tensor, Text, Scalar …"""


def open_tree(folder: Path, split: str) -> Tree:
    """Finds the files of a split.

    Args:
        folder: that holds ``dataset_info.json``, or a parent of only one such folder.

    Raises:
        ValueError: if there is no such folder or split, a file is missing, or the files are of another format.
    """
    found = [folder] if (folder / "dataset_info.json").is_file() else sorted(folder.glob("*/dataset_info.json"))
    found = found or sorted(folder.glob("*/*/dataset_info.json"))
    if len(found) != 1:
        names = ", ".join(str(path.parent) for path in found) or "none"
        raise ValueError(
            f"--source {folder} must hold one TFDS data set (a folder with dataset_info.json), found {names}"
        )
    folder = found[0] if found[0].is_dir() else found[0].parent
    path, name = folder / "dataset_info.json", f"data set {folder}"
    info = read_json_object(name, path)
    if info.get("fileFormat", "tfrecord") != "tfrecord":
        raise ValueError(
            f"{folder} is stored as {info['fileFormat']}; only tfrecord, the format of Open X-Embodiment, is read"
        )
    try:
        splits = {part["name"]: [int(length) for length in part.get("shardLengths", [])] for part in info["splits"]}
        tree = str(info["name"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{path} needs a `name`, and `splits` with a name and shardLengths each, as TFDS writes them "
            f"({type(error).__name__}: {error}); copy it again"
        ) from error
    if split not in splits:
        raise ValueError(f"--split {split}: {folder} has {', '.join(sorted(splits))}")
    count = len(splits[split])
    shards = [folder / f"{tree}-{split}.tfrecord-{number:05d}-of-{count:05d}" for number in range(count)]
    if missing := [path.name for path in shards if not path.is_file()]:
        raise ValueError(
            f"{folder} lacks {len(missing)} of the {count} files of {split}, such as {missing[0]}: copy them"
        )
    return Tree(tree, folder, shards, splits[split], _features(folder))


def _features(folder: Path) -> dict[str, str]:
    path = folder / "features.json"
    if not path.is_file():
        raise ValueError(f"{path} is missing: it says what each feature is; copy it from where the data set came from")
    content = read_json_object(f"data set {folder}", path)
    try:
        steps = content["featuresDict"]["features"].get("steps")
        if steps is None:
            raise ValueError(f"{path} names no `steps`: this is no RLDS data set")
        kind = next(key for key in ("sequence", "dataset") if key in steps or key == "dataset")
        return dict(_flattened(steps[kind]["feature"]))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} does not describe features as TFDS writes them ({type(error).__name__}: {error}); copy it again"
        ) from error


def _flattened(feature: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    if "featuresDict" in feature:
        for name, inner in feature["featuresDict"]["features"].items():
            yield from _flattened(inner, f"{prefix}/{name}" if prefix else name)
    else:
        yield prefix, feature["pythonClassName"].rpartition(".")[2]


def read_records(path: Path) -> Iterator[bytes]:
    """Reads the records of a TFRecord file.

    Raises:
        ValueError: if the file is cut short or damaged, with the number of the record.
    """
    import google_crc32c

    def checked(content: bytes, checksum: bytes, number: int) -> bytes:
        value = google_crc32c.value(content)
        masked = ((value >> 15 | value << 17) + 0xA282EAD8) & 0xFFFFFFFF  # so that checksums of checksums differ
        if struct.pack("<I", masked) != checksum:
            raise ValueError(f"{path}: record {number} is damaged (its checksum does not hold); copy the file again")
        return content

    with path.open("rb") as file:
        number = 0
        while head := file.read(12):
            length = struct.unpack("<Q", checked(head[:8], head[8:], number))[0] if len(head) == 12 else 0
            body = file.read(length + 4)
            if len(head) < 12 or len(body) < length + 4:
                raise ValueError(f"{path} is cut short in record {number}; copy the file again")
            yield checked(body[:-4], body[-4:], number)
            number += 1


def parse_example(record: bytes) -> dict[str, Values]:
    """Reads a serialised ``tf.train.Example``: name → values."""
    values: dict[str, Values] = {}
    view = memoryview(record)
    for _, features in _fields(view):  # Example.features
        for _, entry in _fields(features):  # Features.feature, a map
            parts = dict(_fields(entry))
            name, feature = bytes(parts[1]).decode(), parts.get(2, b"")
            for kind, content in _fields(feature):
                values[name] = _values(kind, content)
    return values


def _values(kind: int, content: memoryview) -> Values:
    """Reads a BytesList, FloatList or Int64List; numbers may be packed into one field or have one each."""
    fields = list(_fields(content))
    if kind == 1:
        return [bytes(value) for _, value in fields]
    if kind == 2:
        return np.frombuffer(b"".join(bytes(value) for _, value in fields), dtype="<f4")
    numbers: list[int] = []
    for _, value in fields:
        if isinstance(value, int):
            numbers.append(value)
            continue
        at = 0
        while at < len(value):
            number, at = _varint(value, at)
            numbers.append(number)
    return np.asarray(numbers, dtype=np.uint64).astype(np.int64)


def _fields(message: memoryview | bytes) -> Iterator[tuple[int, Any]]:
    """Yields number and content of each field of a protobuf message: an integer of a varint, else its bytes."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, at = _varint(message, at)
            yield number, value
            continue
        if wire == 2:
            size, at = _varint(message, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"a record is no tf.train.Example (wire type {wire})")
        yield number, message[at : at + size]
        at += size


def _varint(message: memoryview | bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
