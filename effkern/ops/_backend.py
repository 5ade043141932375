"""Which kernels run on CUDA tensors: the compiled library or the Triton twins.

``"cuda"``, the default, is the compiled library, or the plain PyTorch reference where it was not built. ``"triton"``
takes the twins of ``effkern/ops/<op>/triton.py`` for the ops that have one, and the rest as before. The library is the
default because it compiles nothing at the first call, and because more has been proven of it (docs/gpu.md).

``EFFKERN_BACKEND=triton`` asks for the twins from the start, :func:`backend` for a while. Nothing of Triton is imported
before a twin is asked for, and a process that never asks calls the library's kernels without a detour.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from effkern.ops import _registry
from effkern.ops._registry import NAMESPACE, OPS, Op

BACKENDS = ("cuda", "triton")
_chosen = "cuda"
_routed: set[str] = set()  # dispatch keys
_NEEDED = "the Triton kernels were asked for (EFFKERN_BACKEND or effkern.ops.backend), but triton cannot be imported"


def _module(op: Op) -> str:
    """Where the twin of an op would be: in the folder of its reference."""
    return op.reference.__module__.rpartition(".")[0] + ".triton"


def twin(op: Op) -> Callable[..., Any] | None:
    """The Triton twin of an op, a function of the operator's arguments, or ``None``.

    Raises:
        ImportError: triton cannot be imported.
    """
    if importlib.util.find_spec(_module(op)) is None:
        return None
    _import_triton()
    return getattr(importlib.import_module(_module(op)), op.name, None)


def _import_triton() -> ModuleType:
    try:
        return importlib.import_module("triton")
    except ImportError as error:
        raise ImportError(f"{_NEEDED}: {error}") from error


def _check(name: str, where: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{where} must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run CUDA tensors with ``"cuda"`` or ``"triton"`` kernels inside of a ``with`` statement.

    The choice is the process's, as those of ``torch.backends`` are: other threads, such as the one that computes
    gradients, see it too. CPU tensors are not concerned.

    Raises:
        ValueError: for another name.
        ImportError: for ``"triton"`` where triton cannot be imported.

    >>> with backend("cuda"):
    ...     pass
    """
    global _chosen
    if _check(name, "backend: name") == "triton":
        _import_triton()
        route()
    before, _chosen = _chosen, name
    try:
        yield
    finally:
        _chosen = before


def chosen() -> str:
    """The backend in force."""
    return _chosen


def route(key: str = "CUDA") -> None:
    """Put a switch in front of the kernels of all ops that may have a twin; ``key`` is CUDA but in tests."""
    if key in _routed:
        return
    _routed.add(key)
    for op in OPS.values():
        if importlib.util.find_spec(_module(op)) is not None:
            _route(op, key)


def _route(op: Op, key: str) -> None:
    native = torch.library.get_kernel(f"{NAMESPACE}::{op.name}", key)
    cached: list[Callable[..., Any] | None] = []

    def switch(keys: torch._C.DispatchKeySet, *args: Any) -> Any:
        if _chosen == "triton":
            if not cached:
                cached.append(twin(op))
            if cached[0] is not None:
                with torch.accelerator.device_index(_index(args)):
                    return cached[0](*args)
        return native.call_boxed(keys, *args)

    with warnings.catch_warnings():  # to override is meant
        warnings.simplefilter("ignore")
        _registry._LIBRARY.impl(op.name, switch, key, with_keyset=True, allow_override=True)


def _index(args: tuple[Any, ...]) -> int | None:
    """The GPU that the tensors are on, which a launch of Triton's does not ask for: it goes to the current one."""
    for arg in args:
        for t in arg if isinstance(arg, list | tuple) else (arg,):
            if isinstance(t, Tensor) and not t.is_cpu:
                return t.device.index
    return None


def from_environment() -> None:
    """Obey ``EFFKERN_BACKEND``; called once, when all ops are defined."""
    global _chosen
    _chosen = _check(os.environ.get("EFFKERN_BACKEND") or "cuda", "EFFKERN_BACKEND")
    if _chosen == "triton":
        route()
