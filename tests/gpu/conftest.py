"""Closes `make test-gpu-proof` with its counts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.gpu.counts import COUNTS, line


@pytest.fixture
def in_full() -> Iterator[None]:
    """Where torch's own kernels take fp32, it is fp32."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def pytest_terminal_summary(terminalreporter) -> None:
    if COUNTS:
        terminalreporter.write_line(f"GPU proof: {line()}")
