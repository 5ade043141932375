"""What the passes work on: the graph of calls, the modules behind it, and convolutions held as numbers.

A convolution that an effkern op can compute is a call of :func:`convolution`, its numbers (fp64) in :class:`ConvCall`.
Passes recognise what stands next to it, change the numbers, and take the neighbour out of the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from effkern.inference.report import Row
from effkern.reparam.fold import Conv

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def convolution(x: Tensor, residual: Tensor | None = None) -> Tensor:
    """Stands for ``act(conv(x) + residual)`` while passes work; lowering replaces every call."""
    raise AssertionError("a convolution was not lowered")


def average(x: Tensor) -> Tensor:
    """Stands for averages over windows that can join a chain of convolutions; lowering replaces every call."""
    raise AssertionError("an average was not lowered")


@dataclass
class MeanCall:
    """What one call of :func:`average` computes: see :class:`effkern.ops.rep_conv.chain.AverageStep`."""

    out_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    ceil_mode: bool
    dtype: torch.dtype
    parts: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class ConvCall:
    """What one call of :func:`convolution` computes.

    Attributes:
        conv: the numbers; ``conv.padding`` may differ between sides and ``padding_mode`` be any.
        act: the activation behind it.
        dtype: of input and output.
        parts: name and kind of every piece of the network that went into it, for the report.
    """

    conv: Conv
    act: str
    dtype: torch.dtype
    parts: list[tuple[str, str]] = field(default_factory=list)

    @property
    def is_linear(self) -> bool:
        """Whether another linear map can still be folded in."""
        return self.act == "none"


class Network:
    """A traced network.

    Attributes:
        root: the module that was traced; parameters are read from it.
        graph: its calls.
        opaque: names of modules called as they are, with the reasons.
        path: name of ``root`` in the whole model.
        rows: what the report will say.
        modules: modules that passes added, by name; ``root`` itself is never changed.
        constants: tensors that passes added, by name.
        names: name of a module that a pass added -> name of the one it stands for.
    """

    def __init__(self, root: nn.Module, graph: fx.Graph, opaque: dict[str, str], path: str) -> None:
        self.root, self.graph, self.opaque, self.path = root, graph, opaque, path
        self.rows: list[Row] = []
        self.modules: dict[str, nn.Module] = {}
        self.constants: dict[str, Tensor] = {}
        self.names: dict[str, str] = {}
        self.reasons: dict[fx.Node, str] = {}  # why a node was not replaced

    # Looking

    def called(self, node: fx.Node) -> nn.Module:
        """The module that a node calls."""
        name = str(node.target)
        return self.modules[name] if name in self.modules else self.root.get_submodule(name)

    def module(self, node: fx.Node) -> nn.Module | None:
        """The module that a node calls, if it calls one that may be replaced."""
        if node.op != "call_module" or node.target in self.opaque:
            return None
        return self.called(node)

    def constant(self, node: Any) -> Tensor | None:
        """The parameter or buffer that a node stands for; tensors stand for themselves."""
        if isinstance(node, Tensor):
            return node
        if not isinstance(node, fx.Node) or node.op != "get_attr":
            return None
        if node.target in self.constants:
            return self.constants[str(node.target)]
        owner, _, name = str(node.target).rpartition(".")
        value = getattr(self.root.get_submodule(owner), name)
        return value if isinstance(value, Tensor) else None

    def calls(self) -> Iterator[fx.Node]:
        """Nodes in order; the graph may be changed meanwhile."""
        yield from list(self.graph.nodes)

    def convolutions(self) -> Iterator[fx.Node]:
        """Calls of :func:`convolution` in order."""
        for node in self.calls():
            if node.target is convolution:
                yield node

    def name(self, node: fx.Node) -> str:
        """Name, in the whole model, of the module that a node calls or is called by."""
        if node.op == "call_module":
            inner = self.names.get(str(node.target), str(node.target))
        else:
            stack = node.meta.get("nn_module_stack") or {}
            inner = next(reversed(stack), "") if stack else ""
        return ".".join(part for part in (self.path, inner) if part)

    def kind(self, node: fx.Node) -> str:
        """Type of the module that a node calls, or name of the function."""
        if node.op == "call_module":
            return type(self.called(node)).__name__
        return getattr(node.target, "__name__", str(node.target))

    def part(self, node: fx.Node) -> tuple[str, str]:
        """A node as :attr:`ConvCall.parts` wants it."""
        return self.name(node), self.kind(node)

    # Changing

    def insert(self, before: fx.Node, target: Callable[..., Any] | str, args: tuple, kwargs: Any = None) -> fx.Node:
        """A new call in front of another."""
        with self.graph.inserting_before(before):
            create = self.graph.call_method if isinstance(target, str) else self.graph.call_function
            return create(target, args, kwargs or {})

    def replace(self, node: fx.Node, by: fx.Node) -> None:
        """Let ``by`` stand for ``node``, which goes."""
        if "example" in node.meta:
            by.meta["example"] = node.meta["example"]
        node.replace_all_uses_with(by)
        self.erase(node)

    def erase(self, node: fx.Node) -> None:
        """Remove a node without users, and the constants only it used."""
        inputs = node.all_input_nodes
        self.graph.erase_node(node)
        for i in inputs:
            if i.op == "get_attr" and not i.users:
                self.graph.erase_node(i)

    def add_convolution(self, before: fx.Node, x: fx.Node, call: ConvCall, residual: fx.Node | None = None) -> fx.Node:
        """A new call of :func:`convolution`."""
        node = self.insert(before, convolution, (x,) if residual is None else (x, residual))
        node.meta["conv"] = call
        return node

    def remove(self, node: fx.Node, by: fx.Node, why: str) -> None:
        """Take out a node that returns its input."""
        self.rows.append(Row("removed", *self.part(node), why))
        self.replace(node, by)


def sole_user(node: fx.Node) -> fx.Node | None:
    """The one node that uses this one's result; None if there are several, or it is the network's output."""
    if len(node.users) != 1:
        return None
    user = next(iter(node.users))
    return None if user.op == "output" else user


def conv_call(node: Any) -> ConvCall | None:
    """The numbers behind a call of :func:`convolution`."""
    if isinstance(node, fx.Node) and node.target is convolution:
        call = node.meta["conv"]
        assert isinstance(call, ConvCall)
        return call
    return None


def chain_call(node: Any) -> ConvCall | MeanCall | None:
    """The numbers behind a call of :func:`convolution` or :func:`average`."""
    if isinstance(node, fx.Node) and node.target is average:
        call = node.meta["conv"]
        assert isinstance(call, MeanCall)
        return call
    return conv_call(node)


def residual_of(node: fx.Node) -> fx.Node | None:
    """What a convolution adds before its activation."""
    if len(node.args) < 2:
        return None
    assert isinstance(node.args[1], fx.Node)
    return node.args[1]


def position(network: Network) -> dict[fx.Node, int]:
    """Nodes numbered in order of execution."""
    return {node: i for i, node in enumerate(network.graph.nodes)}
