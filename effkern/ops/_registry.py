"""How an op is defined: schema, fake, gradient, autocast rule and fallback kernel, in one object next to its function.

C++ registers its CPU and CUDA kernels under the same names (``csrc/<op>/``). Where a library is missing, the plain
PyTorch reference serves as the kernel, so that every op exists on every install.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from effkern import _library

NAMESPACE = "effkern"

#: Every op of the package by name, in the order of definition.
OPS: dict[str, Op] = {}

_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
_AUTOCAST = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}
_KINDS: dict[str, type[Exception]] = {"ValueError": ValueError, "TypeError": TypeError, "IndexError": IndexError}
_CHECKED = re.compile(r"(ValueError|TypeError|IndexError): (.*)", re.DOTALL)


def is_channels_last(x: Tensor) -> bool:
    """The layout rule of the package, decided by strides: NCHW where a tensor fits both layouts.

    The C++ twin is ``channels_last`` in ``csrc/common/tensor.h``.
    """
    return x.size(1) > 1 and x.size(2) * x.size(3) > 1 and x.stride(1) == 1


def empty_like_layout(x: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised ``[n, c, h, w]`` in the layout that an op gives the output for an input ``x``."""
    layout = torch.channels_last if is_channels_last(x) else torch.contiguous_format
    return torch.empty(shape, dtype=dtype or x.dtype, device=x.device, memory_format=layout)


def checked_error(error: RuntimeError) -> Exception:
    """The Python exception that a failed check of a C++ kernel stands for (see ``csrc/common/check.h``)."""
    match = _CHECKED.search(str(error))
    if match is None:
        return error
    return _KINDS[match[1]](match[2].split("\nException raised from", 1)[0])


def has_tangent(value: Any) -> bool:
    """Whether a tensor in nested arguments carries a forward-mode derivative."""
    if isinstance(value, dict):
        return any(map(has_tangent, value.values()))
    if isinstance(value, list | tuple):
        return any(map(has_tangent, value))
    return isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None


def _as_promised(result: Tensor, promise: Tensor) -> Tensor:
    """With the strides that an op's fake gave."""
    return result if result.stride() == promise.stride() else promise.copy_(result)


class Op:
    """One ``torch.ops.effkern`` operator.

    Args:
        name: operator name without the namespace.
        schema: arguments and result in torch's schema language. No default values: the public function has them.
        fake: takes the operator's arguments, raises ``ValueError`` or ``TypeError`` for shapes and dtypes that do not
            fit and returns empty outputs with exactly the strides the kernels give.
        reference: the same computation in plain PyTorch. It becomes the kernel wherever no native one is loaded.
        composed: the same as calls of other operators that reads no data: the kernel for CUDA tensors of an op that has
            none of its own there.
        setup_context, backward: gradient formula, see :func:`torch.library.register_autograd`.
        autocast: names of the arguments cast to autocast's dtype. ``None``: the op has no autocast rule.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        *,
        fake: Callable[..., Any],
        reference: Callable[..., Any],
        composed: Callable[..., Any] | None = None,
        setup_context: Callable[..., None] | None = None,
        backward: Callable[..., Any] | None = None,
        autocast: Sequence[str] | None = None,
    ) -> None:
        self.name = name
        self.schema = schema
        self.fake = fake
        self.reference = reference
        self.composed = composed
        self.backends: dict[str, str] = {}  # device -> "native", "composed" or "reference"
        qualified = f"{NAMESPACE}::{name}"
        torch.library.define(qualified, schema, tags=(torch.Tag.pt2_compliant_tag,))
        self._op = getattr(getattr(torch.ops, NAMESPACE), name).default
        self.arguments = tuple(a.name for a in self._op._schema.arguments)
        torch.library.register_fake(qualified)(fake)
        for device, key in (("cpu", "CPU"), ("cuda", "CUDA")):
            fallback = "composed" if device == "cuda" and composed is not None else "reference"
            self.backends[device] = "native" if _library.has_kernel(name, key) else fallback
            if self.backends[device] != "native":
                kernel = self._composed if fallback == "composed" else self._fallback
                torch.library.register_kernel(qualified, device)(kernel)
        if backward is not None:
            torch.library.register_autograd(qualified, backward, setup_context=setup_context)
        self.autocast = tuple(autocast or ())
        if autocast is not None:
            self._cast = frozenset(self.arguments.index(a) for a in autocast)
            for device in ("cpu", "cuda"):
                self._register_autocast(qualified, device)
        OPS[name] = self

    def __call__(self, *args: Any) -> Any:
        """Call the operator; failed checks of native kernels become the Python exceptions they name."""
        if torch.compiler.is_compiling():
            return self._op(*args)
        if forward_ad._current_level >= 0 and any(map(has_tangent, args)):
            # The dispatcher would drop the tangents and call the derivative 0.
            raise NotImplementedError(f"{self.name}: forward-mode differentiation is not supported")
        try:
            if torch.is_grad_enabled():
                return self._op(*args)
            with torch._C._AutoDispatchBelowAutograd():  # the formula's Python wrapper alone takes 10 us
                return self._op(*args)
        except RuntimeError as error:
            raise checked_error(error) from None

    def _fallback(self, *args: Any) -> Any:
        outputs = self.fake(*args)  # checks, and the strides to return
        results = self.reference(*args)
        if isinstance(outputs, Tensor):
            return outputs.copy_(results)
        return tuple(o if o is None else o.copy_(r) for o, r in zip(outputs, results, strict=True))

    def _composed(self, *args: Any) -> Any:
        assert self.composed is not None
        outputs = self.fake(*args)
        results = self.composed(*args)
        if isinstance(outputs, Tensor):
            return _as_promised(results, outputs)
        return [_as_promised(r, o) for r, o in zip(results, outputs, strict=True)]

    def _register_autocast(self, qualified: str, device: str) -> None:
        key = torch._C._parse_dispatch_key(_AUTOCAST[device])
        below = torch._C.DispatchKeySet(key)

        def cast(value: Any, dtype: torch.dtype) -> Any:
            if isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64:
                return value.to(dtype)
            if isinstance(value, list | tuple):
                return [cast(v, dtype) for v in value]
            return value

        def kernel(*args: Any) -> Any:
            dtype = torch.get_autocast_dtype(device)
            cast_args = [cast(a, dtype) if i in self._cast else a for i, a in enumerate(args)]
            with torch._C._ExcludeDispatchKeyGuard(below):
                return self._op(*cast_args)

        _LIBRARY.impl(self.name, kernel, _AUTOCAST[device])
