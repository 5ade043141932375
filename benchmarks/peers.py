"""What our ops are measured against: PyTorch in four forms, and four inference engines where they are installed.

    eager_contiguous, eager_channels_last   what a user writes today
    mkldnn_prepacked                        oneDNN with its own weight layout and fused epilogue (one conv only)
    compile                                 torch.compile with constant folding of the weights ("freezing")
    onnxruntime, openvino, mnn, ncnn        optional: pip install -e .[bench]

`module_peers` runs a whole network through all that can take one, `conv_peers` one layer. Both return callables
without arguments that give a tensor. A peer that is not installed, or cannot do the layer, is named with the reason
in ``bench.missing``; nothing is dropped in silence. All get ``bench.threads`` threads and float32 arithmetic.

MNN is driven through its converter's extension module: the command-line wrapper of that converter installs
and calls a usage logger.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import Bench

Call = Callable[[], Tensor]
Inputs = tuple[Tensor, ...]


class Unavailable(Exception):
    """Why a peer cannot run here."""


class ConvLayer(nn.Module):
    """``act(conv(x) + bias [+ residual])`` as an ordinary module, so that every peer can take it."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        act: str = "none",
    ) -> None:
        """Hold copies of ``weight`` [Co, Ci/groups, kh, kw] and ``bias`` [Co]; ``act`` as in the ops."""
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        self.stride, self.padding, self.dilation = (_pair(v) for v in (stride, padding, dilation))
        self.groups, self.act = groups, act

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """One conv, one sum, one activation, as three calls."""
        y = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        if residual is not None:
            y = y + residual
        return y if self.act == "none" else ACTIVATIONS[self.act](y)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
    "silu": F.silu,
}


def module_peers(bench: Bench, module: nn.Module, *inputs: Tensor) -> dict[str, Call]:
    """Every peer that can run ``module(*inputs)`` as a whole, in evaluation mode."""
    return _collect(bench, MODULE_PEERS, module.eval(), inputs)


def conv_peers(bench: Bench, layer: ConvLayer, x: Tensor, residual: Tensor | None = None) -> dict[str, Call]:
    """Every peer that can run one conv layer: those of `module_peers`, prepacked oneDNN and ncnn."""
    inputs = (x,) if residual is None else (x, residual)
    return _collect(bench, {**MODULE_PEERS, **CONV_PEERS}, layer.eval(), inputs)


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
    return partial(compiled, *(_laid_out(t, torch.channels_last) for t in inputs))


def _mkldnn_prepacked(bench: Bench, layer: ConvLayer, inputs: Inputs) -> Call:
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


def _onnxruntime(bench: Bench, module: nn.Module, inputs: Inputs) -> Call:
    ort = _installed("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = bench.threads, 3
    with tempfile.TemporaryDirectory() as folder:
        path = _onnx(module, inputs, folder)
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = {f"x{i}": t.contiguous().numpy() for i, t in enumerate(inputs)}
    return lambda: torch.from_numpy(session.run(None, feed)[0])


def _openvino(bench: Bench, module: nn.Module, inputs: Inputs) -> Call:
    core = _installed("openvino").Core()
    settings = {
        "INFERENCE_NUM_THREADS": bench.threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }
    with tempfile.TemporaryDirectory() as folder:
        compiled = core.compile_model(core.read_model(_onnx(module, inputs, folder)), "CPU", settings)
    request, output = compiled.create_infer_request(), compiled.output(0)
    feed = {i: t.contiguous().numpy() for i, t in enumerate(inputs)}
    return lambda: torch.from_numpy(request.infer(feed, share_inputs=True, share_outputs=True)[output])


def _mnn(bench: Bench, module: nn.Module, inputs: Inputs) -> Call:
    mnn, expr, convert = _installed("MNN"), _installed("MNN.expr"), _installed("_tools")
    with tempfile.TemporaryDirectory() as folder:
        source, target = _onnx(module, inputs, folder), Path(folder) / "model.mnn"
        arguments = ["-f", "ONNX", "--modelFile", str(source), "--MNNModel", str(target), "--bizCode", "bench"]
        convert.mnnconvert(["mnnconvert", *arguments])
        settings = {"backend": "CPU", "numThread": bench.threads, "precision": "high"}
        runtime = mnn.nn.create_runtime_manager((settings,))
        names = [f"x{i}" for i in range(len(inputs))]
        net = mnn.nn.load_module_from_file(str(target), names, ["y"], runtime_manager=runtime)
    arrays = [t.contiguous().numpy() for t in inputs]

    def call() -> Tensor:
        variables = []
        for array in arrays:
            variables.append(expr.placeholder(list(array.shape), expr.NCHW))
            variables[-1].write(array)
        out = expr.convert(net.forward(variables)[0], expr.NCHW)
        return torch.from_numpy(out.read().reshape(out.shape))

    return call


def _ncnn(bench: Bench, layer: ConvLayer, inputs: Inputs) -> Call:
    ncnn = _installed("ncnn")
    outputs, _, kh, kw = layer.weight.shape
    (sh, sw), (ph, pw), (dh, dw) = layer.stride, layer.padding, layer.dilation
    kind = "Convolution" if layer.groups == 1 else "ConvolutionDepthWise"
    fused = layer.act == "relu" and len(inputs) == 1
    conv = f"0={outputs} 1={kw} 11={kh} 2={dw} 12={dh} 3={sw} 13={sh} 4={pw} 14={ph} 5={int(layer.bias is not None)}"
    conv += f" 6={layer.weight.numel()} 7={layer.groups} 9={int(fused)}"
    lines = [f"Input x{i} 0 1 x{i}" for i in range(len(inputs))] + [f"{kind} conv 1 1 x0 c {conv}"]
    last = "c"
    if len(inputs) == 2:
        lines.append("BinaryOp sum 2 1 c x1 s 0=0")
        last = "s"
    if layer.act != "none" and not fused:
        lines.append({"relu": "ReLU", "relu6": "Clip", "hardswish": "HardSwish", "silu": "Swish"}[layer.act])
        lines[-1] += f" act 1 1 {last} a" + {"relu6": " 0=0 1=6", "hardswish": " 0=0.16666667 1=0.5"}.get(layer.act, "")
        last = "a"
    blobs = sum(int(line.split()[3]) for line in lines)
    net = ncnn.Net()
    net.opt.num_threads = bench.threads
    for narrower in ("fp16_packed", "fp16_storage", "fp16_arithmetic", "bf16_storage"):
        setattr(net.opt, f"use_{narrower}", False)
    with tempfile.TemporaryDirectory() as folder:
        text, weights = Path(folder) / "conv.param", Path(folder) / "conv.bin"
        text.write_text("\n".join(["7767517", f"{len(lines)} {blobs}", *lines, ""]))
        flag = b"\0\0\0\0"  # the weight follows as plain float32
        bias = b"" if layer.bias is None else layer.bias.detach().float().numpy().tobytes()
        weights.write_bytes(flag + layer.weight.detach().float().contiguous().numpy().tobytes() + bias)
        if net.load_param(str(text)) or net.load_model(str(weights)):
            raise Unavailable("ncnn refused the layer")
    samples = [[t[n].contiguous().numpy() for t in inputs] for n in range(inputs[0].size(0))]

    def call() -> Tensor:  # ncnn takes one image a call
        results = []
        for sample in samples:
            extractor = net.create_extractor()
            for i, array in enumerate(sample):
                extractor.input(f"x{i}", ncnn.Mat(array))
            results.append(torch.from_numpy(extractor.extract(last)[1].numpy().copy()))
        return torch.stack(results)

    return call


def _onnx(module: nn.Module, inputs: Inputs, folder: str) -> Path:
    """The module as an ONNX file with inputs ``x0``, ``x1`` and output ``y``, shapes fixed."""
    _installed("onnx")
    if any(t.dtype != torch.float32 for t in inputs):
        raise Unavailable("compared in float32 only")
    path = Path(folder) / "model.onnx"
    names = [f"x{i}" for i in range(len(inputs))]
    plain = tuple(t.contiguous() for t in inputs)
    # The exporter built on torch.export wants onnxscript besides; the older one writes all that a CNN needs.
    torch.onnx.export(module, plain, str(path), input_names=names, output_names=["y"], dynamo=False, verbose=False)
    return path


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """No chatter from converters: they write to the standard output itself, past Python."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def _installed(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Unavailable(f"not installed ({error})") from None


def _laid_out(t: Tensor, layout: torch.memory_format) -> Tensor:
    return t.contiguous(memory_format=layout) if t.dim() == 4 else t.contiguous()


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


MODULE_PEERS = {
    "eager_contiguous": partial(_eager, layout=torch.contiguous_format),
    "eager_channels_last": partial(_eager, layout=torch.channels_last),
    "compile": _compile,
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
    "mnn": _mnn,
}
CONV_PEERS = {"mkldnn_prepacked": _mkldnn_prepacked, "ncnn": _ncnn}
