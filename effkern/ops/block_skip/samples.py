"""Named inputs of block skipping, for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from effkern.ops.block_skip import _compact, _skip_basic_block, _skip_bottleneck, _skip_stage, reference
from effkern.testing import Sample, map_tensors


def _positive(x: Tensor, keep: Tensor, weights: Any, biases: Any, stride: int, res: Tensor) -> Tensor:
    """One kept block without activation. All values are positive, so nothing cancels, in gradients neither."""
    new = reference.branch(x, weights, biases, stride, "none") + res if x.numel() else res
    gate = keep.double().view(-1, 1, 1, 1)
    return new + (gate - gate.detach()) * (new + res)  # adds 0; the gradient of a gate is <gy, new - res>


def _double(args: tuple) -> Any:
    x, keep, *rest = args
    # keep is not negative anyway, and abs has slope 0 at 0.
    return [x.double().abs(), keep, *map_tensors(lambda t: t.double().abs() if t.is_floating_point() else t, rest)]


def magnitude(*args: Any) -> Tensor:
    """A of the error bound for one block, once for each convolution.

    Every convolution adds an error within the bound of its own sums, which reaches the result through the later ones.
    """
    x, keep, *tensors, stride, res, _, _ = _double(args)
    weights, biases = tensors[::2], tensors[1::2]
    return len(weights) * _positive(x, keep, weights, biases, stride, x if res is None else res)


def stage_magnitude(*args: Any) -> Tensor:
    """A of the error bound for a stage: as for one block, with the convolutions of all blocks in the chain."""
    x, keep, weights, biases, kind, _, _ = _double(args)
    n = reference.CONVS[kind]
    for k in range(keep.shape[1]):
        x = _positive(x, keep[:, k], weights[n * k : n * k + n], biases[n * k : n * k + n], 1, x)
    return max(1, len(weights)) * x


def samples(dtype: torch.dtype = torch.float32) -> Iterator[Sample]:
    """Small inputs that reach every path: hard and soft masks, none and all kept, strides, shortcuts, tails."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).to(dtype)

    def weight(out: int, into: int, kernel: int) -> Tensor:
        return (torch.randn(out, into, kernel, kernel, generator=random) / (into * kernel**2) ** 0.5).to(dtype)

    def mask(text: str) -> Tensor:
        return torch.tensor([c == "1" for c in text])

    def basic(
        name: str, n: int, c: int, size: tuple[int, int], keep: Tensor, inner: int | None = None,
        out: int | None = None, stride: int = 1, act: str = "relu",
    ) -> Sample:  # fmt: skip
        inner, outs = inner or c, out or c
        h, w = size
        res = normal(n, outs, -(-h // stride), -(-w // stride)) if out else None
        args = (
            normal(n, c, h, w), keep, weight(inner, c, 3), normal(inner), weight(outs, inner, 3), normal(outs),
            stride, res, act, "auto",
        )  # fmt: skip
        grads = (
            "x",
            "w1",
            "b1",
            "w2",
            "b2",
            *(("res",) if out else ()),
            *(("keep",) if keep.is_floating_point() else ()),
        )
        return Sample(name, _skip_basic_block, reference.skip_basic_block, args, magnitude, grads)

    def bottleneck(
        name: str, n: int, c: int, inner: int, keep: Tensor, out: int | None = None, stride: int = 1
    ) -> Sample:
        outs = out or c
        res = normal(n, outs, -(-7 // stride), -(-6 // stride)) if out else None
        args = (
            normal(n, c, 7, 6), keep, weight(inner, c, 1), normal(inner), weight(inner, inner, 3), normal(inner),
            weight(outs, inner, 1), normal(outs), stride, res, "relu", "auto",
        )  # fmt: skip
        grads = ("x", "w1", "b1", "w2", "b2", "w3", "b3", *(("res",) if out else ()))
        return Sample(name, _skip_bottleneck, reference.skip_bottleneck, args, magnitude, grads)

    def stage(name: str, n: int, c: int, keep: Tensor, kind: str = "basic", act: str = "relu") -> Sample:
        blocks = keep.shape[1]
        shapes = [(c, c, 3)] * 2 if kind == "basic" else [(c // 4, c, 1), (c // 4, c // 4, 3), (c, c // 4, 1)]
        weights = [weight(*shape) for _ in range(blocks) for shape in shapes]
        biases = [normal(w.shape[0]) for w in weights]
        args = (normal(n, c, 6, 5), keep, weights, biases, kind, act, "auto")
        grads = ("x", "weights", "biases", *(("keep",) if keep.is_floating_point() else ()))
        return Sample(name, _skip_stage, reference.skip_stage, args, stage_magnitude, grads)

    soft = torch.tensor([0.0, 0.25, 1.0, 0.875])
    yield basic("some_kept", 5, 16, (8, 8), mask("10110"))
    yield basic("none_kept", 3, 8, (5, 5), mask("000"))
    yield basic("all_kept", 3, 8, (5, 5), torch.ones(3, dtype=torch.uint8))
    yield basic("hard_float", 4, 5, (6, 7), torch.tensor([1.0, 0.0, 0.0, 1.0]))
    yield basic("soft", 4, 9, (6, 7), soft)
    yield basic("shortcut_stride_2", 4, 6, (9, 8), mask("0110"), inner=11, out=19, stride=2)
    yield basic("soft_shortcut", 4, 6, (5, 4), soft, out=10)
    yield basic("wide_inside", 2, 17, (4, 4), mask("01"), inner=33, act="silu")
    yield basic("soft_hardswish", 4, 4, (5, 5), soft, act="hardswish")
    yield basic("relu6", 3, 4, (5, 5), mask("110"), act="relu6")
    yield basic("one_channel", 3, 1, (5, 5), mask("101"))
    yield basic("one_pixel", 4, 20, (1, 1), mask("1011"))
    yield basic("empty_batch", 0, 4, (5, 5), mask(""))
    yield bottleneck("bottleneck", 4, 24, 6, mask("1101"))
    yield bottleneck("bottleneck_stride_2", 3, 8, 5, mask("011"), out=20, stride=2)
    yield stage("stage", 5, 16, torch.rand(5, 3, generator=random) < 0.5)
    yield stage("stage_soft", 4, 6, torch.stack([soft, soft.flip(0), torch.ones(4)], 1))
    yield stage("stage_bottleneck", 3, 12, torch.rand(3, 2, generator=random) < 0.7, kind="bottleneck", act="silu")
    yield stage("stage_no_blocks", 2, 4, torch.ones(2, 0, dtype=torch.bool))
    yield stage("stage_empty_batch", 0, 4, torch.ones(0, 2, dtype=torch.bool))
    for name, keep in (
        ("compact", mask("0110101")),
        ("compact_many", torch.rand(6, 4, generator=random) < 0.5),
        ("compact_soft", soft),
        ("compact_nothing", mask("")),
    ):
        yield Sample(name, _compact, reference.compact, (keep,))
