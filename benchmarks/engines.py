"""The inference engines among the peers: ONNX Runtime, OpenVINO, MNN, ncnn; each with the settings that serve it best.

All are optional (``pip install -e .[bench]``), get the run's number of threads, compute in float32 and are given their
input in memory before the clock starts: outputs stay in the engine's own buffers while it runs. What cannot be taken
off the clock is the reordering between plain and blocked layouts inside ONNX Runtime, OpenVINO and MNN; over a network
it is nothing, for a single layer it is a few per cent.

MNN is driven through its converter's extension module: the command-line wrapper of that converter installs
and calls a usage logger. ncnn takes one image a call: for a batch the images are shared out over single threads,
which is faster than all threads on one image after the other.
"""

from __future__ import annotations

import importlib
import itertools
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.layer import ConvLayer
from benchmarks.timing import Contender

Inputs = tuple[Tensor, ...]


class Unavailable(Exception):
    """Why a peer cannot run here."""


def installed(name: str) -> Any:
    """The module of this name.

    Raises:
        Unavailable: if there is none.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Unavailable(f"not installed ({error})") from None


def onnxruntime(threads: int, module: nn.Module, inputs: Inputs) -> Contender:
    """All graph optimizations, input and output bound to fixed memory."""
    ort = installed("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    # Its threads spin as long as a call runs, but not on into the next contender's.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    with tempfile.TemporaryDirectory() as folder:
        session = ort.InferenceSession(str(to_onnx(module, inputs, folder)), options, ["CPUExecutionProvider"])
    feed = {f"x{i}": t.contiguous().numpy() for i, t in enumerate(inputs)}
    binding = session.io_binding()
    for name, array in feed.items():
        binding.bind_cpu_input(name, array)
    binding.bind_output("y")
    session.run_with_iobinding(binding)
    binding.bind_ortvalue_output("y", binding.get_outputs()[0])
    # The binding holds addresses only, so the arrays are kept with the reader.
    return Contender(
        lambda: session.run_with_iobinding(binding),
        lambda _, kept=feed: torch.from_numpy(binding.copy_outputs_to_cpu()[0]),
    )


def openvino(threads: int, module: nn.Module, inputs: Inputs) -> Contender:
    """The latency hint and float32 throughout."""
    core = installed("openvino").Core()
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }
    with tempfile.TemporaryDirectory() as folder:
        compiled = core.compile_model(core.read_model(to_onnx(module, inputs, folder)), "CPU", settings)
    request, output = compiled.create_infer_request(), compiled.output(0)
    feed = {i: t.contiguous().numpy() for i, t in enumerate(inputs)}
    return Contender(
        lambda: request.infer(feed, share_inputs=True, share_outputs=True),
        lambda out: torch.from_numpy(out[output].copy()),
    )


def mnn(threads: int, module: nn.Module, inputs: Inputs) -> Contender:
    """Precision "high", which is float32."""
    library, expr, convert = installed("MNN"), installed("MNN.expr"), installed("_tools")
    with tempfile.TemporaryDirectory() as folder:
        source, target = to_onnx(module, inputs, folder), Path(folder) / "model.mnn"
        arguments = ["-f", "ONNX", "--modelFile", str(source), "--MNNModel", str(target), "--bizCode", "bench"]
        convert.mnnconvert(["mnnconvert", *arguments])
        settings = {"backend": "CPU", "numThread": threads, "precision": "high", "power": "high"}
        runtime = library.nn.create_runtime_manager((settings,))
        names = [f"x{i}" for i in range(len(inputs))]
        net = library.nn.load_module_from_file(str(target), names, ["y"], runtime_manager=runtime)
    variables = []
    for t in inputs:
        variables.append(expr.placeholder(list(t.shape), expr.NCHW))
        variables[-1].write(t.contiguous().numpy())

    def read(out: Any) -> Tensor:
        plain = expr.convert(out, expr.NCHW)
        return torch.from_numpy(plain.read().reshape(plain.shape).copy())

    return Contender(lambda: net.forward(variables)[0], read)


def ncnn_network(threads: int, module: nn.Module, inputs: Inputs) -> Contender:
    """A whole network of one input, converted by pnnx with float32 weights."""
    ncnn, pnnx = installed("ncnn"), installed("pnnx")
    (x,) = inputs
    with tempfile.TemporaryDirectory() as folder:
        torch.jit.trace(module, (x[:1].contiguous(),)).save(f"{folder}/net.pt")
        shape = "x".join(map(str, x[:1].shape))
        command = [pnnx.EXEC_PATH, "net.pt", f"inputshape=[{shape.replace('x', ',')}]f32", "fp16=0"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        files = Path(folder) / "net.ncnn.param", Path(folder) / "net.ncnn.bin"
        if done.returncode or not all(file.exists() for file in files):
            raise Unavailable(f"pnnx failed: {(done.stderr or done.stdout).strip()[-150:]}")
        unknown = {line.split()[0] for line in files[0].read_text().splitlines()[2:] if "." in line.split()[0]}
        if unknown:
            raise Unavailable(f"pnnx knows no ncnn layer for {', '.join(sorted(unknown))}")
        return _ncnn_run(ncnn, files, threads, inputs, ["in0"], "out0")


def ncnn_conv(threads: int, layer: ConvLayer, inputs: Inputs) -> Contender:
    """One convolution, with its sum and activation."""
    ncnn = installed("ncnn")
    outputs, _, kh, kw = layer.weight.shape
    (sh, sw), (ph, pw), (dh, dw) = layer.stride, layer.padding, layer.dilation
    kind = "Convolution" if layer.groups == 1 else "ConvolutionDepthWise"
    fused = {"relu": " 9=1", "relu6": " 9=3 -23310=2,0.0,6.0"}.get(layer.act, "") if len(inputs) == 1 else ""
    conv = f"0={outputs} 1={kw} 11={kh} 2={dw} 12={dh} 3={sw} 13={sh} 4={pw} 14={ph} 5={int(layer.bias is not None)}"
    conv += f" 6={layer.weight.numel()} 7={layer.groups}{fused}"
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
    with tempfile.TemporaryDirectory() as folder:
        text, weights = Path(folder) / "conv.param", Path(folder) / "conv.bin"
        text.write_text("\n".join(["7767517", f"{len(lines)} {blobs}", *lines, ""]))
        flag = b"\0\0\0\0"  # the weight follows as plain float32
        bias = b"" if layer.bias is None else layer.bias.detach().float().numpy().tobytes()
        weights.write_bytes(flag + layer.weight.detach().float().contiguous().numpy().tobytes() + bias)
        return _ncnn_run(ncnn, (text, weights), threads, inputs, [f"x{i}" for i in range(len(inputs))], last)


def _ncnn_run(
    ncnn: Any, files: Sequence[Path], threads: int, inputs: Inputs, names: Sequence[str], output: str
) -> Contender:
    samples = inputs[0].size(0)
    shared_out = threads > 1 and samples >= threads
    net = ncnn.Net()
    net.opt.num_threads = 1 if shared_out else threads
    for narrower in ("fp16_packed", "fp16_storage", "fp16_arithmetic", "bf16_packed", "bf16_storage"):
        setattr(net.opt, f"use_{narrower}", False)
    if net.load_param(str(files[0])) or net.load_model(str(files[1])):
        raise Unavailable("ncnn refused the model")
    # Blocked as ncnn's own layers hand it on: eight or sixteen channels together where the count allows.
    mats = [[_ncnn_packed(ncnn, net, t[n]) for t in inputs] for n in range(samples)]

    def run(images: Sequence[list[Any]]) -> list[Any]:
        results = []
        for image in images:
            extractor = net.create_extractor()
            for name, mat in zip(names, image, strict=True):
                extractor.input(name, mat)
            results.append(extractor.extract(output, 1)[1])  # 1: in its own layout
        return results

    def read(results: list[Any]) -> Tensor:
        plain = []
        for mat in results:
            flat = ncnn.Mat()
            ncnn.convert_packing(mat, flat, 1, net.opt)
            plain.append(torch.from_numpy(flat.numpy().copy()))
        return torch.stack(plain)

    call: Callable[[], list[Any]] = lambda: run(mats)  # noqa: E731
    if shared_out:
        pool = ThreadPoolExecutor(threads)
        bounds = [samples * i // threads for i in range(threads + 1)]
        parts = [mats[a:b] for a, b in itertools.pairwise(bounds)]
        call = lambda: [mat for part in pool.map(run, parts) for mat in part]  # noqa: E731
    return Contender(call, read)


def _ncnn_packed(ncnn: Any, net: Any, image: Tensor) -> Any:
    array = image.contiguous().numpy()  # kept: the first Mat only points to it
    plain = ncnn.Mat(array).clone()
    channels = image.shape[0]
    pack = next((p for p in (16, 8, 4) if image.dim() == 3 and channels % p == 0 and p <= _ncnn_lanes()), 1)
    if pack == 1:
        return plain
    packed = ncnn.Mat()
    ncnn.convert_packing(plain, packed, pack, net.opt)
    return packed


def _ncnn_lanes() -> int:
    return {"AVX512": 16, "AVX2": 8}.get(torch.backends.cpu.get_cpu_capability(), 4)


def to_onnx(module: nn.Module, inputs: Inputs, folder: str) -> Path:
    """The module as an ONNX file with inputs ``x0``, ``x1`` and output ``y``, shapes fixed."""
    installed("onnx")
    if any(t.dtype != torch.float32 for t in inputs):
        raise Unavailable("compared in float32 only")
    path = Path(folder) / "model.onnx"
    names = [f"x{i}" for i in range(len(inputs))]
    plain = tuple(t.contiguous() for t in inputs)
    # The exporter built on torch.export wants onnxscript besides; the older one writes all that a CNN needs.
    torch.onnx.export(module, plain, str(path), input_names=names, output_names=["y"], dynamo=False, verbose=False)
    return path
