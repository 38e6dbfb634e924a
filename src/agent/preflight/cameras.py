"""Checks the inputs of the model: shows which column of a data set becomes which, and what each camera looks like then."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np

from agent.data.recorded.dimension_names import labels_of
from agent.data.resizing import resize_with_pad
from agent.preflight.context import Context
from agent.preflight.report import NotChecked, Row, failed
from agent.preflight.survey import Survey

if TYPE_CHECKING:
    from PIL.Image import Image as Picture


log = logging.getLogger(__name__)

_SIDE, _LABEL, _GAP = 256, 58, 8


def check(context: Context) -> list[Row]:
    """Gives a row for each data set, and writes ``cameras.png``."""
    rows, cells = [], []
    for found in context.surveys:
        name = f"map: {found.config.repo_id}"
        if found.mismatch is not None:
            rows.append(failed(name, found.mismatch))
        if found.source is not None and found.mismatch is None:
            rows.append(Row(name, "pass", _spelled(found, context)))
            if not context.spec.images:
                continue
            try:
                cells.append(_cells(found, context))
            except RuntimeError as error:  # the survey reads only some frames, and this one was not among them
                rows.append(failed(name, error))
    if cells:
        count = sum(picture is not None for row in cells for _, picture in row)
        try:
            path = context.folder / "cameras.png"
            _sheet(cells).save(path)
            rows.append(Row("cameras", "pass", f"{count} thumbnails in {path}: look at them"))
        except (OSError, NotChecked) as error:  # the rows above are worth more than the pictures
            rows.append(
                Row("cameras", "warn", f"no thumbnails: {error}", "put right what fails above, and check again")
            )
    elif not rows:
        rows.append(Row("cameras", "warn", "no data set to take pictures from", "put right what fails under data"))
    return rows


def _spelled(found: Survey, context: Context) -> str:
    """Says which cameras, state and action of a data set the model gets."""
    assert found.source is not None and found.metadata is not None
    source, features = found.source, found.metadata.features
    slots = list(context.spec.camera_slots) or list(source.cameras)
    lines = []
    for slot in slots:
        key = source.cameras.get(slot)
        shape = " × ".join(str(side) for side in features[key]["shape"]) if key is not None else ""
        lines.append(f"{slot} ← {key} ({shape})" if key is not None else f"{slot} ← nothing: masked")
    for what, key, most in (
        ("state", found.config.state, context.spec.max_state_dim),
        ("action", found.config.action, context.spec.max_action_dim),
    ):
        names = labels_of(features[key], "dimension")
        lines.append(f"{what} ← {key}: {', '.join(names)} ({len(names)}, padded to {most})")
    return "\n".join(lines)


def _cells(found: Survey, context: Context) -> list[tuple[list[str], Picture | None]]:
    """Labels a picture of each camera of the model, taken from the middle of an episode that can be read."""
    from PIL import Image

    source = found.source
    assert source is not None
    good = found.good
    episode = int(good[len(good) // 2])
    place = int(np.flatnonzero(source.episodes == episode)[0])
    lengths = source.metadata.episodes["length"][source.episodes]
    raw = source.read(int(lengths[:place].sum() + lengths[place] // 2))
    height, width = context.spec.image_resolution
    cells: list[tuple[list[str], Picture | None]] = []
    for slot in list(context.spec.camera_slots) or list(source.cameras):
        label = [found.config.repo_id, slot, f"from {source.cameras.get(slot, 'nothing')}"]
        picture = None
        if slot in raw.images:
            label.append(f"episode {raw.episode}, frame {raw.frame}: {raw.task}")
            pixels = resize_with_pad(raw.images[slot], height, width).permute(1, 2, 0).numpy()
            picture = Image.fromarray(pixels).resize((_SIDE, round(_SIDE * height / width)), Image.Resampling.NEAREST)
        cells.append((label, picture))
    return cells


def _sheet(rows: list[list[tuple[list[str], Picture | None]]]) -> Picture:
    """Puts the labelled pictures on one sheet, a row for each data set."""
    from PIL import Image, ImageDraw, ImageFont

    tall = max((p.height for row in rows for _, p in row if p is not None), default=_SIDE)
    wide, high = _SIDE + _GAP, tall + _LABEL + _GAP
    columns = max(len(row) for row in rows)
    sheet = Image.new("RGB", (columns * wide + _GAP, len(rows) * high + _GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for y, row in enumerate(rows):
        for x, (label, picture) in enumerate(row):
            left, top = _GAP + x * wide, _GAP + y * high
            for line, text in enumerate(label):
                while text and draw.textlength(text, font) > _SIDE:
                    text = text[:-2] + "…"
                draw.text((left, top + 13 * line), text, "black", font)
            if picture is not None:
                sheet.paste(picture, (left, top + _LABEL))
            else:
                draw.rectangle((left, top + _LABEL, left + _SIDE - 1, top + _LABEL + tall - 1), "#d0d0d0")
    return sheet
