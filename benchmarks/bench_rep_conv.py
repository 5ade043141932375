"""Single fused convolutions against what else runs them: the layers of RepVGG-A0 and B1, ResNets and MobileNets.

Two forms of ours: ``effkern`` finds the packed weight in the memo, ``effkern_packed`` is given a handle. Residual cases
add the block's input before the ReLU. Sizes are those of the output. ``group`` says which target a case belongs to.

Fused blocks are a depthwise and the pointwise convolution behind it, some with the one in front that widens their
input, in one call of ``rep_conv2d_chain``: against ``effkern, apart``, a call for each, and the peers.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import Bench, main, rounding
from benchmarks.layer import ConvLayer
from benchmarks.peers import conv_peers, module_peers
from effkern.ops import ConvStep, pack_conv_weight, rep_conv2d, rep_conv2d_chain, rep_conv2d_packed


@dataclass(frozen=True)
class Conv:
    """A convolution with ``size`` x ``size`` outputs."""

    name: str
    c_in: int
    c_out: int
    size: int
    kernel: int = 3
    stride: int = 1
    groups: int = 1
    act: str = "relu"
    residual: bool = False

    @property
    def group(self) -> str:
        """The line of the target table this layer belongs to; "" for layers without one."""
        if self.groups == self.c_in:
            return "depthwise large" if self.size >= 28 else "depthwise small"
        if self.kernel == 1 or self.groups > 1:
            return ""
        if self.stride == 2:
            return "3x3 stride 2"
        if self.c_in >= 48 and self.size >= 14:
            return "3x3 stride 1"
        return "512@7" if (self.c_in, self.size) == (512, 7) else ""


def depthwise(name: str, channels: int, size: int, stride: int = 1) -> Conv:
    """A 3x3 depthwise convolution of a MobileNet."""
    return Conv(name, channels, channels, size, stride=stride, groups=channels, act="relu6")


CONVS = (
    Conv("repvgg_a0_stem", 3, 48, 112, stride=2),
    Conv("repvgg_a0_stage1_down", 48, 48, 56, stride=2),
    Conv("repvgg_a0_stage1", 48, 48, 56),
    Conv("repvgg_a0_stage2_down", 48, 96, 28, stride=2),
    Conv("repvgg_a0_stage2", 96, 96, 28),
    Conv("repvgg_a0_stage3_down", 96, 192, 14, stride=2),
    Conv("repvgg_a0_stage3", 192, 192, 14),
    Conv("repvgg_a0_stage4_down", 192, 1280, 7, stride=2),
    Conv("repvgg_b1_stage1", 128, 128, 56),
    Conv("repvgg_b1_stage2", 256, 256, 28),
    Conv("repvgg_b1_stage3", 512, 512, 14),
    Conv("repvgg_b1g2_stage3", 512, 512, 14, groups=2),
    Conv("repvgg_b1g4_stage3", 512, 512, 14, groups=4),
    Conv("repvgg_b1_stage4_down", 512, 2048, 7, stride=2),
    Conv("resnet50_stem", 3, 64, 112, kernel=7, stride=2),
    Conv("resnet18_layer1_residual", 64, 64, 56, residual=True),
    Conv("resnet18_layer2_residual", 128, 128, 28, residual=True),
    Conv("resnet18_layer3_residual", 256, 256, 14, residual=True),
    Conv("resnet18_layer4_residual", 512, 512, 7, residual=True),
    Conv("resnet50_layer4_conv2", 512, 512, 7),
    Conv("resnet50_layer1_conv1", 256, 64, 56, kernel=1),
    Conv("resnet50_layer1_conv3_residual", 64, 256, 56, kernel=1, residual=True),
    Conv("resnet50_layer2_conv3_residual", 128, 512, 28, kernel=1, residual=True),
    Conv("resnet50_layer3_conv3_residual", 256, 1024, 14, kernel=1, residual=True),
    Conv("resnet50_layer4_conv3_residual", 512, 2048, 7, kernel=1, residual=True),
    Conv("mobilenetv2_expand", 24, 144, 56, kernel=1, act="relu6"),
    Conv("mobilenetv2_project_residual", 144, 24, 56, kernel=1, act="none", residual=True),
    Conv("mobilenetv2_head", 320, 1280, 7, kernel=1, act="relu6"),
    depthwise("mobilenetv1_dw32", 32, 112),
    depthwise("mobilenetv1_dw64_down", 64, 56, 2),
    depthwise("mobilenetv1_dw128", 128, 56),
    depthwise("mobilenetv1_dw256", 256, 28),
    depthwise("mobilenetv1_dw512", 512, 14),
    depthwise("mobilenetv1_dw1024", 1024, 7),
    depthwise("mobilenetv2_dw144", 144, 56),
    depthwise("mobilenetv2_dw192", 192, 28),
    depthwise("mobilenetv2_dw576", 576, 14),
    depthwise("mobilenetv2_dw960", 960, 7),
    Conv("cifar_16", 16, 16, 32, residual=True),
    Conv("cifar_32", 32, 32, 16, residual=True),
    Conv("cifar_64", 64, 64, 8, residual=True),
)
QUICK_CONVS = (
    Conv("quick_3x3_residual", 16, 16, 8, residual=True),
    Conv("quick_1x1", 16, 24, 8, kernel=1, act="relu6"),
    Conv("quick_depthwise", 16, 16, 8, groups=16),
)


@dataclass(frozen=True)
class Block:
    """A 3x3 depthwise convolution of ``channels`` and a pointwise one behind it, with ``size`` x ``size`` outputs.

    With ``c_in``, a pointwise convolution in front makes the channels of these.
    """

    name: str
    channels: int
    c_out: int
    size: int
    stride: int = 1
    c_in: int | None = None
    last: str = "none"

    def layers(self) -> list[ConvLayer]:
        """Its convolutions with random weights."""

        def layer(
            c_in: int, c_out: int, kernel: int, groups: int = 1, stride: int = 1, act: str = "relu6"
        ) -> ConvLayer:
            fan_in = c_in // groups * kernel**2
            weight = torch.randn(c_out, c_in // groups, kernel, kernel) * (2 / fan_in) ** 0.5
            return ConvLayer(weight, torch.randn(c_out), stride, kernel // 2, groups=groups, act=act)

        front = [] if self.c_in is None else [layer(self.c_in, self.channels, 1)]
        filters = layer(self.channels, self.channels, 3, self.channels, self.stride)
        return [*front, filters, layer(self.channels, self.c_out, 1, act=self.last)]

    def macs(self, samples: int) -> int:
        """Multiply-adds of a batch."""
        front = (self.c_in or 0) * (self.size * self.stride) ** 2
        return samples * self.channels * (front + (9 + self.c_out) * self.size**2)


BLOCKS = (
    Block("mobilenetv1_dw128_pw128", 128, 128, 56, last="relu6"),
    Block("mobilenetv1_dw512_pw512", 512, 512, 14, last="relu6"),
    Block("mobilenetv2_dw144_pw24", 144, 24, 56),
    Block("mobilenetv2_dw576_pw96", 576, 96, 14),
    Block("mobilenetv2_block_16_96_24_down", 96, 24, 56, stride=2, c_in=16),
    Block("mobilenetv2_block_24_144_24", 144, 24, 56, c_in=24),
)
QUICK_BLOCKS = (Block("quick_block", 16, 8, 6, c_in=4),)


def run_block(bench: Bench, case: Block, batch: int) -> None:
    """Two or three convolutions in one pass."""
    layers = case.layers()
    size = case.size * case.stride
    x = torch.randn(batch, case.c_in or case.channels, size, size).contiguous(memory_format=torch.channels_last)
    handles = [pack_conv_weight(layer.weight, layer.bias, layer.groups) for layer in layers]
    steps = [
        ConvStep(
            i, i, layer.weight.shape[0], (layer.weight.shape[2], layer.weight.shape[3]), layer.stride,
            layer.padding, groups=layer.groups, act=layer.act,
        )
        for i, layer in enumerate(layers)
    ]  # fmt: skip

    def apart() -> Tensor:
        y = x
        for handle, s in zip(handles, steps, strict=True):
            y = rep_conv2d_packed(
                y, handle, s.out_channels, s.kernel_size, s.stride, s.padding, s.dilation, s.groups, s.act
            )
        return y

    network = nn.Sequential(*layers)
    bench.compare(
        op="rep_conv2d_chain",
        case=case.name,
        batch=batch,
        contenders={
            "effkern": lambda: rep_conv2d_chain(x, handles, steps)[0],
            "effkern, apart": apart,
            **module_peers(bench, network, x),
        },
        exact=copy.deepcopy(network).double()(x.double()),
        macs=case.macs(batch),
        group="",
    )


def run_conv(bench: Bench, case: Conv, batch: int) -> None:
    """One layer at one batch size."""
    padding, size = case.kernel // 2, case.size * case.stride
    fan_in = case.c_in // case.groups * case.kernel**2
    weight = torch.randn(case.c_out, case.c_in // case.groups, case.kernel, case.kernel) / fan_in**0.5
    bias = torch.randn(case.c_out)
    x = torch.randn(batch, case.c_in, size, size).contiguous(memory_format=torch.channels_last)
    residual = None
    if case.residual:
        residual = torch.randn(batch, case.c_out, case.size, case.size).contiguous(memory_format=torch.channels_last)
    geometry = (case.stride, padding, 1, case.groups, case.act, residual)
    handle = pack_conv_weight(weight, bias, case.groups)
    layer = ConvLayer(weight, bias, case.stride, padding, groups=case.groups, act=case.act)
    tensors = (x, weight, bias, residual)
    activate = {"none": lambda z: z, "relu": F.relu, "relu6": F.relu6}[case.act]
    bench.compare(
        op="rep_conv2d",
        case=case.name,
        batch=batch,
        contenders={
            "effkern": lambda: rep_conv2d(x, weight, bias, *geometry),
            "effkern_packed": lambda: rep_conv2d_packed(x, handle, case.c_out, case.kernel, *geometry),
            **conv_peers(bench, layer, x, residual),
        },
        exact=activate(_sum(case, *tensors)),
        allowed=rounding(_sum(case, *(None if t is None else t.abs() for t in tensors))),
        macs=batch * case.c_out * fan_in * case.size**2,
        group=case.group,
    )


def _sum(case: Conv, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
    """The output before its activation, in fp64."""
    z = F.conv2d(x.double(), weight.double(), bias.double(), case.stride, case.kernel // 2, 1, case.groups)
    return z if residual is None else z + residual.double()


def run(bench: Bench) -> None:
    """All cases."""
    for batch in bench.choose((1, 8), quick=(1,)):
        for case in bench.choose(CONVS, quick=QUICK_CONVS):
            if bench.wants_case("rep_conv2d", case.name):
                run_conv(bench, case, batch)
        for block in bench.choose(BLOCKS, quick=QUICK_BLOCKS):
            if bench.wants_case("rep_conv2d_chain", block.name):
                run_block(bench, block, batch)


if __name__ == "__main__":
    main("rep_conv", run, seconds=1.5)
