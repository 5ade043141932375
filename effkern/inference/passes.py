"""The fusions, one function each. :data:`PASSES` is their order; a new one is a function and an entry there.

Before them the graph is free of writes (:mod:`functional`), after them convolutions get their layout and their handles
(:mod:`lowering`).
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from effkern.inference.functional import is_torch_function
from effkern.inference.network import (
    ConvCall,
    Network,
    average,
    conv_call,
    convolution,
    position,
    residual_of,
    sole_user,
)
from effkern.inference.recognize import (
    NotReplaceable,
    as_activation,
    as_average,
    as_channel_pad,
    as_convolution,
    as_norm,
    as_nothing,
    as_sum,
    as_zero_pad,
    bound,
    exact,
)
from effkern.inference.report import Row
from effkern.inference.shapes import infer
from effkern.reparam.fold import Conv, ReparamError, add, identity


def drop_what_does_nothing(network: Network) -> None:
    """Identity and, in eval mode, every kind of dropout."""
    for node in network.calls():
        why = as_nothing(network, node)
        if why is not None and node.all_input_nodes:
            network.remove(node, node.all_input_nodes[0], why)


#: Parts of the names of functions that draw numbers.
_RANDOM = ("rand", "normal_", "bernoulli", "multinomial", "poisson", "dropout", "uniform", "exponential")


def fold_constants(network: Network) -> None:
    """What is computed from parameters alone, such as standardized weights, is computed now."""
    for node in network.calls():
        values = {i: network.constant(i) for i in node.all_input_nodes}
        known = node.op == "call_method" or (node.op == "call_function" and is_torch_function(node.target))
        if not known or not values or any(v is None for v in values.values()):
            continue
        if any(part in network.kind(node) for part in _RANDOM):
            continue
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda i, values=values: values[i].clone())
        function: Any = getattr(torch.Tensor, str(node.target)) if node.op == "call_method" else node.target
        value = function(*args, **kwargs)
        if isinstance(value, torch.Tensor):
            name = f"_constant_{node.name}"
            network.constants[name] = value
            with network.graph.inserting_before(node):
                constant = network.graph.create_node("get_attr", name)
            network.replace(node, constant)


def read_convolutions(network: Network) -> None:
    """Every convolution becomes numbers; those of foldable blocks are folded."""
    for node in network.calls():
        try:
            found = as_convolution(network, node)
        except NotReplaceable as why:
            network.reasons[node] = str(why)
            continue
        if found is not None:
            x, call = found
            network.replace(node, network.add_convolution(node, x, call))


def fold_pads(network: Network) -> None:
    """Zeros put around a convolution's input are its padding."""
    for node in network.convolutions():
        call, pad = conv_call(node), node.args[0]
        assert call is not None and isinstance(pad, fx.Node)
        zeros = as_zero_pad(network, pad)
        padded = any(side for axis in call.conv.padding for side in axis)
        if zeros is None or (padded and call.conv.padding_mode != "zeros"):
            continue
        (top, bottom), (left, right) = call.conv.padding
        (above, below), (before, after) = zeros
        padding = ((top + above, bottom + below), (left + before, right + after))
        node.meta["conv"] = replace(
            call,
            conv=replace(call.conv, padding=padding, padding_mode="zeros"),
            parts=[network.part(pad), *call.parts] if len(pad.users) == 1 else call.parts,
        )
        node.args = (pad.all_input_nodes[0], *node.args[1:])
        if not pad.users:
            network.erase(pad)


def drop_rank_checks(network: Network) -> None:
    """Assertions that a map is 4-d: convolutions take nothing else, and each would be one more user of its result."""
    maps = infer(network)
    known: dict[fx.Node, Any] = {}
    for node in network.calls():
        first = node.args[0] if node.args else None
        if first in maps and (node.target == "dim" or (node.target is getattr and node.args[1] == "ndim")):
            known[node] = 4
        elif node.target in (operator.eq, operator.ne, operator.gt, operator.ge, operator.lt, operator.le):
            values = [known.get(a) if isinstance(a, fx.Node) else a for a in node.args]
            if all(isinstance(v, int) for v in values) and any(isinstance(a, fx.Node) for a in node.args):
                known[node] = node.target(*values)  # type: ignore[operator]
        elif node.target is torch._assert and known.get(first) is True:  # type: ignore[arg-type]
            network.erase(node)
    for node in reversed(list(known)):
        if not node.users:
            network.erase(node)


def fold_norms(network: Network) -> None:
    """``norm(conv(x))`` is one convolution."""
    for node in network.calls():
        try:
            found = as_norm(network, node)
        except NotReplaceable as why:
            network.reasons[node] = str(why)
            continue
        if found is None:
            continue
        network.reasons.pop(node, None)
        x, norm = found
        call = conv_call(x)
        why_not = _why_not_joined(x, node)
        if call is None:
            network.reasons[node] = "no convolution or linear layer in front of it that it could be folded into"
        elif why_not is not None:
            network.reasons[node] = why_not
        elif norm.bias.shape != call.conv.bias.shape:
            network.reasons[node] = f"it has {norm.bias.shape[0]} channels, the convolution {call.conv.bias.shape[0]}"
        else:
            scale = norm.weight[:, 0, 0, 0]
            weight = call.conv.weight * scale[:, None, None, None]
            conv = replace(call.conv, weight=weight, bias=call.conv.bias * scale + norm.bias)
            _join(network, x, node, replace(call, conv=conv))


def fold_linear_norms(network: Network) -> None:
    """``norm(linear(x))`` of a 2-d x is one linear layer."""
    for node in network.calls():
        try:
            found = as_norm(network, node)
        except NotReplaceable:
            continue
        if found is None:
            continue
        x, norm = found
        layer = network.module(x)
        if (
            not isinstance(layer, nn.Linear)
            or type(layer) is not nn.Linear
            or sole_user(x) is not node
            or norm.bias.shape[0] != layer.out_features
        ):
            continue
        if not _is_2d(network, x):
            network.reasons[node] = "its input may be 3-d, with channels elsewhere; pass example_input"
            continue
        scale = norm.weight[:, 0, 0, 0]
        shift = norm.bias if layer.bias is None else norm.bias + scale * exact(layer.bias)
        folded = nn.Linear(layer.in_features, layer.out_features, device="meta")
        folded.weight = nn.Parameter((exact(layer.weight) * scale[:, None]).to(layer.weight), requires_grad=False)
        folded.bias = nn.Parameter(shift.to(layer.weight), requires_grad=False)
        name = f"{str(x.target).replace('.', '_')}_folded"
        network.modules[name] = folded.eval()
        network.names[name] = str(x.target)
        network.rows.append(Row("replaced", *network.part(node), f"{network.name(x)}: one Linear"))
        x.target = name
        network.replace(node, x)


def _is_2d(network: Network, node: fx.Node) -> bool:
    """Whether a linear layer's input has two dimensions for certain."""
    example = node.meta.get("example")
    if example is not None:
        return len(example[0]) == 2
    x: Any = node.args[0]
    while isinstance(x, fx.Node):
        module = network.module(x)
        if isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, -1):
            return True
        if x.target in (torch.flatten, "flatten"):
            limits = bound(x, lambda input, start_dim=0, end_dim=-1: None) or {}
            return (limits.get("start_dim"), limits.get("end_dim")) == (1, -1)
        linear = isinstance(module, nn.Linear) or as_activation(network, x) is not None
        if not linear or not x.all_input_nodes:
            return False
        x = x.all_input_nodes[0]
    return False


def merge_branches(network: Network) -> None:
    """Sums of linear maps of one input, as in RepVGG, are one convolution; so is ``x + conv(x)`` where sizes allow."""
    changed = True
    while changed:
        changed = False
        for node in network.calls():
            terms = as_sum(node)
            if terms is not None and _merge(network, node, terms):
                changed = True
        if changed:
            fold_norms(network)  # a norm behind the sum, as in QARepVGG


def _merge(network: Network, node: fx.Node, terms: tuple[fx.Node, fx.Node]) -> bool:
    calls = [conv_call(term) for term in terms]
    like = next((call for call in calls if call is not None), None)
    if like is None or terms[0] is terms[1]:
        return False
    source = next(term.args[0] for term, call in zip(terms, calls, strict=True) if call is not None)
    branches: list[Conv] = []
    parts: list[tuple[str, str]] = []
    for term, call in zip(terms, calls, strict=True):
        if term is source:
            branches.append(identity(like.conv.in_channels))
            continue
        if call is not None:
            x, conv, linear = term.args[0], call.conv, call.is_linear and residual_of(term) is None
            parts += call.parts
        else:
            try:
                found = as_norm(network, term)
            except NotReplaceable:
                return False
            if found is None:
                return False
            (x, conv), linear = found, True
            parts.append(network.part(term))
        if x is not source or not linear or sole_user(term) is not node:
            return False
        branches.append(conv)
    try:
        merged = add(branches)
    except ReparamError:
        return False
    assert isinstance(source, fx.Node)
    new = network.add_convolution(node, source, ConvCall(merged, "none", like.dtype, [*parts, network.part(node)]))
    network.replace(node, new)
    for term in terms:
        if term is not source:
            network.erase(term)
    return True


def fuse_residuals(network: Network) -> None:
    """``conv(x) + residual``: the sum is done in the convolution's store.

    Only where both terms are known to have one shape and dtype: a sum that broadcasts is no residual.
    """
    shapes = infer(network)
    for node in network.calls():
        terms = as_sum(node)
        if terms is None or terms[0] is terms[1]:
            continue
        order = position(network)
        # The later one: the other has to be there already. The sum is where both are.
        for term, other in sorted((terms, terms[::-1]), key=lambda pair: -order[pair[0]]):
            call = conv_call(term)
            if call is None:
                continue
            if not call.is_linear or residual_of(term) is not None:
                network.reasons[node] = "the convolution in front of it has an activation or a residual already"
                continue
            if sole_user(term) is not node:
                network.reasons[node] = "the convolution's result is also used elsewhere"
                continue
            if not _same_shape(shapes, term, other):
                network.reasons[node] = "its terms are not known to have one shape; pass example_input"
                continue
            x = term.args[0]
            assert isinstance(x, fx.Node)
            new = network.add_convolution(
                node, x, replace(call, parts=[*call.parts, network.part(node)]), residual=other
            )
            shapes[new] = shapes[term]
            network.reasons.pop(node, None)
            network.replace(node, new)
            network.erase(term)
            break


def _same_shape(shapes: dict[fx.Node, Any], term: fx.Node, other: fx.Node) -> bool:
    if other in shapes and shapes[other] == shapes[term]:
        return True
    examples = term.meta.get("example"), other.meta.get("example")
    # A map of one row or column says nothing about larger ones: the other term may be a gate.
    return examples[0] is not None and examples[0] == examples[1] and 1 not in examples[0][0][2:]


def fuse_activations(network: Network) -> None:
    """``act(conv(x) [+ residual])``: the activation is done in the convolution's store."""
    for node in network.calls():
        act = as_activation(network, node)
        if act is None or not node.all_input_nodes:
            continue
        x = node.all_input_nodes[0]
        call = conv_call(x)
        why_not = _why_not_joined(x, node)
        if call is None:
            network.reasons[node] = "no convolution in front of it"
        elif why_not is not None:
            network.reasons[node] = why_not
        else:
            network.reasons.pop(node, None)
            _join(network, x, node, replace(call, act=act), residual_of(x))


def _why_not_joined(x: fx.Node, node: fx.Node) -> str | None:
    """Why what follows a convolution cannot become part of it."""
    call = conv_call(x)
    if call is None:
        return None
    if sole_user(x) is not node:
        return "the result of the convolution in front of it is also used elsewhere"
    if not call.is_linear:
        return "an activation stands between the convolution and it"
    return None


def _join(network: Network, x: fx.Node, node: fx.Node, call: ConvCall, residual: fx.Node | None = None) -> None:
    """Put ``call`` in the place of a convolution and of what follows it."""
    source = x.args[0]
    assert isinstance(source, fx.Node) and x.target is convolution
    call = replace(call, parts=[*call.parts, network.part(node)])
    network.replace(node, network.add_convolution(x, source, call, residual))
    network.erase(x)


def join_averages(network: Network) -> None:
    """Averages of a convolution's result are steps between convolutions, with zero channels behind them or without."""
    for node in network.calls():
        found = as_average(network, node)
        if found is None:
            continue
        x, call, keeps = found
        if keeps and not any(call.kernel_size) and any(user.op == "output" for user in node.users):
            continue  # the strides of a 1x1 map that is returned are torch's
        by = network.insert(node, average, (x,))
        after = sole_user(node) if keeps else None
        zeros = as_channel_pad(after) if after is not None else None
        network.replace(node, by if keeps else network.insert(node, torch.flatten, (by, 1)))
        if after is not None and zeros is not None:
            call = replace(call, out_channels=call.out_channels + zeros, parts=[*call.parts, network.part(after)])
            network.replace(after, by)
        by.meta["conv"] = call


PASSES: tuple[Callable[[Network], None], ...] = (
    fold_constants,
    read_convolutions,
    fold_pads,
    drop_rank_checks,
    fold_norms,
    fold_linear_norms,
    merge_branches,
    fuse_residuals,
    fuse_activations,
    join_averages,
)
