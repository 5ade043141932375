"""Sizes as far as the graph tells them without an input: enough to know that two terms of a sum have one shape.

A size is an int or a symbol: the node it comes from and what strides and pads did to it since, in a normal form, so
that two paths of the same strides give equal sizes.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from effkern.inference.network import ConvCall, Network, conv_call
from effkern.inference.recognize import NotReplaceable, as_activation, as_norm, as_sum, bound

Size = Hashable
_SAME = (
    torch.sigmoid, "sigmoid", F.hardsigmoid, F.gelu, torch.tanh, "tanh", F.leaky_relu, F.elu, F.mish, F.softplus,
)  # fmt: skip
_SAME_MODULES = (
    nn.Sigmoid, nn.Hardsigmoid, nn.GELU, nn.Tanh, nn.LeakyReLU, nn.ELU, nn.Mish, nn.PReLU, nn.GroupNorm,
    nn.InstanceNorm2d, nn.LocalResponseNorm,
)  # fmt: skip
_PRODUCTS = (operator.mul, torch.mul, "mul")


@dataclass(frozen=True)
class Shape:
    """Sizes of a 4-d map and its dtype."""

    n: Size
    c: Size
    h: Size
    w: Size
    dtype: torch.dtype


def infer(network: Network) -> dict[fx.Node, Shape]:
    """The shape of every node that is known to be a map."""
    shapes: dict[fx.Node, Shape] = {}
    for node in network.graph.nodes:
        call = conv_call(node)
        if call is not None:
            x = node.args[0]
            assert isinstance(x, fx.Node)
            if x not in shapes:  # whatever it is, a convolution takes maps only
                shapes[x] = Shape(("n", x), call.conv.in_channels, ("h", x), ("w", x), call.dtype)
            shapes[node] = _convolved(shapes[x], call)
            continue
        shape = _of(network, node, shapes)
        if shape is not None:
            shapes[node] = shape
    return shapes


def _convolved(x: Shape, call: ConvCall) -> Shape:
    conv = call.conv
    size = [
        _slide((x.h, x.w)[i], conv.kernel_size[i], conv.stride[i], sum(conv.padding[i]), conv.dilation[i])
        for i in (0, 1)
    ]
    return Shape(x.n, int(conv.weight.shape[0]), size[0], size[1], call.dtype)


def _slide(size: Size, kernel: int, stride: int, padding: int, dilation: int, ceil: bool = False) -> Size:
    """``(size + offset) // stride + 1``, in a form in which steps of stride 1 melt into the next step."""
    offset = padding - dilation * (kernel - 1) - 1
    if isinstance(size, int) and not ceil:
        return (size + offset) // stride + 1
    origin, steps = (size.origin, size.steps) if isinstance(size, _Slid) else (size, ())
    if steps and steps[-1][1:] == (1, False):
        offset += steps[-1][0] + 1
        steps = steps[:-1]
    if (stride, offset) != (1, -1):
        steps = (*steps, (offset, stride, ceil and stride > 1))
    return _Slid(origin, steps) if steps else origin


@dataclass(frozen=True)
class _Slid:
    """A symbol after ``size -> (size + offset) // stride + 1`` for every step (offset, stride, rounded up)."""

    origin: Size
    steps: tuple[tuple[int, int, bool], ...]


def _of(network: Network, node: fx.Node, shapes: dict[fx.Node, Shape]) -> Shape | None:
    inputs = [shapes.get(i) for i in node.all_input_nodes]
    first = inputs[0] if inputs else None
    if first is None and node.target is operator.getitem:
        return _piece(shapes, node)
    if first is None:
        return _product(shapes, node) if node.target in _PRODUCTS else None
    if as_activation(network, node) is not None:
        return first
    try:
        if as_norm(network, node) is not None:
            return first
    except NotReplaceable:
        return first
    if node.target in ("expand_as", "view_as", "reshape_as") and len(node.args) == 2:
        return shapes.get(node.args[1])  # type: ignore[arg-type]
    if node.target in (torch.cat, torch.concat):
        return _joined(shapes, node)
    module = network.module(node)
    if isinstance(module, _SAME_MODULES) or node.target in _SAME:
        return first
    terms = as_sum(node)
    if terms is not None:
        return first if shapes.get(terms[0]) == shapes.get(terms[1]) else None
    if node.target in _PRODUCTS:
        return _product(shapes, node)
    return _pooled(node, module, first) or _cut(node, first)


def _joined(shapes: dict[fx.Node, Shape], node: fx.Node) -> Shape | None:
    """Maps one behind the other along the channels."""
    arguments = bound(node, lambda tensors, dim=0: None) or {}
    tensors = arguments.get("tensors")
    if not isinstance(tensors, list | tuple) or arguments["dim"] not in (1, -3):
        return None
    maps = [shapes.get(t) for t in tensors]
    first = maps[0]
    if first is None or any(m is None or not isinstance(m.c, int) for m in maps):
        return None
    if any(replace(m, c=0) != replace(first, c=0) for m in maps if m is not None):
        return None
    return replace(first, c=sum(m.c for m in maps))  # type: ignore[union-attr, misc]


def _piece(shapes: dict[fx.Node, Shape], node: fx.Node) -> Shape | None:
    """One of the pieces that a map is cut into along the channels."""
    source, index = node.args
    if not isinstance(source, fx.Node) or not isinstance(index, int) or not source.args:
        return None
    x = shapes.get(source.args[0])  # type: ignore[arg-type]
    arguments = bound(source, lambda input, sizes, dim=0: None) or {}
    sizes = arguments.get("sizes")
    if x is None or not isinstance(x.c, int) or arguments.get("dim") not in (1, -3):
        return None
    if source.target in (torch.chunk, "chunk") and isinstance(sizes, int) and x.c % sizes == 0:
        return replace(x, c=x.c // sizes)
    if source.target in (torch.split, "split"):
        if isinstance(sizes, int) and x.c % sizes == 0:
            return replace(x, c=sizes)
        if isinstance(sizes, list | tuple) and isinstance(sizes[index], int):
            return replace(x, c=sizes[index])
    return None


def _cut(node: fx.Node, x: Shape) -> Shape | None:
    """Every so many pixels, and zeros around: the shortcuts of ResNets without parameters."""
    if node.target is operator.getitem and isinstance(node.args[1], tuple) and len(node.args[1]) <= 4:
        slices = [*node.args[1], *[slice(None)] * (4 - len(node.args[1]))]
        if not all(isinstance(s, slice) and s.start is None and s.stop is None for s in slices):
            return None
        steps = [s.step or 1 for s in slices]  # type: ignore[union-attr]
        if steps[:2] != [1, 1] or not all(isinstance(step, int) and step > 0 for step in steps):
            return None
        return Shape(x.n, x.c, _slide(x.h, 1, steps[2], 0, 1), _slide(x.w, 1, steps[3], 0, 1), x.dtype)
    if node.target is F.pad:
        pad = (bound(node, lambda input, pad, mode="constant", value=None: None) or {}).get("pad")
        if not isinstance(pad, (list, tuple)) or not all(isinstance(p, int) for p in pad) or not isinstance(x.c, int):
            return None
        left, right, top, bottom, front, back, *batch = list(pad) + [0] * (8 - len(pad))
        if any(batch):
            return None
        return Shape(
            x.n, x.c + front + back, _slide(x.h, 1, 1, top + bottom, 1), _slide(x.w, 1, 1, left + right, 1), x.dtype
        )
    return None


def _product(shapes: dict[fx.Node, Shape], node: fx.Node) -> Shape | None:
    """Of a map with an equal one, with a gate for every channel, or with a number."""
    if len(node.args) != 2:
        return None
    a, b = (shapes.get(v) if isinstance(v, fx.Node) else v for v in node.args)
    if isinstance(a, Shape) and isinstance(b, int | float):
        return a
    if isinstance(b, Shape) and isinstance(a, int | float):
        return b
    if not isinstance(a, Shape) or not isinstance(b, Shape):
        return None
    if a == b:
        return a
    for map_, gate in ((a, b), (b, a)):
        if (gate.h, gate.w) == (1, 1) and (gate.n, gate.c, gate.dtype) == (map_.n, map_.c, map_.dtype):
            return map_
    return None


def _max_pool2d(input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False) -> None:  # type: ignore[no-untyped-def]
    """The signature, which torch's own function hides."""


def _pooled(node: fx.Node, module: nn.Module | None, x: Shape) -> Shape | None:
    options: dict[str, Any] | None = None
    if isinstance(module, nn.MaxPool2d | nn.AvgPool2d):
        options = vars(module)
    elif getattr(node.target, "__name__", "") == "max_pool2d" or node.target is F.max_pool2d:
        options = bound(node, _max_pool2d)
    elif node.target is F.avg_pool2d:
        options = bound(node, lambda input, kernel_size, stride=None, padding=0, ceil_mode=False, *rest: None)
    if options is not None and not options.get("return_indices"):
        sizes = []
        for i, size in enumerate((x.h, x.w)):
            values = []
            for name in ("kernel_size", "stride", "padding", "dilation"):
                value = options.get(name, 1)
                if name == "stride" and (value is None or value == ()):
                    value = options["kernel_size"]
                values.append(value[i] if isinstance(value, list | tuple) else value)
            if not all(isinstance(v, int) for v in values):
                return None
            kernel, stride, padding, dilation = values
            sizes.append(_slide(size, kernel, stride, 2 * padding, dilation, bool(options.get("ceil_mode"))))
        return Shape(x.n, x.c, sizes[0], sizes[1], x.dtype)
    if isinstance(module, nn.AdaptiveAvgPool2d | nn.AdaptiveMaxPool2d):
        return _fixed(x, module.output_size)
    if node.target in (F.adaptive_avg_pool2d, F.adaptive_max_pool2d) and len(node.args) == 2:
        return _fixed(x, node.args[1])
    if node.target in (torch.mean, "mean"):
        options = bound(node, lambda input, dim=None, keepdim=False: None) or {}
        if (
            options.get("dim") in ((2, 3), [2, 3], (-1, -2), [-1, -2], (-2, -1), [-2, -1])
            and options["keepdim"] is True
        ):
            return Shape(x.n, x.c, 1, 1, x.dtype)
    return None


def _fixed(x: Shape, size: Any) -> Shape | None:
    rows, columns = size if isinstance(size, list | tuple) else (size, size)
    if not isinstance(rows, int) or not isinstance(columns, int):
        return None
    return Shape(x.n, x.c, rows, columns, x.dtype)
