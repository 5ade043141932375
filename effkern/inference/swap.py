"""Optimized parts of a module whose own forward cannot be traced.

Such a module keeps its class and calls its children as ever; each child that could be traced answers with its optimized
form. The child stays what it is in every other respect (class, attributes, children, parameters), because nobody
knows what the parent's code asks of it; called with arguments its optimized form is not made for, as with a mask that
has a default, it runs its own forward.
"""

from __future__ import annotations

from typing import Any

from torch import nn


def swap(module: nn.Module, optimized: nn.Module) -> None:
    """Let ``module`` answer calls with ``optimized``, which the network's root owns."""
    module.__dict__["_optimized"] = optimized  # past nn.Module: it is nobody's child twice
    module.__class__ = _swapped(type(module))


_classes: dict[type[nn.Module], Any] = {}


def _swapped(base: type[nn.Module]) -> Any:
    if base not in _classes:
        _classes[base] = _make_class(base)
    return _classes[base]


def _make_class(base: type[nn.Module]) -> Any:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        optimized = self.__dict__["_optimized"]
        return optimized(*args, **kwargs) if optimized.takes(args, kwargs) else base.forward(self, *args, **kwargs)

    def reduce(self: nn.Module, protocol: Any) -> Any:
        getstate: Any = getattr(base, "__getstate__", None)  # every object has it from Python 3.11 on
        default = getstate is None or getstate is getattr(object, "__getstate__", None)
        return _blank, (base,), dict(self.__dict__) if default else getstate(self)

    return type(base.__name__, (base,), {"forward": forward, "__reduce_ex__": reduce, "__module__": base.__module__})


def _blank(base: type[nn.Module]) -> nn.Module:
    kind = _swapped(base)
    return kind.__new__(kind)
