"""The list of networks this package can build by name."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from typing import TypeVar

from torch import nn

_Builder = TypeVar("_Builder", bound=Callable[..., nn.Module])
_builders: dict[str, Callable[..., nn.Module]] = {}


def register_model(builder: _Builder, name: str | None = None) -> _Builder:
    """Make a function that returns a network known under its own name (a decorator), or a class under ``name``."""
    name = name or builder.__name__
    if name in _builders:
        raise ValueError(f"register_model: {name!r} is registered already")
    _builders[name] = builder
    return builder


def _import_models() -> None:
    # Every public module of this folder registers its networks on import; a new file needs no line here.
    package = __name__.rpartition(".")[0]
    folder = importlib.import_module(package).__path__
    for module in pkgutil.iter_modules(folder):
        if not module.name.startswith("_"):
            importlib.import_module(f"{package}.{module.name}")


def list_models() -> list[str]:
    """Names that :func:`create_model` knows, sorted."""
    _import_models()
    return sorted(_builders)


def create_model(name: str, **options: object) -> nn.Module:
    """Build a network by name.

    Args:
        name: one of :func:`list_models`.
        options: what the network's own function accepts, for example ``num_classes=100`` or ``in_channels=1``.

    Returns:
        The network with fresh random weights, in training mode.

    Raises:
        ValueError: for an unknown name (lists the known ones) or an unknown option (lists the accepted ones).

    >>> create_model("resnet20", num_classes=100).num_blocks
    9
    """
    _import_models()
    if name not in _builders:
        raise ValueError(f"create_model: unknown name {name!r}; known: {', '.join(sorted(_builders))}")
    builder = _builders[name]
    accepted = list(inspect.signature(builder).parameters)
    for option in options:
        if option not in accepted:
            raise ValueError(f"create_model: {name} has no option {option!r}; it accepts {', '.join(accepted)}")
    return builder(**options)
