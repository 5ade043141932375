"""A network as a graph of calls: torch.fx, with the modules that must not be looked into kept whole."""

from __future__ import annotations

import functools
import inspect
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils import parametrize

from effkern.inference.untouched import State, modes
from effkern.nn import PQConv2d, PQEmbedding, PQLinear, SkipBlock, SkipStage, SwitchableBatchNorm2d
from effkern.nn._packing import HoldsPack
from effkern.nn.repvgg_block import BranchBlock, ConvBN

#: Blocks and stages that run as one op with a mask: apart, they would skip nothing.
SKIPPING = (SkipBlock, SkipStage)
#: effkern's own layers: they are an op already, or fold into one.
OWN_LAYERS = (HoldsPack, PQConv2d, PQEmbedding, PQLinear, *SKIPPING, SwitchableBatchNorm2d)
_tracing = threading.Lock()  # torch.fx replaces methods of nn.Module meanwhile; two at once would undo one another
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_TORCH = str(Path(torch.__file__).parent)


class CannotTrace(Exception):
    """A module whose forward is no fixed sequence of calls without side effects; the message says why.

    Attributes:
        module: name of the module inside the traced one, empty for itself.
    """

    def __init__(self, reason: str, module: str = "") -> None:
        super().__init__(reason)
        self.module = module


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody wants to see this module being called, or gradients passing it."""
    return nn.modules.module._has_any_global_hook() or any(getattr(module, name, None) for name in _HOOKS)


def is_frozen_norm(module: nn.Module) -> bool:
    """A batch norm with buffers in place of parameters. Others of that name compute otherwise, or have no ``eps``."""
    known = type(module).__module__.startswith(("torchvision.", "detectron2."))
    return known and type(module).__name__ == "FrozenBatchNorm2d"


def kept_whole(module: nn.Module) -> str | None:
    """Why a module must be called as it is, not looked into; None if it may be."""
    if has_hooks(module):
        return "it has hooks, which would not be called any more"
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    if isinstance(module, torch.jit.ScriptModule):
        return "it is a ScriptModule"
    return None


def is_torch_layer(module: nn.Module) -> bool:
    """A layer of torch.nn itself, or one of them under a parametrization; containers are none."""
    kind = type(module).__mro__[1] if parametrize.is_parametrized(module) else type(module)
    return kind.__module__.startswith(("torch.nn", "torch.ao.nn")) and not isinstance(
        module, nn.Sequential | nn.ModuleList | nn.ModuleDict
    )


class _Proxy(fx.Proxy):
    """A proxy that user code takes for a tensor: ``isinstance(x, Tensor)`` must not lead into the wrong branch."""

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # type: ignore[override, misc]
        caller = sys._getframe(1).f_code.co_filename
        if caller.startswith(_TORCH) or caller == __file__:
            return _Proxy
        return int if _is_size(self.node) else torch.Tensor


def _is_size(node: fx.Node) -> bool:
    """Whether a value is computed from sizes alone, a number."""
    if node.target in ("size", "dim", "ndimension", "numel", "nelement", len):
        return True
    if node.target is getattr:
        return node.args[1] in ("shape", "ndim")
    known = getattr(node.target, "__module__", "") in ("_operator", "math")
    return known and bool(node.all_input_nodes) and all(map(_is_size, node.all_input_nodes))


class Tracer(fx.Tracer):
    """Records calls. A module that cannot be traced becomes one call, and the trace goes on around it.

    Args:
        fixed: arguments of the root's forward that are no inputs of the graph.
        whole: name -> reason, of modules that are known to be called as they are.

    Attributes:
        opaque: the same, with those that turned out so.
    """

    def __init__(self, fixed: Mapping[str, Any], whole: Mapping[str, str]) -> None:
        super().__init__()
        self.fixed, self.opaque = fixed, dict(whole)
        self._modes, self._refused = modes(), ""
        self._thread = threading.get_ident()

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """See the base class."""
        return _Proxy(node, self)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """Proxies for what varies, the values themselves for what is fixed."""
        args: list[Any] = [self.root]
        kwargs: dict[str, Any] = {}
        for name, parameter in list(inspect.signature(root_fn).parameters.items())[1:]:
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                continue
            value = self.fixed[name] if name in self.fixed else self.create_proxy("placeholder", name, (), {})
            if parameter.kind is parameter.KEYWORD_ONLY:
                kwargs[name] = value
            else:
                args.append(value)
        return functools.partial(root_fn, **kwargs), args

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """See the base class."""
        reason = kept_whole(m)
        if reason is not None:
            self.opaque[module_qualified_name] = reason
        if module_qualified_name in self.opaque:
            return True
        return is_torch_layer(m) or is_frozen_norm(m) or isinstance(m, (*OWN_LAYERS, BranchBlock, ConvBN))

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """See the base class; what fails becomes a call of the module.

        While a network is traced every module's call leads here, also those of other threads, which go on as they are.
        """
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        before = next(iter(reversed(self.graph.nodes)), None)
        stack = self.module_stack.copy()  # type: ignore[has-type]
        state, refused = State(m, values=True), self._refused
        try:
            result = super().call_module(m, forward, args, kwargs)
            self.check(state, refused)
            return result
        except Exception as error:
            state.restore()
            self._refused = refused
            for node in list(reversed(self.graph.nodes)):
                if node is before:
                    break
                if node.users:  # what the failed forward recorded got out of it
                    raise
                self.graph.erase_node(node)
            self.module_stack = stack
            name = self.path_of_module(m)
            self.opaque[name] = f"cannot be traced: {_first_line(error)}"
            return self.create_proxy("call_module", name, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """See the base class, and :meth:`call_module` for other threads."""
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def check(self, state: State, refused: str = "") -> None:
        """Raise unless a forward that has run was nothing but calls, whatever it caught itself."""
        if self._refused != refused:
            raise CannotTrace(self._refused)
        why = state.touched()
        if why is not None:
            raise CannotTrace(why)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """See the base class."""
        if modes() != self._modes:
            self._refused = "its forward switches autocast or the recording of gradients"
            raise CannotTrace(self._refused)
        return super().create_node(*args, **kwargs)

    def to_bool(self, obj: fx.Proxy) -> bool:
        """See the base class, which refuses: a forward that expects errors may take that for one of its own."""
        return self._refuse(super().to_bool, obj)

    def iter(self, obj: fx.Proxy) -> Any:
        """See :meth:`to_bool`."""
        return self._refuse(super().iter, obj)

    def _refuse(self, what: Callable[[fx.Proxy], Any], obj: fx.Proxy) -> Any:
        try:
            return what(obj)
        except fx.proxy.TraceError as error:
            self._refused = _first_line(error)
            raise

    def create_arg(self, a: Any) -> Any:
        """See the base class, which would make a plain dict of every kind of dict."""
        if isinstance(a, dict) and type(a) is not dict and not isinstance(a, fx.Proxy):
            items = [(key, value) for key, value in a.items()]
            return self.create_node("call_function", type(a), (self.create_arg(items),), {})
        return super().create_arg(a)


def _first_line(error: Exception) -> str:
    if isinstance(error, CannotTrace):
        return str(error)
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def trace(module: nn.Module, fixed: Mapping[str, Any], whole: Mapping[str, str]) -> tuple[fx.Graph, dict[str, str]]:
    """The calls of one forward, and the modules in it that are called as they are, with the reasons.

    Args:
        module: in eval mode.
        fixed: arguments of forward that always have this value.
        whole: name -> reason, of modules in it not to look into.

    Raises:
        CannotTrace: if the module's own forward cannot be traced.
    """
    reason = kept_whole(module)
    if reason is not None:
        raise CannotTrace(reason)
    tracer = Tracer(fixed, whole)
    state = State(module, values=True)
    try:
        with _tracing:
            graph = tracer.trace(module)
        tracer.check(state)
    except Exception as error:  # whatever forward does with a proxy that it does not expect
        state.restore()
        raise CannotTrace(f"cannot be traced: {_first_line(error)}") from None
    return graph, tracer.opaque


def fixed_arguments(module: nn.Module, example: tuple[Any, ...] | None) -> dict[str, Any]:
    """The arguments of forward that do not vary from call to call, with their values.

    With an example, whatever holds no tensor in it; without one, whatever has a default. ``*args`` and ``**kwargs`` are
    taken to be empty.
    """
    fixed: dict[str, Any] = {}
    given = list(example or ())
    for i, parameter in enumerate(inspect.signature(module.forward).parameters.values()):
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            if i < len(given):
                raise CannotTrace(f"its forward takes *{parameter.name}")
            break
        if i < len(given):
            if not holds_tensor(given[i]):
                fixed[parameter.name] = given[i]
        elif parameter.default is not parameter.empty:
            fixed[parameter.name] = parameter.default
    return fixed


def alike(one: Sequence[Any], other: Sequence[Any]) -> bool:
    """Whether two calls with these arguments have tensors in the same places, and the same values elsewhere."""
    return len(one) == len(other) and all(
        (holds_tensor(a) and holds_tensor(b)) or (not holds_tensor(a) and not holds_tensor(b) and bool(a == b))
        for a, b in zip(one, other, strict=True)
    )


def bake_blocks(model: nn.Module) -> None:
    """Parametrized weights of blocks that pack for themselves, as what they are now."""
    for block in model.modules():
        for part in block.modules() if isinstance(block, SkipBlock) else ():
            if parametrize.is_parametrized(part):
                # Not remove_parametrizations: that takes the property off the class, which a copy shares.
                baked = {name: getattr(part, name).detach() for name in part.parametrizations}  # type: ignore[union-attr]
                part.__class__ = type(part).__mro__[1]
                del part.parametrizations
                for name, value in baked.items():
                    setattr(part, name, nn.Parameter(value, requires_grad=False))


def holds_tensor(value: Any) -> bool:
    """Whether a value is a tensor or a container with one in it."""
    if isinstance(value, Mapping):
        return any(map(holds_tensor, value.values()))
    if isinstance(value, list | tuple):
        return any(map(holds_tensor, value))
    return isinstance(value, torch.Tensor)
