"""What a forward may not touch if it is to be a fixed sequence of calls: its modules' state, random numbers, modes."""

from __future__ import annotations

import copy
import random
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

_CONTAINERS = (dict, list, set, deque)
_FX = "_tensor_constant"  # where torch.fx itself puts tensors that a forward made


def modes() -> tuple[bool, ...]:
    """Whether gradients are recorded and autocast is on: a graph of calls has no place for either."""
    return torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")


class State:
    """The state of a module and its parts at one moment, to see what a forward does to it.

    Attributes and the entries of containers among them are compared by identity, tensors by their version counter.

    Args:
        module: whose state to note.
        values: also copy the tensors that are no parameters, for :meth:`restore`. Parameters are proxies while a
            forward is traced: what it does to them is in the graph.
    """

    def __init__(self, module: nn.Module, values: bool = False) -> None:
        self._parts = [(name, part, dict(vars(part))) for name, part in module.named_modules()]
        self._entries = {
            id(value): (value, copy.copy(value))
            for _, _, held in self._parts
            for value in held.values()
            if isinstance(value, _CONTAINERS)
        }
        tensors = {id(t): t for _, _, held in self._parts for t in _tensors(held)}
        self._versions = {key: t._version for key, t in tensors.items()}
        self._copies = [(t, t.detach().clone()) for t in tensors.values() if values]
        self._drawn = _generators()

    def touched(self) -> str | None:
        """What was changed since then; None if nothing was."""
        for path, part, held in self._parts:
            now = {name: value for name, value in vars(part).items() if not name.startswith(_FX)}
            for name in dict.fromkeys([*held, *now]):
                what = f"{path}.{name}".strip(".")
                value = now.get(name)
                if name not in held or name not in now or held[name] is not value:
                    return f"its forward sets the attribute {what}"
                if isinstance(value, _CONTAINERS) and _identities(value) != _identities(self._entries[id(value)][1]):
                    return f"its forward changes what {what} holds"
            if any(self._versions.get(id(t)) != t._version for t in _tensors(now)):
                return f"its forward writes into a tensor of {path or 'the module'}"
        return None if self._drawn == _generators() else "its forward draws random numbers"

    def restore(self) -> None:
        """Bring it back."""
        for _, part, held in self._parts:
            vars(part).clear()
            vars(part).update(held)
        for container, entries in self._entries.values():
            container.clear()
            (container.extend if isinstance(container, list | deque) else container.update)(entries)
        for tensor, value in self._copies:
            if tensor._version != self._versions[id(tensor)]:
                with torch.no_grad():
                    tensor.copy_(value)


def _identities(container: Any) -> list[int]:
    return [*map(id, container), *(map(id, container.values()) if isinstance(container, dict) else ())]


def _tensors(attributes: dict[str, Any]) -> Iterator[Tensor]:
    for value in attributes.values():
        for entry in value.values() if isinstance(value, dict) else value if isinstance(value, list) else (value,):
            if isinstance(entry, Tensor) and not isinstance(entry, nn.Parameter) and not entry.is_inference():
                yield entry


def _generators() -> tuple[Any, ...]:
    return bytes(torch.get_rng_state().numpy()), random.getstate()
