"""The graph without writes: what an in-place call did to its argument, its result does from here on.

A graph whose values never change can be reordered and fused. Where an in-place call is seen through another view of the
same memory, there is no such form, and the module is not taken apart.
"""

from __future__ import annotations

import copy
import inspect
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from effkern.inference.network import Network
from effkern.inference.tracing import CannotTrace, is_torch_layer

_OPERATORS = {
    getattr(operator, f"i{name}"): getattr(operator, name)
    for name in ("add", "sub", "mul", "truediv", "floordiv", "pow", "mod", "matmul")
} | {operator.iand: operator.and_, operator.ior: operator.or_, operator.ixor: operator.xor}
#: Methods whose result may be (a view of) their argument.
_VIEWS = frozenset({
    "T", "alpha_dropout", "as_strided", "atleast_2d", "atleast_3d", "bfloat16", "broadcast_to", "chunk",
    "contiguous", "cpu", "cuda", "data", "detach", "diagonal", "double", "dropout", "dropout1d", "dropout2d",
    "dropout3d", "dsplit", "expand", "expand_as", "feature_alpha_dropout", "flatten", "float", "getattr",
    "getitem", "half", "hsplit", "imag", "mT", "moveaxis", "movedim", "narrow", "permute", "ravel", "real",
    "reshape", "reshape_as", "select", "split", "split_with_sizes", "squeeze", "swapaxes", "swapdims", "t",
    "tensor_split", "to", "transpose", "type", "type_as", "unbind", "unflatten", "unfold", "unsqueeze", "view",
    "view_as", "vsplit",
})  # fmt: skip
_VIEW_MODULES = (nn.Identity, nn.Flatten, nn.Unflatten, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
#: In-place methods without a twin that returns the same values.
_NO_TWIN = frozenset({"requires_grad_", "detach_", "set_", "resize_", "share_memory_", "apply_", "map_"})


def functionalize(network: Network) -> None:
    """Replace every in-place call by its twin that writes nothing.

    Raises:
        CannotTrace: where that would change a result.
    """
    order = {node: i for i, node in enumerate(network.graph.nodes)}
    roots: dict[fx.Node, set[fx.Node]] = {}
    for node in network.calls():
        written = _make_pure(network, node)
        inputs = set().union(*(roots[i] for i in node.all_input_nodes)) if node.all_input_nodes else set()
        roots[node] = {node} | (inputs if written is not None or _may_alias(network, node) else set())
        if written is None:
            continue
        if any(root.op == "get_attr" for root in roots[written]):
            raise _impure(network, node, "writes into a tensor of the module")
        for other, memory in roots.items():
            seen = any(order[user] > order[node] for user in other.users)
            if other not in (written, node) and memory & roots[written] and seen:
                raise _impure(network, node, f"writes into memory that is also read through {other.name}")
        for user in list(written.users):
            if order[user] > order[node]:
                user.replace_input_with(written, node)
        node.meta["written"] = written


def restore_dtypes(network: Network) -> None:
    """An in-place call kept the dtype of what it wrote into; where types may mix, its twin is made to.

    Runs last: sums that became part of a convolution are gone by then.
    """
    for node in network.calls():
        written = node.meta.get("written")
        if written is None or node.op == "call_module" or len(node.all_input_nodes) < 2:
            continue
        after = node.next
        cast = network.insert(after, "type_as", (node, written))
        node.replace_all_uses_with(cast, delete_user_cb=lambda user, cast=cast: user is not cast)


def _make_pure(network: Network, node: fx.Node) -> fx.Node | None:
    """Turn one in-place call into its twin; returns what it wrote into, None if it was none."""
    first = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
    if "out" in node.kwargs and node.kwargs["out"] is not None:
        raise _impure(network, node, "writes to out=")
    if node.op == "call_module":
        module = network.called(node)
        if node.target in network.opaque or not is_torch_layer(module) or not getattr(module, "inplace", False):
            return None
        twin = copy.copy(module)
        twin.inplace = False
        name = f"{str(node.target).replace('.', '_')}_out_of_place"
        network.modules[name] = twin
        network.names[name] = str(node.target)
        node.target = name
        return first
    if node.op == "call_method":
        method = str(node.target)
        if not method.endswith("_") or method.endswith("__"):
            return None
        twin_name = method[:-1]
        if method in _NO_TWIN or not hasattr(Tensor, twin_name) or first is None:
            raise _impure(network, node, "has no form that writes nothing")
        node.target = twin_name
        return first
    if node.op != "call_function":
        return None
    if node.target in (operator.setitem, operator.delitem):
        raise _impure(network, node, "writes into parts of a tensor")
    if node.target in _OPERATORS:
        node.target = _OPERATORS[node.target]
        return first
    return _pure_function(network, node, first)


def _impure(network: Network, node: fx.Node, what: str) -> CannotTrace:
    stack = list(node.meta.get("nn_module_stack") or {})
    if node.op == "call_module" and stack and stack[-1] == node.target:
        stack.pop()
    return CannotTrace(f"{network.kind(node)} {what}", stack[-1] if stack else "")


def _pure_function(network: Network, node: fx.Node, first: fx.Node | None) -> fx.Node | None:
    function: Any = node.target
    name = getattr(function, "__name__", "")
    if name.endswith("_") and not name.endswith("__") and getattr(torch, name, getattr(F, name, None)) is function:
        twin = getattr(torch if hasattr(torch, name[:-1]) else F, name[:-1], None)
        if twin is None:
            raise _impure(network, node, "has no form that writes nothing")
        node.target = twin
        return first
    if getattr(function, "__module__", "") == "torch.nn.functional":
        try:
            call = inspect.signature(function).bind(*node.args, **node.kwargs)
        except (TypeError, ValueError):
            return None
        if call.arguments.get("inplace"):
            call.arguments["inplace"] = False
            node.args, node.kwargs = call.args, call.kwargs
            return first
    return None


def _may_alias(network: Network, node: fx.Node) -> bool:
    """Whether a result may share memory with an argument; unknown code may do anything."""
    if node.op == "call_method":
        return str(node.target) in _VIEWS
    if node.op == "call_module":
        module = network.module(node)
        return module is None or not is_torch_layer(module) or isinstance(module, _VIEW_MODULES)
    if node.op == "call_function":
        function: Any = node.target
        known = is_torch_function(function)
        return not known or getattr(function, "__name__", "") in _VIEWS
    return False


def is_torch_function(function: Any) -> bool:
    """A function of torch or an operator of Python: what it does is known."""
    module = getattr(function, "__module__", None) or ""
    owner = getattr(function, "__self__", None)
    return (
        module.split(".")[0] in ("torch", "_operator", "math")
        or module == "operator"
        or function is getattr
        or owner is torch._C._VariableFunctions
    )
