"""Every test starts from a seed of its own name, and leaves torch as it found it."""

from __future__ import annotations

import ctypes
import zlib
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, settings

# A machine that is busy with something else must not turn a slow draw into a failure.
settings.register_profile("effkern", deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
# Random calls beyond the fixed ones, to look for new faults: pytest --hypothesis-profile=explore tests/ops/test_fuzz.py
settings.register_profile("explore", settings.get_profile("effkern"), derandomize=False, database=None)
settings.load_profile("effkern")


_destroy = dist.destroy_process_group


def _destroy_group(group: dist.ProcessGroup | None = None) -> None:
    """Leave the group's object behind: its destructor joins a thread that may want the GIL the caller holds."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(dist.group.WORLD if group is None else group))
    _destroy(group)


dist.destroy_process_group = _destroy_group


@pytest.fixture(autouse=True)
def seeded(request: pytest.FixtureRequest) -> Iterator[None]:
    """Seed all generators from the test's name, restore thread count and grad mode afterwards."""
    seed = zlib.crc32(request.node.nodeid.encode())
    torch.manual_seed(seed)
    np.random.seed(seed)
    threads, grad = torch.get_num_threads(), torch.is_grad_enabled()
    yield
    torch.set_num_threads(threads)
    torch.set_grad_enabled(grad)
