"""From fused convolutions to calls of effkern's op: layouts, handles, and what the report says about it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from effkern.inference.functional import is_torch_function
from effkern.inference.network import ConvCall, Network, conv_call, residual_of
from effkern.inference.recognize import as_activation, as_sum
from effkern.inference.report import Row
from effkern.inference.tracing import is_torch_layer
from effkern.ops._registry import is_channels_last
from effkern.ops.rep_conv import pack_conv_weight

#: Methods that look at how a tensor lies in memory.
_STRIDED = frozenset({
    "as_strided", "data_ptr", "is_contiguous", "numpy", "resize_", "set_", "storage", "storage_offset",
    "stride", "untyped_storage", "view_as",
})  # fmt: skip


class Handles:
    """Packed weights by name; equal ones are one tensor, as where a module is called twice."""

    def __init__(self) -> None:
        self._packed: dict[bytes, Tensor] = {}

    def pack(self, call: ConvCall) -> Tensor:
        """The handle of a convolution's numbers, rounded once to fp32."""
        conv = call.conv
        bias = conv.bias.float() if bool(conv.bias.any()) else None
        with torch.inference_mode(False), torch.no_grad():
            handle = pack_conv_weight(conv.weight.float(), bias, conv.groups)
        key = hashlib.blake2b(handle.numpy().data).digest()
        return self._packed.setdefault(key, handle)


def to_channels_last(x: Tensor) -> Tensor:
    """The layout convolutions are fast in; free where ``x`` is in it."""
    return x.contiguous(memory_format=torch.channels_last)


def restore(value: Any, like: Any) -> Any:
    """Give tensors the layout they would have without effkern: that of the network's input."""
    if isinstance(value, Tensor):
        if value.is_contiguous() or (value.dim() == 4 and (like is True or _has_channels_last(like))):
            return value
        return value.contiguous()
    if isinstance(value, list | tuple | dict):
        return pytree.tree_map_only(Tensor, lambda t: restore(t, like), value)
    return value


def _has_channels_last(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.dim() == 4 and is_channels_last(value)
    return any(isinstance(t, Tensor) and t.dim() == 4 and is_channels_last(t) for t in pytree.tree_leaves(value))


def lay_out(network: Network) -> None:
    """Bring the inputs of convolutions into channels_last, and whatever else looks at layouts into the original one."""
    inputs = [node for node in network.graph.nodes if node.op == "placeholder"]
    # torch convolves in channels_last if the input or the weight is.
    like: Any = True if _weights_are_channels_last(network.root) or not inputs else inputs[0]
    converted: dict[fx.Node, fx.Node] = {}
    changed: set[fx.Node] = set()  # nodes whose result may lie otherwise than in the original
    for node in network.calls():
        call = conv_call(node)
        if call is not None:
            for x in node.all_input_nodes:
                if not _is_channels_last(network, x):
                    if x not in converted:
                        converted[x] = network.insert(node, to_channels_last, (x,))
                    node.replace_input_with(x, converted[x])
            changed.add(node)
            continue
        sources = [i for i in node.all_input_nodes if i in changed]
        if not sources:
            continue
        if _looks_at_memory(network, node):
            for source in sources:
                node.replace_input_with(source, network.insert(node, restore, (source, like)))
        elif not _is_fresh_vector(network, node):
            changed.add(node)
            _allow_any_strides(network, node)


def _weights_are_channels_last(root: nn.Module) -> bool:
    return any(
        p.dim() == 4 and p.is_contiguous(memory_format=torch.channels_last) and not p.is_contiguous()
        for p in root.parameters()
    )


def _is_channels_last(network: Network, node: fx.Node) -> bool:
    """Whether a result certainly is in channels_last."""
    call = conv_call(node)
    if call is not None:
        return call.conv.in_channels > 1  # one channel fits both layouts: the output is NCHW
    if as_activation(network, node) is not None or isinstance(network.module(node), nn.MaxPool2d):
        return len(node.all_input_nodes) == 1 and _is_channels_last(network, node.all_input_nodes[0])
    terms = as_sum(node)
    return terms is not None and all(_is_channels_last(network, term) for term in terms)


def _looks_at_memory(network: Network, node: fx.Node) -> bool:
    """Whether a call may fail, or do otherwise, with the same values in another layout."""
    if node.op == "output":
        return True
    if node.op == "call_module":
        module = network.module(node)
        return module is None or not is_torch_layer(module)
    if node.op == "call_method":
        return str(node.target) in _STRIDED or (node.target == "view" and not _is_plain_view(node))
    return not is_torch_function(node.target)


def _is_plain_view(node: fx.Node) -> bool:
    """A view of other sizes, not one as another dtype."""
    return not node.kwargs and not any(isinstance(a, torch.dtype) for a in node.args)


def _allow_any_strides(network: Network, node: fx.Node) -> None:
    """Nothing is written any more, so a copy is as good as a view, and what was made contiguous for one need not be."""
    if node.op != "call_method":
        return
    if node.target == "view":
        node.target = "reshape"
    elif node.target == "contiguous" and len(node.args) == 1 and not node.kwargs:
        network.replace(node, node.all_input_nodes[0])


def _is_fresh_vector(network: Network, node: fx.Node) -> bool:
    """Whether a result is contiguous whatever the input was."""
    return isinstance(network.module(node), nn.Linear | nn.Flatten) or node.target in (F.linear, torch.flatten)


def lower(network: Network, handles: Handles) -> dict[str, Tensor]:
    """Turn every convolution into a call of the packed op; returns the handles it reads, by name."""
    tensors: dict[str, Tensor] = {}
    for node in list(network.convolutions()):
        call = conv_call(node)
        assert call is not None
        conv = call.conv
        x: Any = node.args[0]
        (top, bottom), (left, right) = conv.padding
        padding = [top, left]
        if conv.padding_mode != "zeros" or top != bottom or left != right:
            mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
            x = network.insert(node, F.pad, (x, [left, right, top, bottom], mode))
            x = network.insert(node, to_channels_last, (x,))
            padding = [0, 0]
        name = _unique(f"{_flat(call.parts[0][0]) or 'conv'}_pack", tensors)
        tensors[name] = handles.pack(call)
        with network.graph.inserting_before(node):
            handle = network.graph.create_node("get_attr", name)
        geometry = (list(conv.kernel_size), list(conv.stride), padding, list(conv.dilation), conv.groups)
        op = torch.ops.effkern.rep_conv2d_packed.default
        args = (x, handle, conv.weight.shape[0], *geometry, call.act, residual_of(node), "auto")
        lowered = network.insert(node, op, args)
        lowered.meta["lowered"] = (call, residual_of(node) is not None)
        network.replace(node, lowered)
    return tensors


def _flat(name: str) -> str:
    flat = name.replace(".", "_")
    return f"_{flat}" if flat[:1].isdigit() else flat


def _unique(name: str, taken: Iterable[str]) -> str:
    taken, candidate, i = set(taken), name, 1
    while candidate in taken:
        i += 1
        candidate = f"{name}_{i}"
    return candidate


def describe(network: Network) -> list[Row]:
    """A row for everything that is in the graph, and for what was taken out of it."""
    rows = list(network.rows)
    for node in network.graph.nodes:
        if "lowered" in node.meta:
            call, has_residual = node.meta["lowered"]
            detail = _detail(call, has_residual)
            rows += [Row("replaced", name, kind, detail) for name, kind in call.parts]
        elif node.op == "call_module":
            rows.append(Row("left", network.name(node), network.kind(node), _reason(network, node)))
        elif node in network.reasons:
            rows.append(Row("left", network.name(node), network.kind(node), network.reasons[node]))
    return rows


def _detail(call: ConvCall, has_residual: bool) -> str:
    conv = call.conv
    rows, columns = conv.kernel_size
    text = f"{call.parts[0][0] or 'conv'}: {conv.in_channels}->{conv.weight.shape[0]} {rows}x{columns}"
    if conv.stride != (1, 1):
        text += f" /{conv.stride[0]}"
    if conv.groups > 1:
        text += f" groups={conv.groups}"
    return text + (" +residual" if has_residual else "") + (f" {call.act}" if call.act != "none" else "")


def _reason(network: Network, node: fx.Node) -> str:
    reason = network.opaque.get(str(node.target)) or network.reasons.get(node)
    if reason is not None:
        return reason
    module = network.called(node)
    if isinstance(module, nn.Linear):
        return "torch's own is as fast for a single image"
    if type(module).__module__.startswith("effkern"):
        return "an effkern layer already"
    return "effkern has no op for it"
