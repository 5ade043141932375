"""From fused convolutions to calls of effkern's op: layouts, handles, and what the report says about it."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from effkern.inference.functional import is_torch_function
from effkern.inference.module import RESERVED
from effkern.inference.network import ConvCall, MeanCall, Network, chain_call, conv_call, residual_of
from effkern.inference.recognize import as_activation, as_sum, bound
from effkern.inference.report import Row
from effkern.inference.tracing import SKIPPING, is_torch_layer
from effkern.nn import SkipBlock
from effkern.ops._pack import pack_conv_weight, with_transforms
from effkern.ops._registry import is_channels_last
from effkern.ops.rep_conv.chain import AverageStep, ConvStep, Step, write_steps

#: Why a layer is left.
OWN = "an effkern layer already"
#: Methods that look at how a tensor lies in memory.
_STRIDED = frozenset({
    "as_strided", "data_ptr", "is_contiguous", "numpy", "resize_", "set_", "storage", "storage_offset",
    "stride", "untyped_storage", "view_as",
})  # fmt: skip


class Handles:
    """Packed weights by name; equal ones are one tensor, as where a module is called twice.

    Args:
        cache_bytes: Winograd's transforms are packed too where all handles together stay below this.
    """

    def __init__(self, cache_bytes: int) -> None:
        self._packed: dict[bytes, Tensor] = {}
        self._left = cache_bytes
        self._algo = "auto"

    def expect(self, calls: Iterable[ConvCall]) -> None:
        """Decide on the form of these convolutions' handles: transforms for all of them or for none.

        Part of a network's transforms would cost the rest its place in the cache.
        """
        plain = whole = 0
        for call in calls:
            weight = call.conv.weight
            plain += 4 * weight.numel()
            whole += _with_transforms(call) or 4 * weight.numel()
        self._algo = "winograd" if self._afford(plain, whole) else "auto"

    def expect_blocks(self, blocks: Sequence[SkipBlock]) -> None:
        """The same for blocks that pack for themselves."""
        plain, whole = (sum(block.pack_bytes(transforms) for block in blocks) for transforms in (False, True))
        transforms = self._afford(plain, whole)
        for block in blocks:
            block.transforms = transforms

    def _afford(self, plain: int, whole: int) -> bool:
        fits = whole <= self._left
        self._left -= whole if fits else plain
        return fits

    def pack(self, call: ConvCall) -> Tensor:
        """The handle of a convolution's numbers, rounded once to fp32."""
        conv = call.conv
        bias = conv.bias.float() if bool(conv.bias.any()) else None
        algo = self._algo if _with_transforms(call) else "auto"
        with torch.inference_mode(False), torch.no_grad():
            handle = pack_conv_weight(conv.weight.float(), bias, conv.groups, algo)
        key = hashlib.blake2b(handle.numpy().data).digest()
        return self._packed.setdefault(key, handle)

    def name(self, handle: Tensor, wanted: str, tensors: dict[str, Tensor]) -> str:
        """The handle's name among ``tensors``, where it is put."""
        for name, tensor in tensors.items():
            if tensor is handle:
                return name
        tensors[unique(wanted, tensors)] = handle
        return next(reversed(tensors))


def _with_transforms(call: ConvCall) -> int:
    conv = call.conv
    return with_transforms(conv.weight, conv.groups, conv.stride, conv.dilation)


def to_channels_last(x: Tensor) -> Tensor:
    """The layout convolutions are fast in; free where ``x`` is in it."""
    if x.dim() != 4:
        raise ValueError(f"a convolution in an optimized network takes batches [n, c, h, w], got shape {list(x.shape)}")
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
        if chain_call(node) is not None:
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
    if chain_call(node) is not None:
        return True
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
        return module is None or not (is_torch_layer(module) or isinstance(module, SKIPPING))
    if node.op == "call_method":
        return str(node.target) in _STRIDED or (node.target == "view" and not _is_plain_view(node))
    return not is_torch_function(node.target) or getattr(node.target, "__name__", "").startswith("as_strided")


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
    module = network.module(node)
    if isinstance(module, nn.Linear) or node.target is F.linear:
        return True
    if isinstance(module, nn.Flatten):
        dims: Any = (module.start_dim, module.end_dim)
    elif node.target in (torch.flatten, "flatten"):
        limits = bound(node, lambda input, start_dim=0, end_dim=-1: None) or {}
        dims = (limits.get("start_dim"), limits.get("end_dim"))
    else:
        return False
    return dims == (1, -1)  # others may be a view: (2, -1) of a map in channels_last is


def lower(network: Network, handles: Handles) -> dict[str, Tensor]:
    """Turn convolutions into calls of the packed op, as many in one call as can be; returns the handles, by name."""
    tensors: dict[str, Tensor] = {}
    for node in list(network.convolutions()):
        _pad_before(network, node)
    handles.expect(call for node in network.convolutions() if (call := conv_call(node)) is not None)
    for chain in _chains(network):
        _lower_chain(network, chain, handles, tensors)
    return tensors


def _pad_before(network: Network, node: fx.Node) -> None:
    """What the op cannot pad is padded in front of it."""
    call = conv_call(node)
    assert call is not None
    conv, x = call.conv, node.args[0]
    (top, bottom), (left, right) = conv.padding
    if conv.padding_mode == "zeros" and top == bottom and left == right:
        return
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    padded = network.insert(node, F.pad, (x, [left, right, top, bottom], mode))
    node.args = (network.insert(node, to_channels_last, (padded,)), *node.args[1:])
    node.meta["conv"] = replace(call, conv=replace(conv, padding=((0, 0), (0, 0)), padding_mode="zeros"))


def _chains(network: Network) -> list[list[fx.Node]]:
    """Convolutions that can be one call each: nothing between them needs one of them and is needed by another."""
    chains: list[list[fx.Node]] = []
    current: set[fx.Node] = set()
    between: set[fx.Node] = set()  # needs the current chain
    for node in network.calls():
        call = chain_call(node)
        needs = any(i in between for i in node.all_input_nodes)
        if call is None:
            if needs or any(i in current for i in node.all_input_nodes):
                between.add(node)
        elif chains and not needs and call.dtype == chains[-1][0].meta["conv"].dtype:
            chains[-1].append(node)
            current.add(node)
        else:
            chains.append([node])
            current, between = {node}, set()
    return chains


def _lower_chain(network: Network, chain: list[fx.Node], handles: Handles, tensors: dict[str, Tensor]) -> None:
    """Replace convolutions by one call in the place of the last of them."""
    members, last = set(chain), chain[-1]
    inputs = list(dict.fromkeys(i for node in chain for i in node.all_input_nodes if i not in members))
    numbers: dict[Any, int] = {node: i for i, node in enumerate([*inputs, *chain])}
    packs: dict[str, int] = {}
    steps: list[Step] = []
    for node in chain:
        call = chain_call(node)
        assert call is not None
        if isinstance(call, MeanCall):
            x = numbers[node.args[0]]
            steps.append(AverageStep(x, call.out_channels, call.kernel_size, call.stride, call.ceil_mode))
            continue
        conv, residual = call.conv, residual_of(node)
        name = handles.name(handles.pack(call), f"{flat(call.parts[0][0]) or 'conv'}_pack", tensors)
        step = ConvStep(
            x=numbers[node.args[0]],
            handle=packs.setdefault(name, len(packs)),
            out_channels=int(conv.weight.shape[0]),
            kernel_size=conv.kernel_size,
            stride=conv.stride,
            padding=(conv.padding[0][0], conv.padding[1][0]),
            dilation=conv.dilation,
            groups=conv.groups,
            act=call.act,
            residual=-1 if residual is None else numbers[residual],
        )
        steps.append(step)
    early = _users_before(network, chain)
    with network.graph.inserting_before(last):
        weights = [network.graph.create_node("get_attr", name) for name in packs]
    returned = [node for node in chain if any(user not in members for user in node.users)]
    op = torch.ops.effkern.rep_conv2d_chain.default
    outputs = [chain.index(node) for node in returned]
    place = network.insert(last, op, (inputs[0], inputs[1:], weights, write_steps(steps), outputs))
    place.meta["lowered"] = [(chain_call(node), residual_of(node) is not None) for node in chain]
    for i, node in enumerate(returned):
        result = network.insert(last, operator.getitem, (place, i))
        node.replace_all_uses_with(result, delete_user_cb=lambda user: user not in members)
    for node in early:
        last.prepend(node)
    for node in reversed(chain):
        network.graph.erase_node(node)


def _users_before(network: Network, chain: list[fx.Node]) -> list[fx.Node]:
    """What stands before the last convolution of a chain and needs the result of one of them."""
    seen = set(chain)
    early = []
    for node in network.graph.nodes:
        if node is chain[-1]:
            break
        if node not in seen and any(i in seen for i in node.all_input_nodes):
            seen.add(node)
            early.append(node)
    return early


def flat(name: str) -> str:
    """A module's name as an attribute without dots."""
    flat = name.replace(".", "_")
    return f"_{flat}" if flat[:1].isdigit() else flat


def unique(name: str, taken: Iterable[str]) -> str:
    """``name``, with a number behind it where it is taken or means something to :class:`Optimized`."""
    taken, candidate, i = set(taken), name, 1
    while candidate in taken or candidate in RESERVED:
        i += 1
        candidate = f"{name}_{i}"
    return candidate


def describe(network: Network) -> list[Row]:
    """A row for everything that is in the graph, and for what was taken out of it."""
    rows = list(network.rows)
    for node in network.graph.nodes:
        if "lowered" in node.meta:
            for call, has_residual in node.meta["lowered"]:
                detail = _detail(call, has_residual)
                rows += [Row("replaced", name, kind, detail) for name, kind in call.parts]
        elif node.op == "call_module":
            rows.append(Row("left", network.name(node), network.kind(node), _reason(network, node)))
        elif node in network.reasons:
            rows.append(Row("left", network.name(node), network.kind(node), network.reasons[node]))
    return rows


def _detail(call: ConvCall | MeanCall, has_residual: bool) -> str:
    if isinstance(call, MeanCall):
        window = "x".join(map(str, call.kernel_size)) if any(call.kernel_size) else "map"
        return f"{call.parts[0][0] or 'mean'}: mean of {window}"
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
        return "torch's own is faster for a single image"
    if type(module).__module__.startswith("effkern"):
        return OWN
    return "effkern has no op for it"
