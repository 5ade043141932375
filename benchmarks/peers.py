"""What our ops are measured against: PyTorch in four forms, and four inference engines where they are installed.

    eager_contiguous, eager_channels_last   what a user writes today, batch norm folded
    mkldnn_prepacked                        oneDNN with its own weight layout and fused epilogues
    compile                                 torch.compile with constant folding of the weights ("freezing")
    onnxruntime, openvino, mnn, ncnn        optional: pip install -e .[bench]; see benchmarks/engines.py

`module_peers` runs a whole network through all that can take one, `conv_peers` one layer. Both return callables
without arguments that give a tensor. A peer that is not installed, or cannot do the layer, is named with the reason
in ``bench.missing``; nothing is dropped in silence. All get ``bench.threads`` threads and float32 arithmetic.
"""

from __future__ import annotations

import contextlib
import copy
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import engines
from benchmarks.common import Bench
from benchmarks.engines import Inputs, Unavailable
from benchmarks.layer import ConvLayer

Call = Callable[[], Tensor]
TORCH = ("eager_contiguous", "eager_channels_last", "mkldnn_prepacked", "compile")
EAGER = TORCH[:2]
#: A compilation that takes longer is given up, and named as missing.
COMPILE_SECONDS = 120


def module_peers(bench: Bench, module: nn.Module, *inputs: Tensor) -> dict[str, Call]:
    """Every peer that can run ``module(*inputs)`` as a whole, in evaluation mode."""
    return _collect(bench, MODULE_PEERS, module.eval(), inputs)


def conv_peers(bench: Bench, layer: ConvLayer, x: Tensor, residual: Tensor | None = None) -> dict[str, Call]:
    """Every peer that can run one conv layer."""
    inputs = (x,) if residual is None else (x, residual)
    return _collect(bench, CONV_PEERS, layer.eval(), inputs)


def _collect(bench: Bench, peers: dict[str, Any], module: nn.Module, inputs: Inputs) -> dict[str, Call]:
    calls = {}
    for name, build in peers.items():
        if not bench.wants(name):
            bench.missing[name] = "not asked for (--peers)"
            continue
        try:
            with _hushed():
                calls[name] = build(bench, module, inputs)
                calls[name]()
        except Exception as error:  # a peer's failure is a finding, not the end of the benchmark
            calls.pop(name, None)
            text = str(error).strip().partition("\n")[0]
            bench.missing[name] = text if isinstance(error, Unavailable) else f"{type(error).__name__}: {text[:200]}"
    return calls


def _eager(bench: Bench, module: nn.Module, inputs: Inputs, layout: torch.memory_format) -> Call:
    module = copy.deepcopy(module).to(memory_format=layout)
    return partial(module, *(_laid_out(t, layout) for t in inputs))


def _compile(bench: Bench, module: nn.Module, inputs: Inputs) -> Call:
    if bench.quick:
        raise Unavailable("left out under --quick: the first compilation takes tens of seconds")
    torch._dynamo.reset()
    module = copy.deepcopy(module).to(memory_format=torch.channels_last)
    compiled = torch.compile(module, options={"freezing": True})
    call = partial(compiled, *(_laid_out(t, torch.channels_last) for t in inputs))
    with _within(COMPILE_SECONDS):
        call()
    return call


def _mkldnn_conv(bench: Bench, layer: ConvLayer, inputs: Inputs) -> Call:
    if not torch.backends.mkldnn.is_available():
        raise Unavailable("this torch has no oneDNN")
    x, *rest = (_laid_out(t, torch.channels_last) for t in inputs)
    geometry = (layer.padding, layer.stride, layer.dilation, layer.groups)
    weight = torch._C._nn.mkldnn_reorder_conv2d_weight(layer.weight.detach().to_mkldnn(), *geometry, list(x.shape))
    unary, scalars = {"silu": ("swish", []), "relu6": ("hardtanh", [0.0, 6.0])}.get(layer.act, (layer.act, []))
    if not rest:
        run = torch.ops.mkldnn._convolution_pointwise.default
        return partial(run, x, weight, layer.bias, *geometry, unary, scalars, "")
    if layer.act not in ("none", "relu"):
        raise Unavailable(f"oneDNN's fused sum takes no {layer.act} here")
    run = torch.ops.mkldnn._convolution_pointwise.binary
    after = None if layer.act == "none" else "relu"
    return partial(run, x, rest[0], weight, layer.bias, *geometry, "add", 1.0, after, [], "")


def _mkldnn_network(bench: Bench, module: nn.Module, inputs: Inputs) -> Call:
    """TorchScript's optimization for inference: oneDNN's blocked layouts throughout, weights reordered once."""
    if not torch.backends.mkldnn.is_available():
        raise Unavailable("this torch has no oneDNN")
    plain = tuple(t.contiguous() for t in inputs)
    return partial(torch.jit.optimize_for_inference(torch.jit.trace(module, plain)), *plain)


@contextlib.contextmanager
def _within(seconds: int) -> Iterator[None]:
    """Give up after ``seconds``; only the main thread can be interrupted so, others have no limit."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def give_up(*_: object) -> None:
        raise Unavailable(f"took longer than {seconds} s to compile")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """No chatter from converters: they write to the standard output itself, past Python."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept, nowhere = (os.dup(1), os.dup(2)), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for stream, copy_of in enumerate(kept, 1):
            os.dup2(copy_of, stream)
            os.close(copy_of)
        os.close(nowhere)


def _laid_out(t: Tensor, layout: torch.memory_format) -> Tensor:
    return t.contiguous(memory_format=layout) if t.dim() == 4 else t.contiguous()


def _engine(build: Callable[..., Any], bench: Bench, module: nn.Module, inputs: Inputs) -> Call:
    return build(bench.threads, module, inputs)


_EVERYWHERE: dict[str, Any] = {
    "eager_contiguous": partial(_eager, layout=torch.contiguous_format),
    "eager_channels_last": partial(_eager, layout=torch.channels_last),
    "compile": _compile,
    "onnxruntime": partial(_engine, engines.onnxruntime),
    "openvino": partial(_engine, engines.openvino),
    "mnn": partial(_engine, engines.mnn),
}
MODULE_PEERS = {**_EVERYWHERE, "mkldnn_prepacked": _mkldnn_network, "ncnn": partial(_engine, engines.ncnn_network)}
CONV_PEERS = {**_EVERYWHERE, "mkldnn_prepacked": _mkldnn_conv, "ncnn": partial(_engine, engines.ncnn_conv)}
