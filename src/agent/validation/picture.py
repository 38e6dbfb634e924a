"""One picture of a validation: action chunks as they were predicted, over those that were recorded.

Drawn with Pillow, which the data sets need anyway: a row for each chunk, a panel for each action dimension.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent.safe_files import replacing

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont, ImageFont

_ROWS, _COLUMNS = 8, 16  # more would not be legible
_WIDTH, _HEIGHT = 190, 110  # of a panel
_LEFT, _TOP, _GAP = 150, 74, 10
_SCALE = 2  # drawn larger and reduced, which smooths the lines
_INK, _FAINT, _FRAME = (32, 33, 36), (110, 113, 120), (206, 209, 214)
_RECORDED, _PREDICTED, _AVERAGE = (90, 94, 102), (208, 76, 24), (24, 98, 190)

Curve = Sequence[float | None]


def draw(path: Path, record: Mapping[str, Any]) -> None:
    """Writes the picture of a record of ``agent.validation.record`` as a PNG, whole or not at all.

    Raises:
        OSError: if it cannot be written.
    """
    from PIL import Image, ImageDraw

    chunks = record["chunks"][:_ROWS]
    averages = (record["ema"] or {}).get("chunks", [None] * len(chunks))
    columns = min(_COLUMNS, max(len(chunk["recorded"][0]) for chunk in chunks))
    size = (_LEFT + columns * (_WIDTH + _GAP), _TOP + len(chunks) * (_HEIGHT + _GAP))
    image = Image.new("RGB", (size[0] * _SCALE, size[1] * _SCALE), "white")
    canvas = ImageDraw.Draw(image)
    _heading(canvas, record, columns)
    for row, (chunk, average) in enumerate(zip(chunks, averages, strict=False)):
        top = _TOP + row * (_HEIGHT + _GAP)
        name = chunk["dataset"].rpartition("/")[2]
        lines = (name[:20], f"episode {chunk['episode']}", f"frame {chunk['frame']}")
        for line, text in enumerate(lines):
            _text(canvas, (8, top + 30 + 18 * line), text, 13, _INK if line == 0 else _FAINT)
        for column in range(min(columns, len(chunk["recorded"][0]))):
            curves = [(_column(chunk["recorded"], column, chunk["valid"]), _RECORDED)]
            curves.append((_column(chunk["predicted"], column, chunk["valid"]), _PREDICTED))
            if average is not None:
                curves.append((_column(average["predicted"], column, chunk["valid"]), _AVERAGE))
            _panel(canvas, (_LEFT + column * (_WIDTH + _GAP), top), curves)
    # The default method merges a thin line's colour with another one's.
    small = image.reduce(_SCALE).quantize(64, method=Image.Quantize.FASTOCTREE)
    with replacing(path) as temporary:
        small.save(temporary, format="PNG")


def _heading(canvas: ImageDraw, record: Mapping[str, Any], columns: int) -> None:
    error = record["action_l1"]
    title = f"update {record['step']}: mean error of an action {'not finite' if error is None else f'{error:.4g}'}"
    if columns < len(record["names"]):
        title += f"; the first {columns} of {len(record['names'])} dimensions"
    _text(canvas, (8, 6), title, 17, _INK)
    left = 8
    legend = [("recorded", _RECORDED), ("predicted", _PREDICTED)]
    for text, colour in legend + ([("predicted by the average", _AVERAGE)] if record["ema"] else []):
        _line(canvas, [(left, 40), (left + 22, 40)], colour)
        _text(canvas, (left + 28, 31), text, 13, _INK)
        left += 42 + 8 * len(text)
    for column in range(columns):
        _text(canvas, (_LEFT + column * (_WIDTH + _GAP), _TOP - 20), record["names"][column][:26], 13, _INK)


def _panel(canvas: ImageDraw, corner: tuple[int, int], curves: list[tuple[Curve, tuple[int, int, int]]]) -> None:
    left, top = corner
    box = [left * _SCALE, top * _SCALE, (left + _WIDTH) * _SCALE, (top + _HEIGHT) * _SCALE]
    canvas.rectangle(box, outline=_FRAME, width=_SCALE)
    values = [value for curve, _ in curves for value in curve if value is not None]
    if not values:
        return
    low, high = min(values), max(values)
    middle, half = (low + high) / 2, max((high - low) / 2, 1e-6 * max(abs(low), abs(high)), 1e-9)
    steps = max(len(curves[0][0]) - 1, 1)
    for curve, colour in curves:
        points = [
            (left + 8 + (_WIDTH - 16) * step / steps, top + _HEIGHT / 2 - (_HEIGHT / 2 - 14) * (value - middle) / half)
            for step, value in enumerate(curve)
            if value is not None
        ]
        _line(canvas, points, colour)
    _text(canvas, (left + 4, top), f"{high:.3g}", 10, _FAINT)
    _text(canvas, (left + 4, top + _HEIGHT - 14), f"{low:.3g}", 10, _FAINT)


def _column(rows: Sequence[Sequence[float | None]], column: int, valid: Sequence[bool]) -> Curve:
    """One dimension's values; None past the episode's end."""
    return [row[column] if real else None for row, real in zip(rows, valid, strict=True)]


def _line(canvas: ImageDraw, points: list[tuple[float, float]], colour: tuple[int, int, int]) -> None:
    scaled = [(x * _SCALE, y * _SCALE) for x, y in points]
    if len(scaled) > 1:
        canvas.line(scaled, fill=colour, width=2 * _SCALE, joint="curve")
    elif scaled:  # a chunk of one step
        (x, y), radius = scaled[0], 2 * _SCALE
        canvas.ellipse([x - radius, y - radius, x + radius, y + radius], fill=colour)


def _text(canvas: ImageDraw, place: tuple[int, int], text: str, size: int, colour: tuple[int, int, int]) -> None:
    canvas.text((place[0] * _SCALE, place[1] * _SCALE), text, fill=colour, font=_font(size * _SCALE))


@cache
def _font(size: int) -> FreeTypeFont | ImageFont:
    from PIL import ImageFont as fonts

    return fonts.load_default(size)
