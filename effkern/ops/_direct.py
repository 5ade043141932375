"""The short way from an op's Python function to its CPU kernel: 2 us instead of the dispatcher's 10.

The functions of this module take an op's arguments, all positional, and return its result, or ``None`` where the call
has to go through the dispatcher: a tensor that is not a plain CPU tensor, a gradient that is wanted, a mode of torch
that has to see the call (functorch, fake tensors, tracing, autocast, forward-mode differentiation, a profiler, any
torch function or dispatch mode), or arguments that do not fit, which the dispatcher's kernel then names. They must not
be called under ``torch.compile``, whose tracer cannot look into them.
"""

from __future__ import annotations

from typing import Any

from effkern import _library

try:
    from effkern import _host
except ImportError:  # an install without native code
    _host = None  # type: ignore[assignment]


def nothing_watches() -> bool:
    """Whether no mode of torch wants to see a call on plain CPU tensors."""
    return False


def _refuse(*args: Any) -> Any:
    return None


#: Whether any call may take the short way.
available: bool = _library.loaded("_C") and _host is not None and _host.connect()

if available:
    nothing_watches = _host.nothing_watches
    rep_conv2d, rep_conv2d_packed = _host.rep_conv2d, _host.rep_conv2d_packed
    sliced_conv2d, sliced_conv2d_packed = _host.sliced_conv2d, _host.sliced_conv2d_packed
    skip_block, skip_stage, stage = _host.skip_block, _host.skip_stage, _host.stage
    stamp, stamp_holds, state_of = _host.stamp, _host.stamp_holds, _host.state_of
else:
    rep_conv2d = rep_conv2d_packed = sliced_conv2d = sliced_conv2d_packed = _refuse
    skip_block = skip_stage = stage = stamp = stamp_holds = state_of = _refuse
