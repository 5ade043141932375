"""Runs tests in several processes at once, each of which may die or hang without taking the others with it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
#: Seconds for a process to import and collect.
START = 300.0
#: So many deaths of one test function with one op are enough: the rest of them is not run.
DEATHS = 3


@dataclass(frozen=True)
class Result:
    """``outcome``: passed, skipped, failed, died, hung or not run."""

    name: str
    outcome: str
    text: str = ""
    seconds: float = 0.0

    @property
    def bad(self) -> bool:
        return self.outcome not in ("passed", "skipped")

    def line(self) -> str:
        """The reason in one line: the last one of pytest's that says ``E``, else the last one."""
        lines = [line for line in self.text.splitlines() if line.strip()]
        errors = [line[1:] for line in lines if line.startswith("E ")]
        return " ".join((errors[:1] or lines[-1:] or [""])[0].split())[:240]


def op_of(name: str) -> str:
    """The op or family a test is about, from its id: ``file::test[op/sample-dtype]``, else the test's name."""
    test, _, parameters = name.rpartition("::")[2].partition("[")
    return parameters.split("/")[0] if "/" in parameters else test


def group_of(name: str) -> tuple[str, str]:
    return name.partition("[")[0], op_of(name)


class Process:
    """A worker and the connection to it."""

    def __init__(self, files: Sequence[str]) -> None:
        self.connection, theirs = multiprocessing.Pipe()
        self.log = tempfile.TemporaryFile()  # noqa: SIM115
        command = [sys.executable, "-m", "tests.gpu.worker", str(theirs.fileno()), *files]
        self.process = subprocess.Popen(
            command, cwd=CHECKOUT, stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log,
            pass_fds=[theirs.fileno()], env={"OMP_NUM_THREADS": "1"} | os.environ,
        )  # fmt: skip
        theirs.close()

    def answer(self, seconds: float) -> object:
        """What it sends next.

        Raises:
            TimeoutError: nothing came in time.
            EOFError: it is gone.
        """
        connection: Connection = self.connection
        if not connection.poll(max(seconds, 0.0)):
            raise TimeoutError
        return connection.recv()

    def end(self, patience: float = 10.0) -> str:
        """Ends it, at last by force; how it ended and the last it said."""
        if self.log.closed:
            return ""
        self.connection.close()  # a worker that waits for the next test ends here
        for last in (None, signal.SIGABRT, signal.SIGKILL):  # pytest shows at SIGABRT where a process is
            if last is not None and self.process.poll() is None:
                self.process.send_signal(last)
            try:
                self.process.wait(patience if last is None else 5.0)
                break
            except subprocess.TimeoutExpired:
                continue
        self.log.seek(max(self.log.seek(0, os.SEEK_END) - 4000, 0))
        said = self.log.read().decode(errors="replace")
        self.log.close()
        return f"{said}\nexit status {self.process.returncode}"


class Pool:
    """Args:
    files: tests, as pytest takes them.
    jobs: processes.
    test_limit: seconds for one test.
    limit: seconds for all of them.
    wanted: which ids to run.
    seen: is told every result.
    """

    def __init__(
        self, files: Sequence[str], jobs: int, test_limit: float, limit: float, wanted: Callable[[str], bool],
        seen: Callable[[Result], None],
    ) -> None:  # fmt: skip
        self.files, self.jobs, self.test_limit, self.wanted, self.seen = files, jobs, test_limit, wanted, seen
        self.deadline = time.monotonic() + limit
        self.lock = threading.Lock()
        self.waiting: list[str] | None = None
        self.results: list[Result] = []
        self.deaths: Counter[tuple[str, str]] = Counter()
        self.broken = ""

    def run(self) -> list[Result]:
        """Every test that was wanted has a result.

        Raises:
            RuntimeError: no process could start.
        """
        threads = [threading.Thread(target=self._serve) for _ in range(self.jobs)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self.waiting is None:
            raise RuntimeError(f"the tests could not be started: {self.broken}")
        for name in self.waiting:
            self._record(Result(name, "not run", self.broken or "out of time"))
        return self.results

    def _record(self, result: Result) -> None:
        with self.lock:
            self.results.append(result)
            self.deaths[group_of(result.name)] += result.outcome in ("died", "hung")
            self.seen(result)

    def _next(self) -> str | None:
        while True:
            with self.lock:
                if not self.waiting or time.monotonic() > self.deadline:
                    return None
                name = self.waiting.pop(0)
                died = self.deaths[group_of(name)]
            if died < DEATHS:
                return name
            self._record(Result(name, "not run", f"{died} of its kind died before"))

    def _serve(self) -> None:
        """One process after the other, until there are no tests left."""
        while self.waiting is None or self.waiting:
            process = Process(self.files)
            try:
                names = process.answer(min(START, self.deadline - time.monotonic()))
                assert isinstance(names, list)
            except (TimeoutError, EOFError):
                self.broken = process.end()
                return
            with self.lock:
                if self.waiting is None:
                    self.waiting = [name for name in names if self.wanted(name)]
            goes_on = True
            while goes_on and (name := self._next()) is not None:
                goes_on = self._one(process, name)
            process.end()
            if goes_on:
                return

    def _one(self, process: Process, name: str) -> bool:
        """Runs one test; whether the process can run another."""
        started = time.monotonic()
        left = self.deadline - started
        try:
            process.connection.send(name)
            answer = process.answer(min(self.test_limit, left))
            assert isinstance(answer, tuple)
            outcome, text, seconds, goes_on = answer
            self._record(Result(name, outcome if goes_on else "died", text or "the device gave up", seconds))
            return bool(goes_on)
        except TimeoutError:
            outcome = "hung" if left > self.test_limit else "not run"
        except (EOFError, OSError):
            outcome = "died"
        text = f"{process.end(0.0)} ({outcome})"
        self._record(Result(name, outcome, text, time.monotonic() - started))
        return False
