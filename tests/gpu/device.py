"""The device under test. `EFFKERN_CHECK_DEVICE=cpu` puts the CPU in place of the GPU, to check the tests themselves."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from effkern.testing import map_tensors

DEVICE = os.environ.get("EFFKERN_CHECK_DEVICE", "cuda")

needs_device = pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="no GPU was found")
needs_cuda = pytest.mark.skipif(DEVICE != "cuda", reason="the CPU has neither streams nor graphs")


def there(value: Any) -> Any:
    """All tensors in nested arguments on the device."""
    return map_tensors(lambda t: t.to(DEVICE), value)
