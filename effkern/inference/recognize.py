"""Which calls of a traced network are a convolution, a batch norm, an activation, or nothing at all in eval mode."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from effkern.inference.network import FLOATS, ConvCall, MeanCall, Network, chain_call
from effkern.inference.tracing import is_frozen_norm
from effkern.nn.rep_conv import RepConv2d
from effkern.nn.repvgg_block import BranchBlock, ConvBN
from effkern.reparam.deploy import read_block
from effkern.reparam.fold import Conv, ReparamError

_ACT_MODULES: dict[type, str] = {nn.ReLU: "relu", nn.ReLU6: "relu6", nn.Hardswish: "hardswish", nn.SiLU: "silu"}
_ACT_FUNCTIONS: dict[Any, str] = {
    F.relu: "relu", torch.relu: "relu", "relu": "relu", F.relu6: "relu6",
    F.hardswish: "hardswish", F.silu: "silu",
}  # fmt: skip
_ADDITIONS = (operator.add, torch.add, "add")
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_DROPOUT_FUNCTIONS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout)


class NotReplaceable(Exception):
    """The call is a convolution, but not one that effkern's op computes; the message says why."""


def bound(node: fx.Node, function: Callable[..., Any]) -> dict[str, Any] | None:
    """A call's arguments by name, defaults filled in; None if they do not fit."""
    try:
        call = inspect.signature(function).bind(*node.args, **node.kwargs)
    except (TypeError, ValueError):
        return None
    call.apply_defaults()
    return dict(call.arguments)


def exact(tensor: Tensor) -> Tensor:
    """The numbers of a tensor in fp64."""
    return tensor.detach().to("cpu", torch.float64)


# Convolutions


def as_convolution(network: Network, node: fx.Node) -> tuple[fx.Node, ConvCall] | None:
    """A call's input and numbers if it is a 2-d convolution.

    Raises:
        NotReplaceable: if it is one that must stay.
    """
    module = network.module(node)
    if isinstance(module, RepConv2d):
        if len(node.all_input_nodes) != 1:
            raise NotReplaceable("called with a residual: an effkern op already")
        _check_weight(module.weight)
        return _input(node), ConvCall(read_layer(module), module.act, module.weight.dtype, [network.part(node)])
    if isinstance(module, BranchBlock | ConvBN):
        return _input(node), _read_block(network, node, module)
    if isinstance(module, nn.Conv2d):
        return _input(node), ConvCall(read_layer(module), "none", module.weight.dtype, [network.part(node)])
    if node.op == "call_function" and node.target in (F.conv2d, torch.conv2d):
        return _read_function(network, node)
    return None


def _input(node: fx.Node) -> fx.Node:
    inputs = node.all_input_nodes
    if len(inputs) != 1 or (node.args and node.args[0] is not inputs[0]):
        raise NotReplaceable("its input is no single tensor")
    return inputs[0]


def _check_weight(weight: Tensor) -> None:
    if weight.dtype not in FLOATS:
        raise NotReplaceable(f"dtype {weight.dtype} is none of float32, bfloat16, float16")
    if weight.device.type != "cpu":
        raise NotReplaceable(f"it is on device {weight.device}: optimize on the CPU and move the result")
    if weight.dim() != 4 or weight.numel() == 0 or weight.is_sparse or weight.is_quantized:
        raise NotReplaceable(f"its weight is no plain 4-d tensor, but {list(weight.shape)}")


def read_layer(conv: nn.Conv2d | RepConv2d) -> Conv:
    """A layer's numbers. A parametrized weight is read as it is now: baked."""
    if isinstance(conv, nn.modules.lazy.LazyModuleMixin):
        raise NotReplaceable("it is lazy: run the model once first")
    kind = type(conv).__mro__[1] if parametrize.is_parametrized(conv) else type(conv)
    if kind not in (nn.Conv2d, RepConv2d):
        raise NotReplaceable(f"{kind.__name__} is a convolution of another kind")
    if hasattr(conv, "weight_orig") or hasattr(conv, "weight_g"):
        raise NotReplaceable("its weight is computed by a hook")
    _check_weight(conv.weight)
    padding = conv._padding if isinstance(conv, RepConv2d) else conv.padding
    return _conv(conv.weight, conv.bias, conv.stride, padding, conv.dilation, conv.groups, conv.padding_mode)


def _conv(
    weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int, mode: str = "zeros"
) -> Conv:
    wide = exact(weight)
    shift = torch.zeros(wide.shape[0], dtype=torch.float64) if bias is None else exact(bias)
    steps = _pair(dilation)
    if padding == "same":  # torch puts the odd pixel at the end
        totals = [d * (k - 1) for d, k in zip(steps, wide.shape[2:], strict=True)]
        sides = [(total // 2, total - total // 2) for total in totals]
    elif padding == "valid":
        sides = [(0, 0), (0, 0)]
    else:
        sides = [(p, p) for p in _pair(padding)]
    return Conv(wide, shift, _pair(stride), (sides[0], sides[1]), steps, groups, mode)


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    values = list(value)
    if not all(isinstance(v, int) for v in values) or len(values) not in (1, 2):
        raise NotReplaceable(f"its geometry {value} is no pair of numbers")
    return values[0], values[-1]


def _read_block(network: Network, node: fx.Node, block: BranchBlock | ConvBN) -> ConvCall:
    for weight in block.parameters():
        if weight.dim() == 4:
            _check_weight(weight)
    try:
        conv, layers = read_block(block)
    except ReparamError as error:
        raise NotReplaceable(error.reason) from None
    act = block.act if isinstance(block, BranchBlock) else "none"
    return ConvCall(conv, act, layers[0].weight.dtype, [network.part(node)])


def _read_function(network: Network, node: fx.Node) -> tuple[fx.Node, ConvCall]:
    def conv2d(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1) -> None: ...  # type: ignore[no-untyped-def]

    arguments = bound(node, conv2d)
    if arguments is None or not isinstance(arguments["input"], fx.Node):
        raise NotReplaceable("its arguments are not understood")
    weight, bias = network.constant(arguments["weight"]), network.constant(arguments["bias"])
    if weight is None or (bias is None and arguments["bias"] is not None):
        raise NotReplaceable("its weight is computed by the network")
    _check_weight(weight)
    if not isinstance(arguments["groups"], int):
        raise NotReplaceable("its groups are computed by the network")
    rest = (arguments[name] for name in ("stride", "padding", "dilation", "groups"))
    return arguments["input"], ConvCall(_conv(weight, bias, *rest), "none", weight.dtype, [network.part(node)])


# Norms


def as_norm(network: Network, node: fx.Node) -> tuple[fx.Node, Conv] | None:
    """A batch norm's input, and the norm as a 1x1 convolution of every channel by itself; None if it is none.

    Raises:
        NotReplaceable: for one that normalises with the batch's own statistics.
    """
    module = network.module(node)
    if module is not None and (isinstance(module, _BatchNorm) or is_frozen_norm(module)):
        if parametrize.is_parametrized(module):  # type: ignore[arg-type]
            raise NotReplaceable("its parameters are parametrized")
        fields: Any = module
        values = (fields.running_mean, fields.running_var, fields.weight, fields.bias, fields.eps)
        if fields.running_mean is None or fields.running_var is None:
            raise NotReplaceable("it has no running statistics (track_running_stats=False)")
        if fields.running_mean.is_meta:
            raise NotReplaceable("it is on device meta: it has no numbers")
        if module.training and isinstance(module, _BatchNorm):  # type: ignore[union-attr]
            raise NotReplaceable("it is in training mode")
        return _input(node), _norm(*values)
    if node.op == "call_function" and node.target is F.batch_norm:
        arguments = bound(node, F.batch_norm)
        if arguments is None or not isinstance(arguments["input"], fx.Node):
            return None
        if arguments["training"] is not False:
            raise NotReplaceable("it normalises with the batch's own statistics")
        names = ("running_mean", "running_var", "weight", "bias")
        tensors = [network.constant(arguments[name]) for name in names]
        if any(t is None and arguments[name] is not None for t, name in zip(tensors, names, strict=True)):
            raise NotReplaceable("its statistics are computed by the network")
        mean, var, weight, bias = tensors
        if mean is None or var is None or not isinstance(arguments["eps"], float | int):
            return None
        return arguments["input"], _norm(mean, var, weight, bias, float(arguments["eps"]))
    return None


def _norm(mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Conv:
    scale = (exact(var) + eps).rsqrt()
    if weight is not None:
        scale = scale * exact(weight)
    shift = -exact(mean) * scale
    if bias is not None:
        shift = shift + exact(bias)
    return Conv(scale[:, None, None, None], shift, groups=scale.shape[0])


# Activations, sums, and what does nothing


def as_activation(network: Network, node: fx.Node) -> str | None:
    """Name of the activation that a call is."""
    module = network.module(node)
    if module is not None:
        if type(module) is nn.Hardtanh and (module.min_val, module.max_val) == (0, 6):
            return "relu6"
        return _ACT_MODULES.get(type(module))
    if node.op not in ("call_function", "call_method"):
        return None
    if node.target is F.hardtanh:
        arguments = bound(node, F.hardtanh)
        inside = arguments is not None and (arguments["min_val"], arguments["max_val"]) == (0, 6)
        return "relu6" if inside else None
    if node.target in (torch.clamp, "clamp"):
        limits = bound(node, lambda input, min=None, max=None: None) or {}
        return {(0, None): "relu", (0, 6): "relu6"}.get((_number(limits.get("min")), _number(limits.get("max"))))
    return _ACT_FUNCTIONS.get(node.target)


def _number(value: Any) -> Any:
    return value if value is None or isinstance(value, int | float) else object()


def as_sum(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The two terms of a plain sum of two tensors."""
    if node.op not in ("call_function", "call_method") or node.target not in _ADDITIONS:
        return None
    if len(node.args) != 2 or node.kwargs or not all(isinstance(a, fx.Node) for a in node.args):
        return None
    return node.args  # type: ignore[return-value]


def as_zero_pad(network: Network, node: fx.Node) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """``((top, bottom), (left, right))`` if a call puts so many zeros around a map."""
    module = network.module(node)
    pad: Any = None
    if isinstance(module, nn.ZeroPad2d) or (isinstance(module, nn.ConstantPad2d) and module.value == 0):
        pad = module.padding
    elif node.target is F.pad:
        arguments = bound(node, lambda input, pad, mode="constant", value=None: None) or {}
        if arguments.get("mode") == "constant" and arguments["value"] in (None, 0):
            pad = arguments["pad"]
    if not isinstance(pad, (list, tuple)) or len(pad) != 4 or len(node.all_input_nodes) != 1:
        return None
    if not all(isinstance(side, int) and side >= 0 for side in pad):
        return None
    left, right, top, bottom = pad
    return (top, bottom), (left, right)


# Averages


def as_average(network: Network, node: fx.Node) -> tuple[fx.Node, MeanCall, bool] | None:
    """``(x, numbers, keeps both dimensions)`` if a call averages windows of a convolution's result."""
    module = network.module(node)
    values: dict[str, Any] | None
    x, keeps = next(iter(node.all_input_nodes), None), True
    source = chain_call(x)
    if x is None or source is None or len(node.all_input_nodes) != 1:
        return None
    kernel, stride, up = (0, 0), (1, 1), False
    if type(module) is nn.AvgPool2d or node.target is F.avg_pool2d:
        values = vars(module) if module is not None else bound(node, _avg_pool2d)
        if values is None or values["divisor_override"] is not None:
            return None
        steps = values["kernel_size"] if values["stride"] in (None, ()) else values["stride"]
        try:
            kernel, stride, padding = _pair(values["kernel_size"]), _pair(steps), _pair(values["padding"])
        except (NotReplaceable, TypeError):
            return None
        up = values["ceil_mode"]
        if padding != (0, 0) or not isinstance(up, bool) or min(*kernel, *stride) < 1:
            return None
    elif type(module) is nn.AdaptiveAvgPool2d or node.target is F.adaptive_avg_pool2d:
        values = vars(module) if module is not None else bound(node, lambda input, output_size: None)
        if values is None or values["output_size"] not in (1, (1, 1), [1, 1]):
            return None
    elif node.target in (torch.mean, "mean"):
        values = bound(node, lambda input, dim=None, keepdim=False, dtype=None, out=None: None)
        if values is None or values["dtype"] is not None or values["out"] is not None:
            return None
        dims = values["dim"]
        if not isinstance(dims, (list, tuple)) or sorted(dims, key=str) not in ([2, 3], [-1, -2], [-1, 2], [-2, 3]):
            return None
        keeps = values["keepdim"]
        if not isinstance(keeps, bool):
            return None
    else:
        return None
    channels = source.out_channels if isinstance(source, MeanCall) else int(source.conv.weight.shape[0])
    return x, MeanCall(channels, kernel, stride, up, source.dtype, [network.part(node)]), keeps


def _avg_pool2d(  # type: ignore[no-untyped-def]
    input, kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True, divisor_override=None
) -> None: ...


def as_channel_pad(node: fx.Node) -> int | None:
    """How many channels of zeros a call puts behind those of its input, if that is what it does."""
    if node.target is not F.pad:
        return None
    arguments = bound(node, lambda input, pad, mode="constant", value=None: None) or {}
    pad: Any = arguments.get("pad")
    if arguments.get("mode") != "constant" or arguments["value"] not in (None, 0) or len(node.all_input_nodes) != 1:
        return None
    known = isinstance(pad, (list, tuple)) and len(pad) == 6 and all(isinstance(side, int) for side in pad)
    return pad[5] if known and not any(pad[:5]) and pad[5] >= 0 else None


def as_nothing(network: Network, node: fx.Node) -> str | None:
    """Why a call returns its first argument unchanged in eval mode; None if it does not."""
    module = network.module(node)
    if isinstance(module, nn.Identity):
        return "identity"
    if isinstance(module, _DROPOUTS):
        return None if module.training else "dropout in eval mode"
    if node.op != "call_function":
        return None
    if node.target in (operator.add, torch.add) and any(type(a) is int and a == 0 for a in node.args):
        return "a sum with 0"
    if node.target in _DROPOUT_FUNCTIONS or node.target is torch.dropout:
        signature = (lambda input, p, train: None) if node.target is torch.dropout else node.target
        arguments = bound(node, signature) or {}  # type: ignore[arg-type]
        return "dropout in eval mode" if arguments.get("training", arguments.get("train")) is False else None
    if getattr(node.target, "__name__", "") == "stochastic_depth":  # torchvision's, by name: it may not be installed
        arguments = bound(node, node.target) or {}  # type: ignore[arg-type]
        return "stochastic depth in eval mode" if arguments.get("training") is False else None
    return None
