"""How far a long step is and how long it will take: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")

log = logging.getLogger(__name__)

_FIRST_LINE_S, _NEXT_LINES_S = 5.0, 60.0


def followed(items: Iterable[T], what: str, total: int, unit: str, *, speaks: bool = True) -> Iterator[T]:
    """The same items; between them somebody is told how far ``what`` is.

    What is done within seconds gets no line.

    Args:
        total: how many items there are.
        unit: what one is called.
        speaks: False on all processes of a run but one.
    """
    if not speaks:
        yield from items
    elif sys.stderr.isatty():
        with bar(desc=what, total=total, unit=unit, leave=False) as shown:
            for item in items:
                yield item
                shown.update()
    else:
        begin = told = time.monotonic()
        patience_s = _FIRST_LINE_S
        for number, item in enumerate(items, start=1):
            yield item
            now = time.monotonic()
            if now - told >= patience_s and number < total:
                left = (now - begin) / number * (total - number)
                log.info("%s: %s %d of %d, about %s left", what, unit, number, total, clock(left))
                told, patience_s = now, _NEXT_LINES_S


def bar(**settings: Any) -> Any:
    """A bar on standard error, above which the lines of :class:`LinesAboveBars` appear."""
    from tqdm import tqdm

    return tqdm(dynamic_ncols=True, file=sys.stderr, **settings)


def clock(seconds: float) -> str:
    """3725.0 → ``1:02:05``."""
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


class LinesAboveBars(logging.StreamHandler):
    """Writes log lines so that they stand above the bars of a terminal instead of tearing them."""

    def emit(self, record: logging.LogRecord) -> None:
        """Writes one line."""
        tqdm = getattr(sys.modules.get("tqdm"), "tqdm", None)
        if tqdm is None or not getattr(tqdm, "_instances", None):
            super().emit(record)
            return
        try:
            tqdm.write(self.format(record), file=self.stream)
            self.flush()
        except Exception:  # as logging's own handlers do
            self.handleError(record)
