"""Sliced convolution: layers of MobileNetV1 and DS-Net over their widths, uniform and mixed, against what torch can do.

Uniform: our one packed weight runs at every width; each peer has the narrow layer to itself, sliced out beforehand and
laid out as it likes best. ``effkern, all`` is the layer at full width, the denominator of "time left".

Mixed: every sample of a batch has its own width.

    loop     for every width in the batch: index_select its samples, run the narrow layer, index_copy
    masked   the full width for every sample, then zeros past each sample's width: what DS-Net's released code does
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import Bench, main, rounding
from benchmarks.layer import ConvLayer
from benchmarks.peers import conv_peers
from effkern.ops import pack_conv_weight, sliced_conv2d_packed, sliced_conv2d_ragged_packed
from effkern.ops.sliced_conv import reference

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
CHANNELS_LAST = torch.channels_last


@dataclass(frozen=True)
class Layer:
    """A layer at full width on a map of ``size`` x ``size``, and the widths (inputs, outputs) it runs at."""

    name: str
    size: int
    widths: tuple[tuple[int, int], ...]
    kernel: int = 1
    stride: int = 1
    depthwise: bool = False

    @property
    def full(self) -> tuple[int, int]:
        return self.widths[-1]

    @property
    def padding(self) -> int:
        return self.kernel // 2

    @property
    def groups(self) -> int:
        return self.full[0] if self.depthwise else 1

    def macs(self, c_in: int, c_out: int) -> int:
        """Multiply-adds of one sample."""
        out = (self.size + 2 * self.padding - self.kernel) // self.stride + 1
        return out**2 * self.kernel**2 * c_out * (1 if self.depthwise else c_in)


def mobilenet(c_in: int, c_out: int, size: int, **options: object) -> Layer:
    """A layer of MobileNetV1 at widths 0.25, 0.5, 0.75 and 1."""
    widths = tuple((c_in * m // 4, c_out * m // 4) for m in (1, 2, 3, 4))
    layer = Layer(f"mobilenet {c_in}-{c_out}@{size}", size, widths)
    return replace(layer, **options)  # type: ignore[arg-type]


def dsnet(channels: Sequence[int], size: int, kernel: int = 1, depthwise: bool = False) -> Layer:
    """A layer of a gated stage of DS-Net, as many channels in as out."""
    kind = "dw" if depthwise else f"{kernel}x{kernel}"
    name = f"dsnet {kind} {channels[-1]}@{size}"
    return Layer(name, size, tuple((c, c) for c in channels), kernel, depthwise=depthwise)


def depthwise(channels: int, size: int, stride: int = 1) -> Layer:
    """A 3x3 depthwise layer of MobileNetV1."""
    name = f"mobilenet dw {channels}@{size}/{stride}"
    return mobilenet(channels, channels, size, name=name, kernel=3, stride=stride, depthwise=True)


STAGE_4, STAGE_5 = (224, 320, 480, 640), (736, 864, 1024, 1152)  # four of the fourteen widths each
LAYERS = (
    mobilenet(32, 64, 112),
    depthwise(64, 112, 2),
    mobilenet(128, 128, 56),
    depthwise(128, 56),
    mobilenet(256, 256, 28),
    depthwise(256, 28),
    mobilenet(512, 512, 14),
    depthwise(512, 14),
    mobilenet(1024, 1024, 7),
    dsnet(STAGE_4, 14),
    dsnet(STAGE_4, 14, 3, depthwise=True),
    dsnet(STAGE_5, 7),
    mobilenet(64, 64, 14, name="3x3 64@14", kernel=3),
    mobilenet(128, 128, 28, name="3x3 128@28", kernel=3),
)
MIXED = (dsnet(STAGE_4, 14), dsnet(STAGE_5, 7), mobilenet(64, 64, 14, name="3x3 64@14", kernel=3))
QUICK = (mobilenet(16, 24, 6, name="pointwise"), mobilenet(8, 8, 6, name="3x3", kernel=3), depthwise(16, 6))


@dataclass
class Tensors:
    """Weight, bias and the batch norm of one width, as scale and shift, of a layer at full width."""

    weight: Tensor
    scale: Tensor
    shift: Tensor

    @staticmethod
    def of(layer: Layer) -> Tensors:
        c_in, c_out = layer.full
        per_group = 1 if layer.depthwise else c_in
        weight = torch.randn(c_out, per_group, layer.kernel, layer.kernel)
        weight /= (per_group * layer.kernel**2) ** 0.5
        return Tensors(weight, torch.rand(c_out) + 0.5, torch.randn(c_out))

    def narrow(self, layer: Layer, c_in: int, c_out: int) -> ConvLayer:
        """The layer at one width with the batch norm folded in, for the peers."""
        part, groups = reference.slice_weight(self.weight, c_in, c_out, layer.groups, "prefix_groups")
        folded = part * self.scale[:c_out, None, None, None]
        geometry = {"stride": layer.stride, "padding": layer.padding, "groups": groups}
        return ConvLayer(folded, self.shift[:c_out], act="relu", **geometry)


def input_of(layer: Layer, samples: int, c_in: int) -> Tensor:
    """Random channels up to ``c_in`` and zeros after: the full width then gives the same leading outputs."""
    x = torch.zeros(samples, layer.full[0], layer.size, layer.size).to(memory_format=CHANNELS_LAST)
    x[:, :c_in].normal_()
    return x


def bench_uniform(bench: Bench, layer: Layer, samples: int, index: int) -> None:
    """The whole batch at one width."""
    c_in, c_out = layer.widths[index]
    if not bench.wants_case("sliced_conv2d", f"{layer.name} width {c_in}-{c_out}"):
        return
    tensors = Tensors.of(layer)
    handle = pack_conv_weight(tensors.weight, None, layer.groups)
    wide = input_of(layer, samples, c_in)
    x = wide[:, :c_in].contiguous(memory_format=CHANNELS_LAST)

    def ours(x: Tensor, outs: int) -> Tensor:
        return sliced_conv2d_packed(
            x, handle, layer.full[1], layer.kernel, outs, layer.stride, layer.padding, groups=layer.groups,
            scale=tensors.scale, shift=tensors.shift, act="relu",
        )[:, :c_out]  # fmt: skip

    contenders: dict[str, Callable[[], Tensor]] = {
        "effkern": lambda: ours(x, c_out),
        "effkern, all": lambda: ours(wide, layer.full[1]),
        **conv_peers(bench, tensors.narrow(layer, c_in, c_out), x),
    }
    pair = [[v] * 2 for v in (layer.stride, layer.padding, 1)]
    options = (c_out, *pair, layer.groups, "prefix_groups")
    values = [t.double() for t in (x, tensors.weight, tensors.scale, tensors.shift)]
    a, w, scale, shift = values
    exact = reference.sliced_conv2d(a, w, None, *options, scale, shift, "relu", "auto")
    a, w, scale, shift = (v.abs() for v in values)
    size = reference.sliced_conv2d(a, w, None, *options, scale, shift, "none", "auto")
    bench.compare(
        op="sliced_conv2d",
        case=f"{layer.name} width {c_in}-{c_out}",
        contenders=contenders,
        batch=samples,
        exact=exact,
        allowed=rounding(size),
        macs=samples * layer.macs(*layer.full),
        macs_done=samples * layer.macs(c_in, c_out),
        dense="effkern, all",
        width=c_out,
    )


DRAWS: dict[str, tuple[int, ...]] = {  # weights of the widths, slimmest first
    "even": (1, 1, 1, 1),
    "skewed": (5, 2, 1, 0),
    "single": (0, 1, 0, 0),
}


def draw(name: str, samples: int) -> Tensor:
    """Width indices in random order, as near to the weights of the draw as whole samples allow."""
    weights = torch.tensor(DRAWS[name], dtype=torch.double)
    bounds = (weights.cumsum(0) / weights.sum() * samples).round().long()
    index = torch.bucketize(torch.arange(samples), bounds, right=True)
    return index[torch.randperm(samples)]


def loop(x: Tensor, index: Tensor, layers: list[ConvLayer], widths: Sequence[tuple[int, int]]) -> Tensor:
    """The narrow layer of every width on its own samples."""
    y = None
    for i, (c_in, c_out) in enumerate(widths):
        rows = (index == i).nonzero().flatten()
        if not len(rows):
            continue
        part = layers[i](x[:, :c_in].index_select(0, rows).contiguous(memory_format=CHANNELS_LAST))
        if y is None:
            shape = (len(x), widths[-1][1], *part.shape[2:])
            y = torch.zeros(shape).to(memory_format=CHANNELS_LAST)
        y[:, :c_out].index_copy_(0, rows, part)
    assert y is not None
    return y


def bench_mixed(bench: Bench, layer: Layer, samples: int, name: str) -> None:
    """A width a sample."""
    if not bench.wants_case("sliced_conv2d_ragged", f"{layer.name} {name}"):
        return
    tensors = Tensors.of(layer)
    handle = pack_conv_weight(tensors.weight, None, layer.groups)
    index = draw(name, samples)
    table = torch.tensor(layer.widths)
    c_in, c_out = table[index].unbind(1)
    active_in, active_out = (torch.arange(full) < c[:, None] for full, c in zip(layer.full, (c_in, c_out), strict=True))
    x = input_of(layer, samples, layer.full[0]) * active_in[:, :, None, None]
    rows = torch.zeros(samples, dtype=torch.int64)  # the width's own batch norm; here all widths have the same
    scale, shift = tensors.scale[None], tensors.shift[None]
    narrow = [tensors.narrow(layer, *pair).to(memory_format=CHANNELS_LAST) for pair in layer.widths]
    full = {key: tensors.narrow(layer, *layer.full).to(memory_format=layout) for key, layout in LAYOUTS.items()}

    def ours(c_in: Tensor, c_out: Tensor) -> Tensor:
        return sliced_conv2d_ragged_packed(
            x, handle, layer.full[1], layer.kernel, c_in, c_out, None, layer.stride, layer.padding,
            groups=layer.groups, scale_table=scale, shift_table=shift, width_idx=rows, act="relu",
        )  # fmt: skip

    widest = [torch.full_like(index, c) for c in layer.full]
    mask = active_out[:, :, None, None].float()
    contenders: dict[str, Callable[[], Tensor]] = {
        "effkern": lambda: ours(c_in, c_out),
        "effkern, all": lambda: ours(*widest) * mask,
    }
    if bench.wants("loop"):
        contenders["loop"] = lambda: loop(x, index, narrow, layer.widths)
    if bench.wants("masked"):
        for key, layout in LAYOUTS.items():
            laid = x.to(memory_format=layout)
            contenders[f"masked_{key}"] = lambda run=full[key], x=laid: run(x) * mask
    wide = F.conv2d(
        x.double(), tensors.weight.double(), None, layer.stride, layer.padding, 1, layer.groups
    )  # inactive inputs are zero, so the full width has the right sums
    exact = (wide * tensors.scale.double()[:, None, None] + tensors.shift.double()[:, None, None]).relu() * mask
    size = F.conv2d(x.double().abs(), tensors.weight.double().abs(), None, layer.stride, layer.padding, 1, layer.groups)
    size = size * tensors.scale.double()[:, None, None] + tensors.shift.double().abs()[:, None, None]
    bench.compare(
        op="sliced_conv2d_ragged",
        case=f"{layer.name} {name}",
        contenders=contenders,
        batch=samples,
        exact=exact,
        allowed=rounding(size),
        macs=samples * layer.macs(*layer.full),
        macs_done=sum(layer.macs(*layer.widths[i]) for i in index.tolist()),
        dense="effkern, all",
        draw=name,
    )


def run(bench: Bench) -> None:
    """Uniform widths at batch 1 and 8, mixed ones at 32."""
    for layer in bench.choose(LAYERS, QUICK):
        for samples in bench.choose((1, 8), (2,)):
            # In between the first and the last width lie no surprises that the networks would not show.
            for index in bench.choose((0, 1) if samples == 1 else (1,), (1,)):
                bench_uniform(bench, layer, samples, index)
    for layer in bench.choose(MIXED, QUICK[:2]):
        for samples in bench.choose((32,), (8,)):
            for name in DRAWS:
                bench_mixed(bench, layer, samples, name)


if __name__ == "__main__":
    main("sliced_conv", run, seconds=1.5)
