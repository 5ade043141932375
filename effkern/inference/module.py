"""The optimized network: generated Python that calls ops on handles, in a module that can be copied and saved."""

from __future__ import annotations

import importlib
import inspect
import re
import types
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.autograd import forward_ad

from effkern.inference.report import Report
from effkern.inference.tracing import holds_tensor
from effkern.ops._registry import checked_error, has_tangent

_PLAIN = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


class Optimized(nn.Module):
    """A network for inference, made by :func:`effkern.optimize`.

    Called like the original, with the arguments it was optimized for: what has a default (without an example input) or
    holds no tensor (in the example input) always has that value. Parameters and batch norms are baked into packed
    weights, which are buffers: a state dict fits networks optimized from the same architecture, not the original. It
    can be copied, saved with ``torch.save(model)``, compiled, and called from several threads at once.
    It cannot be trained; gradients reach its inputs where wanted.
    """

    def __init__(
        self,
        source: str,
        names: Mapping[str, Any],
        modules: Mapping[str, nn.Module],
        tensors: Mapping[str, Tensor],
        title: str,
    ) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)
        self._source, self._title = source, title
        self._globals = {name: _pickled(value) for name, value in names.items()}
        self._signature: inspect.Signature | None = None
        self._plain_count = -1
        self._calls_others = True  # code that is not known, which may want gradients inside
        self._report = Report()
        self.training = False  # not eval(): a dropout that was left in training mode stays so
        self.requires_grad_(False)
        self._compile()

    @classmethod
    def of_graph(
        cls,
        graph: fx.Graph,
        modules: Mapping[str, nn.Module],
        tensors: Mapping[str, Tensor],
        signature: inspect.Signature,
        fixed: Mapping[str, Any],
        title: str,
        calls_others: bool,
    ) -> Optimized:
        """Generated from a graph whose modules and tensors have names without dots.

        ``calls_others``: whether code is called that is neither torch's nor effkern's.
        """
        code = graph.python_code("self")
        source = _read_from_dicts(code.src, set(modules), set(tensors))
        result = cls(source, code.globals, modules, tensors, title)
        result._set_call(signature, fixed)
        result._calls_others = calls_others
        return result

    @classmethod
    def around(cls, model: nn.Module) -> Optimized:
        """One that calls ``model`` as it is."""
        source = 'def forward(self, *args, **kwargs):\n    return self._modules["model"](*args, **kwargs)\n'
        return cls(source, {}, {"model": model}, {}, type(model).__name__)

    def _set_call(self, signature: inspect.Signature, fixed: Mapping[str, Any]) -> None:
        bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
        self._signature = inspect.Signature(bare)
        self._fixed = dict(fixed)
        kinds = [p.kind for p in bare if p.name not in fixed]
        names = [p.name for p in bare if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        self._varying = [name for name in names if name not in fixed]
        # Where what varies comes first, the arguments of a plain call are those of the generated function.
        leading = self._varying == names[: len(self._varying)]
        self._plain_count = len(self._varying) if leading and all(k in _PLAIN for k in kinds[: len(names)]) else -1

    def _compile(self) -> None:
        scope = {name: _unpickled(value) for name, value in self._globals.items()}
        exec(compile(self._source, f"<optimized {self._title}>", "exec"), scope)
        self._run = scope["forward"]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the original's."""
        if self._signature is not None and (kwargs or len(args) != self._plain_count):
            args, kwargs = self._arguments(self._signature.bind(*args, **kwargs)), {}
        if torch.compiler.is_compiling():
            return self._run(self, *args, **kwargs)
        if forward_ad._current_level >= 0 and has_tangent((args, kwargs)):
            raise NotImplementedError("an optimized network does not support forward-mode differentiation")
        try:
            if self._calls_others or (torch.is_grad_enabled() and _wants_gradient((args, kwargs))):
                return self._run(self, *args, **kwargs)
            # Without gradients the dispatcher need not visit autograd at every op: that is half of a call's overhead.
            with torch._C._AutoDispatchBelowAutograd():
                return self._run(self, *args, **kwargs)
        except RuntimeError as error:
            refused = checked_error(error)
            if refused is error:
                raise
            raise refused from None

    def takes(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Whether a call with these arguments is one this was optimized for."""
        if self._signature is None or (not kwargs and len(args) == self._plain_count):
            return True
        try:
            self._arguments(self._signature.bind(*args, **kwargs))
        except (TypeError, ValueError):
            return False
        return True

    def _arguments(self, call: inspect.BoundArguments) -> tuple[Any, ...]:
        """Arguments of the generated function; checks the others."""
        given = set(call.arguments)
        call.apply_defaults()
        for name, value in call.arguments.items():
            if name in self._fixed:
                expected = self._fixed[name]
                if value is not expected and (holds_tensor(value) or value != expected):
                    raise ValueError(
                        f"{name}: this network was optimized for {name} = {expected!r}, got {_brief(value)}; call "
                        "effkern.optimize with an example_input that has it"
                    )
            elif name not in self._varying and value:
                raise ValueError(f"{name}: this network was optimized for calls without it, got {_brief(value)}")
        for name in self._varying:
            if name not in given:
                raise ValueError(f"{name}: this network was optimized for calls with it, got none")
        return tuple(call.arguments[name] for name in self._varying)

    def report(self) -> Report:
        """What was replaced, removed and left, and why; prints as a table."""
        return self._report

    def train(self, mode: bool = True) -> Optimized:
        """Refused: batch norms and parameters are baked in.

        Raises:
            RuntimeError: for ``mode=True``.
        """
        if mode:
            raise RuntimeError(
                "an optimized network cannot be trained: its batch norms are folded and its weights packed; train the "
                "original and call effkern.optimize again"
            )
        return super().train(False)

    def extra_repr(self) -> str:
        """The original's name."""
        return self._title

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_run"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._compile()


def _wants_gradient(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.requires_grad
    if isinstance(value, dict):
        return any(map(_wants_gradient, value.values()))
    return isinstance(value, list | tuple) and any(map(_wants_gradient, value))


def _brief(value: Any) -> str:
    return f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else repr(value)


def _read_from_dicts(source: str, modules: set[str], tensors: set[str]) -> str:
    """Generated code that finds modules and tensors in the dicts, past ``nn.Module.__getattr__``, which is slow.

    What torch.fx writes first, that functions stay single calls when the code is traced itself, is left out: torch
    would keep the names of every copy for good.
    """

    def read(match: re.Match[str]) -> str:
        name = match[1]
        if name in modules:
            return f'_modules["{name}"]'
        return f'_buffers["{name}"]' if name in tensors else match[0]

    match = re.search(r"^def forward\(.*:\n", source, re.MULTILINE)
    assert match is not None
    body = re.sub(r"\bself\.(\w+)", read, source[match.end() :])
    head = re.sub(r"^torch\.fx\._symbolic_trace\.wrap\(.*\)\n", "", source[: match.end()], flags=re.MULTILINE)
    return f"{head}    _modules, _buffers = self._modules, self._buffers\n{body}"


def _pickled(value: Any) -> Any:
    """Modules do not pickle, their names do."""
    return ("module", value.__name__) if isinstance(value, types.ModuleType) else ("value", value)


def _unpickled(value: tuple[str, Any]) -> Any:
    kind, content = value
    return importlib.import_module(content) if kind == "module" else content


#: Names that modules and tensors of an optimized network cannot have.
RESERVED = frozenset([*dir(Optimized("def forward(self): pass", {}, {}, {}, "")), "_swapped"])
