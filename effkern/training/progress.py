"""Progress bars with an estimate of the time left, on a terminal and in a log."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from tqdm import tqdm

__all__ = ["also_on_draw", "progress", "say"]


class _Bar(tqdm):
    """A bar that tells others when it is drawn, so that an outer bar moves with it, without a thread."""

    on_draw: ClassVar[Callable[[], object] | None] = None

    def update(self, n: float | None = 1) -> bool | None:
        drawn = super().update(n)
        if drawn and _Bar.on_draw is not None:
            _Bar.on_draw()
        return drawn


@contextmanager
def also_on_draw(action: Callable[[], object]) -> Iterator[None]:
    """Call ``action`` whenever a bar made by :func:`progress` is drawn; it must not update such a bar itself."""
    before, _Bar.on_draw = _Bar.on_draw, action
    try:
        yield
    finally:
        _Bar.on_draw = before


def progress(what: Iterable[Any] | int, desc: str, *, leave: bool = False, **options: Any) -> tqdm:
    """A tqdm bar over an iterable, or over ``what`` steps that the caller counts with ``update``.

    On a terminal it redraws ten times a second; in a log it says something every half minute only.
    """
    live = sys.stderr.isatty()
    given: dict[str, Any] = {"total": what} if isinstance(what, int) else {"iterable": what}
    settings = {"desc": desc, "leave": leave, "dynamic_ncols": live, "mininterval": 0.1 if live else 30.0}
    if not live:
        settings["delay"] = 10.0  # a log need not hear of what is over in seconds
    # tqdm's monitor thread would wake up the bars during a measurement.
    tqdm.monitor_interval = 0
    return _Bar(**given, **{**settings, **options})


def say(text: str) -> None:
    """Print a line on stdout without tearing a bar that is being drawn."""
    tqdm.write(text)
    sys.stdout.flush()
