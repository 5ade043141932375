"""Closes `make test-gpu-proof` with its counts."""

from __future__ import annotations

from tests.gpu.counts import COUNTS, line


def pytest_terminal_summary(terminalreporter) -> None:
    if COUNTS:
        terminalreporter.write_line(f"GPU proof: {line()}")
