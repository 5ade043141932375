"""A process that runs tests one by one as `check.py` asks for them, on a device that a wrong kernel may take away.

After an illegal access, a failed launch or a device-side assert every later call of CUDA in the process fails too. So a
test that leaves such an error is the last one here; `check.py` starts another process for the rest.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch

#: Bytes a process may keep for its next test; the others need room too.
KEPT = 2 << 30


def synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def usable() -> bool:
    """Whether the device answers."""
    try:
        synchronize()
    except RuntimeError:
        return False
    return True


class Worker:
    """pytest's loop over the tests, driven by the other end of a connection.

    Sends the list of ids, then for each id it is given ``(outcome, text, seconds, whether it goes on)``.
    """

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.reports: list[pytest.TestReport] = []

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        result = yield
        synchronize()  # what its kernels did wrong is this test's failure, not the next one's
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.reports.append(report)

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        if session.testsfailed:
            raise session.Interrupted("not all files could be read")
        items = {item.nodeid: item for item in session.items}
        self.connection.send(list(items))
        while True:
            try:
                name = self.connection.recv()
            except EOFError:
                return True
            started = time.perf_counter()
            self.reports = []
            items[name].config.hook.pytest_runtest_protocol(item=items[name], nextitem=None)
            outcome, text = self.outcome()
            goes_on = usable() and not any(line.startswith("E ") and "CUDA error" in line for line in text.splitlines())
            self.connection.send((outcome, text, time.perf_counter() - started, goes_on))
            if not goes_on:
                os._exit(1)  # no destructors: they would call CUDA
            if torch.cuda.is_initialized() and torch.cuda.memory_reserved() > KEPT:
                torch.cuda.empty_cache()

    def outcome(self) -> tuple[str, str]:
        for report in self.reports:
            if report.failed:
                return "failed", report.longreprtext
        skips: list[Any] = [report.longrepr for report in self.reports if report.skipped]
        return ("skipped", str(skips[0][-1] if isinstance(skips[0], tuple) else skips[0])) if skips else ("passed", "")


def main(arguments: list[str]) -> int:
    """``python -m tests.gpu.worker HANDLE FILE...``: the number of a connection's file, and tests."""
    worker = Worker(Connection(int(arguments[0])))
    return int(pytest.main(["-q", "-s", "-p", "no:cacheprovider", *arguments[1:]], plugins=[worker]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
