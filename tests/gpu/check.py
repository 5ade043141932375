"""`make gpu-check`: every op on the GPU, or a line that there is none. Neither is a failure; a wrong value is one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch


def main() -> int:
    if not torch.cuda.is_available():
        print("no GPU was found: nothing was checked")
        return 0
    print(f"checking on {torch.cuda.get_device_name()}")
    return int(pytest.main(["-q", "-rs", "-p", "no:cacheprovider", str(Path(__file__).with_name("on_device.py"))]))


if __name__ == "__main__":
    sys.exit(main())
