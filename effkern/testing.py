"""What tests of an op need, ours and yours: named samples, fp64 oracles, bounds scaled by the data.

Rounding follows Higham: a sum of products computed in fp32 in any order differs from the exact one by at most
``gamma * A`` with ``A`` the same sum over absolute values. We assert ``16 * u * A`` (u = 2**-24), which the direct
algorithms keep for reductions of up to 8192 terms of like size (34 u were seen where single terms are 10000 times the
others, 20 u with torch), plus one rounding of the result for 16-bit storage.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

#: Unit roundoff: half the distance from 1 to the next number.
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
DIRECT_LIMIT = 16.0


@dataclass(frozen=True)
class Sample:
    """One named call of an op, for tests and benchmarks.

    Attributes:
        name: what is special about it, unique within the op.
        op: the public function.
        reference: the same function in plain PyTorch with the operator's own arguments; takes fp64.
        args: the operator's positional arguments, all of them, as ``torch.ops.effkern.<op>`` takes them.
        magnitude: ``A`` of the bound: the reference over absolute values without activation, in fp64; for several
            results one for all of them or one each.
        requires_grad: names of the arguments to differentiate.
        tags: what a general test must know: ``"sums_over_batch"``, a result has no batch dimension; ``"any_rank"``, the
            first argument takes any leading dimensions; ``"nan_meets_padding"``, whether NaN times a pad's zero counts
            is left open.
    """

    name: str
    op: Any
    reference: Callable[..., Any]
    args: tuple
    magnitude: Callable[..., Any] | None = None
    requires_grad: tuple[str, ...] = ()
    tags: frozenset[str] = field(default_factory=frozenset)

    def named_args(self) -> dict[str, Any]:
        """The arguments by the names of the operator's schema."""
        return dict(zip(self.op.arguments, self.args, strict=True))


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Applies a function to every tensor in a (nested) list or tuple of arguments."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, list | tuple):
        return type(value)(map_tensors(function, v) for v in value)
    return value


def to_double(args: tuple) -> tuple:
    """Floating-point tensors as fp64: the oracle sees the very same (rounded) numbers."""
    return map_tensors(lambda t: t.detach().double() if t.is_floating_point() else t, args)


def direct_bound(magnitude: Tensor, exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Largest allowed ``|y - exact|`` per element for a direct algorithm with fp32 sums and one final rounding."""
    bound = DIRECT_LIMIT * UNIT[torch.float32] * magnitude.double()
    if dtype in (torch.bfloat16, torch.float16):
        smallest = torch.finfo(dtype).tiny * UNIT[dtype]  # of a subnormal result
        bound = bound + UNIT[dtype] * (exact.abs() + bound) + smallest
    return bound


def winograd_excess(
    x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int,
    algo: str,
) -> Tensor | float:  # fmt: skip
    """What to add to A = conv(|x|, |w|), for :func:`direct_bound`, where a Winograd form may be chosen.

    A Winograd output depends on the whole of its tile, also where its own receptive field is zero. It errs by at most
    12 u T for F(4,3) and 4 u T for F(2,3) and F(3,3), where T is the sum over channels of the largest ``|x|`` in the
    input tile times the sum of ``|w|``. Returns, in units of the direct bound, by how much the largest of these
    exceeds A; 0 for calls that are always direct. Not differentiable: gradients have their own A.
    """
    rows, columns = weight.shape[2:]
    steps = tuple(stride)
    if algo != "auto" or (rows, columns) != (3, 3) or tuple(dilation) != (1, 1) or steps not in ((1, 1), (2, 2)):
        return 0.0
    x, weight = x.detach().double().abs(), weight.detach().double().abs()
    direct = F.conv2d(x, weight, None, steps, tuple(padding), 1, groups)
    height, width = direct.shape[2:]
    excess = torch.zeros_like(direct)
    for tile, limit in ((4, 12.0), (2, 4.0)) if steps == (1, 1) else ((3, 4.0),):
        step, side = tile * steps[0], (tile - 1) * steps[0] + 3
        down, right = ((-(-size // tile) - 1) * step + side for size in (height, width))
        top, left = padding
        padded = F.pad(x, (left, max(right - left - x.size(3), 0), top, max(down - top - x.size(2), 0)))
        largest = F.max_pool2d(padded[:, :, :down, :right], side, step)
        size = F.conv2d(largest, weight.sum((2, 3), keepdim=True), groups=groups)
        size = size.repeat_interleave(tile, 2)[:, :, :height].repeat_interleave(tile, 3)[:, :, :, :width]
        excess = torch.maximum(excess, limit / DIRECT_LIMIT * size - direct)
    return excess


def assert_within(actual: Tensor, exact: Tensor, bound: Tensor, what: str = "") -> None:
    """One line of blame: the worst element in units of its bound."""
    if actual.shape != exact.shape:
        raise AssertionError(f"{what}: shape {list(actual.shape)}, expected {list(exact.shape)}")
    if actual.numel() == 0:
        return
    error = (actual.double() - exact).abs()
    same_nan = actual.isnan() & exact.isnan()
    ratio = torch.where(same_nan, 0.0, error / bound.clamp_min(torch.finfo(torch.float64).tiny))
    worst = int(torch.nan_to_num(ratio, nan=float("inf")).argmax())
    value = float(ratio.flatten()[worst])
    if not value <= 1:
        index = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), ratio.shape))
        raise AssertionError(
            f"{what}: error {float(error.flatten()[worst]):.3g} is {value:.3g} times the bound at {index} "
            f"(got {float(actual.flatten()[worst]):.9g}, exact {float(exact.flatten()[worst]):.9g})"
        )


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The same values, 4-d or 2-d, as they may lie in memory: every one a supported input."""
    if x.dim() == 2:
        n, c = x.shape
        wide = torch.full((n + 1, c + 5), float("nan"), dtype=x.dtype)
        wide[1:, 2 : c + 2] = x
        return {"contiguous": x.contiguous(), "slice": wide[1:, 2 : c + 2], "transposed": x.t().contiguous().t()}
    n, c, h, w = x.shape
    wide = torch.full((n, c + 5, h, w), float("nan"), dtype=x.dtype).contiguous(memory_format=torch.channels_last)
    wide[:, :c] = x
    offset = torch.full((n + 1, c + 2, h, w), float("nan"), dtype=x.dtype)
    offset[1:, 2:] = x
    padded = torch.full((n, c, h + 2, w + 3), float("nan"), dtype=x.dtype)
    padded[:, :, 1:-1, 2:-1] = x
    return {
        "contiguous": x.contiguous(),
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "channel_slice": wide[:, :c],
        "offset": offset[1:, 2:],
        "spatial_slice": padded[:, :, 1:-1, 2:-1],
        "transposed": x.transpose(2, 3).contiguous().transpose(2, 3),
    }


def public_parameters(function: Callable) -> list[str]:
    """Names of a function's parameters."""
    return list(inspect.signature(function).parameters)
