"""Gradients of convolutions, in the input and in the weight together, against PyTorch's in both layouts.

The layers are those of training: RepVGG-A0, the residual blocks of CIFAR ResNets, the pointwise layers of ResNet-50
and the depthwise layers of MobileNets. Sizes are those of the output; the first result is compared, the gradient in x.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.common import Bench, main
from effkern.ops._conv_backward import conv2d_backward, reference
from effkern.ops._conv_backward.samples import magnitude

LAYOUTS = {"eager_contiguous": torch.contiguous_format, "eager_channels_last": torch.channels_last}


@dataclass(frozen=True)
class Layer:
    """A convolution with ``size`` x ``size`` outputs, and its batch."""

    name: str
    batch: int
    c_in: int
    c_out: int
    size: int
    kernel: int = 3
    stride: int = 1
    groups: int = 1


LAYERS = (
    Layer("repvgg_a0_stem", 8, 3, 48, 112, stride=2),
    Layer("repvgg_a0_stage1_down", 8, 48, 48, 56, stride=2),
    Layer("repvgg_a0_stage1", 8, 48, 48, 56),
    Layer("repvgg_a0_stage2_down", 8, 48, 96, 28, stride=2),
    Layer("repvgg_a0_stage2", 8, 96, 96, 28),
    Layer("repvgg_a0_stage3_down", 8, 96, 192, 14, stride=2),
    Layer("repvgg_a0_stage3", 8, 192, 192, 14),
    Layer("repvgg_a0_stage4_down", 8, 192, 1280, 7, stride=2),
    *(
        Layer(f"cifar_{name}", batch, c_in, c_out, size, stride=stride)
        for batch in (32, 128)
        for name, c_in, c_out, size, stride in (
            ("16", 16, 16, 32, 1),
            ("16_down", 16, 32, 16, 2),
            ("32", 32, 32, 16, 1),
            ("32_down", 32, 64, 8, 2),
            ("64", 64, 64, 8, 1),
        )
    ),
    Layer("resnet50_layer1_conv1", 8, 256, 64, 56, kernel=1),
    Layer("resnet50_layer1_conv3", 8, 64, 256, 56, kernel=1),
    Layer("resnet50_layer2_conv3", 8, 128, 512, 28, kernel=1),
    Layer("resnet50_layer3_conv3", 8, 256, 1024, 14, kernel=1),
    Layer("resnet50_layer4_conv1", 8, 2048, 512, 7, kernel=1),
    Layer("resnet50_layer4_conv3", 8, 512, 2048, 7, kernel=1),
    Layer("resnet50_layer2_downsample", 8, 256, 512, 28, kernel=1, stride=2),
    Layer("resnet50_layer4_conv2", 8, 512, 512, 7),
    Layer("mobilenetv2_depthwise_144", 8, 144, 144, 56, groups=144),
    Layer("mobilenetv1_depthwise_256", 8, 256, 256, 28, groups=256),
    Layer("mobilenetv1_depthwise_512", 8, 512, 512, 14, groups=512),
    Layer("mobilenetv1_depthwise_64_down", 8, 64, 64, 56, stride=2, groups=64),
)
QUICK_LAYERS = (Layer("quick_3x3", 2, 16, 16, 8), Layer("quick_down", 2, 8, 24, 8, stride=2))


def run_layer(bench: Bench, layer: Layer) -> None:
    """Both gradients of one layer."""
    padding, size = layer.kernel // 2, layer.size * layer.stride
    weight = torch.randn(layer.c_out, layer.c_in // layer.groups, layer.kernel, layer.kernel)
    x, gy = torch.randn(layer.batch, layer.c_in, size, size), torch.randn(layer.batch, layer.c_out, *[layer.size] * 2)
    geometry = ([layer.stride] * 2, [padding] * 2, [1, 1])
    options = (*geometry, layer.groups, "within_group", "none")
    needs = [True, True, False, False]

    def eager(form: torch.memory_format) -> object:
        tensors = [t.contiguous(memory_format=form) for t in (gy, x, weight)]
        call = torch.ops.aten.convolution_backward.default
        return lambda: call(*tensors, None, *geometry, False, [0, 0], layer.groups, [True, True, False])

    ours = [t.contiguous(memory_format=torch.channels_last) for t in (gy, x)]
    doubles = (gy.double(), None, x.double(), weight.double())
    # Winograd's error is bounded by whole tiles; for the values drawn here 16 times the direct bound contains it.
    allowed = 16 * 16 * 2.0**-24 * magnitude(*doubles, *options, "auto", needs)[0]
    bench.compare(
        op="conv2d_backward",
        case=layer.name,
        batch=layer.batch,
        contenders={
            "effkern": lambda: conv2d_backward(ours[0], None, ours[1], weight, *options, "auto", needs),
            **{name: eager(form) for name, form in LAYOUTS.items() if bench.wants(name)},
        },
        exact=reference.conv2d_backward(*doubles, *options, "auto", needs)[0],
        allowed=allowed,
        macs=2 * gy.numel() * weight[0].numel(),
    )


def run(bench: Bench) -> None:
    """All layers."""
    for layer in bench.choose(LAYERS, quick=QUICK_LAYERS):
        run_layer(bench, layer)


if __name__ == "__main__":
    main("backward", run)
