"""Loads the native libraries and keeps the reason where one is missing. Importing this never prints."""

from __future__ import annotations

from pathlib import Path

import torch

#: Library name -> why it is not loaded. Empty if everything is there.
missing: dict[str, str] = {}


def _load(name: str) -> None:
    path = Path(__file__).with_name(f"{name}.so")
    if not path.exists():
        missing[name] = "not built"
        return
    try:
        torch.ops.load_library(path)
    except OSError as error:
        reason = error.__cause__ or error
        missing[name] = f"built, but torch {torch.__version__} could not load it: {reason}"


for _name in ("_C", "_C_cuda"):
    _load(_name)


def loaded(name: str) -> bool:
    """Whether ``"_C"`` or ``"_C_cuda"`` is loaded."""
    return name not in missing


def has_kernel(op: str, key: str) -> bool:
    """Whether the dispatcher has a kernel of ``effkern::<op>`` for a dispatch key such as ``"CPU"``."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"effkern::{op}", key)
