"""What a call costs beside its work: a 3x3 convolution of a 1x8x4x4 input, through every form, against ``F.conv2d``."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from benchmarks.common import Bench, main
from effkern.ops import (
    pack_conv_weight,
    pq_conv2d,
    pq_decode,
    rep_conv2d,
    rep_conv2d_packed,
    sliced_conv2d,
    sliced_conv2d_packed,
)


def run(bench: Bench) -> None:
    """One contest: all ops that can do this convolution."""
    x = torch.randn(1, 8, 4, 4)
    x_last = x.contiguous(memory_format=torch.channels_last)
    codes, book = torch.randint(16, (8, 8), dtype=torch.uint8), torch.randn(1, 16, 9) / 9
    weight, bias = pq_decode(codes, book).reshape(8, 8, 3, 3), torch.randn(8)
    weight_last = weight.contiguous(memory_format=torch.channels_last)
    handle = pack_conv_weight(weight, bias)
    window = {"kernel_size": 3, "padding": 1}
    double = (x.double(), weight.double(), bias.double())
    bench.compare(
        op="call",
        case="1x8x4x4",
        batch=1,
        contenders={
            "effkern rep_conv2d": lambda: rep_conv2d(x_last, weight, bias, 1, 1, act="none"),
            "effkern rep_conv2d_packed": lambda: rep_conv2d_packed(x_last, handle, 8, 3, 1, 1, act="none"),
            "effkern sliced_conv2d": lambda: sliced_conv2d(x_last, weight, bias, c_out=8, padding=1),
            "effkern sliced_conv2d_packed": lambda: sliced_conv2d_packed(x_last, handle, 8, 3, 8, 1, 1),
            "effkern pq_conv2d": lambda: pq_conv2d(x_last, codes, book, None, bias, **window),
            "eager_contiguous": lambda: F.conv2d(x, weight, bias, 1, 1),
            "eager_channels_last": lambda: F.conv2d(x_last, weight_last, bias, 1, 1),
        },
        exact=F.conv2d(*double, 1, 1),
        allowed=1e-4,
        judged=("eager_contiguous", "eager_channels_last"),
        macs=8 * 8 * 9 * 16,
    )


if __name__ == "__main__":
    main("overhead", run, seconds=4)
