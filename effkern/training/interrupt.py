"""Ctrl-C and SIGTERM as a wish: the running step is finished and saved first."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["Interrupted", "StopRequest", "stop_on_signals"]

# torchrun passes a terminal's Ctrl-C on to workers that have had it already; that is one wish, not two.
ECHO_S = 1.0


class Interrupted(KeyboardInterrupt):
    """Training stopped because it was asked to, its state saved; ``signal`` says by what."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.signal = signum


class StopRequest:
    """Which signal has asked to stop; 0 is none."""

    def __init__(self) -> None:
        self.signal = 0
        self._at = 0.0

    def _ask(self, signum: int, frame: FrameType | None) -> None:
        if self.signal and time.monotonic() - self._at > ECHO_S:
            raise KeyboardInterrupt  # asked twice: now
        if not self.signal:
            self.signal, self._at = signum, time.monotonic()


@contextmanager
def stop_on_signals(active: bool = True) -> Iterator[StopRequest]:
    """Inside, SIGINT and SIGTERM only leave a note; a second one raises ``KeyboardInterrupt`` at once.

    Python handles signals in the main thread alone; elsewhere, and if not ``active``, they do what they did.
    """
    request = StopRequest()
    if not active or threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, request._ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
