"""Random calls of the twins in the interpreter beyond the catalog: tails of tiles, ragged lists, masks, ranges."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from effkern.ops._registry import OPS
from effkern.testing import Sample, layouts, to_double
from tests.ops.catalog import every_sample

COUNT = 12


def _map(r: random.Random, n: int, c: int, side: int) -> Tensor:
    x = torch.randn(n, c, side, side + r.randrange(3))
    return r.choice(list(layouts(x).values()))


def _like(name: str, args: tuple) -> Sample:
    """A sample with the bound of the catalog's samples of that op."""
    model = next(s for s in every_sample().values() if s.op.name == name)
    return Sample("random", model.op, model.reference, args, model.magnitude)


def ragged() -> Iterator[Sample]:
    """Classes of every size, none included, more samples than a block of the schedule, tiles across samples."""
    for seed in range(COUNT):
        r = random.Random(seed)
        torch.manual_seed(seed)
        n = r.choice([1, 3, 9, 70, 140])
        c, co = r.randrange(1, 40), r.randrange(1, 80)
        kernel, side = (1, r.choice([1, 2, 7])) if r.random() < 0.5 else (3, r.choice([3, 5]))
        classes = [(r.randrange(c + 1), r.randrange(co + 1)) for _ in range(r.randrange(1, 5))]
        drawn = [r.choice(classes) for _ in range(n)]
        kind = r.choice([torch.int32, torch.int64])
        c_in, c_out = (torch.tensor([d[i] for d in drawn], dtype=kind) for i in range(2))
        x, weight = _map(r, n, c, side), torch.randn(co, c, kernel, kernel)
        tables = (torch.randn(3, co), torch.randn(3, co + 2), torch.randint(0, 3, (n,)))
        pad = [kernel // 2, kernel // 2]
        args = (x, weight, torch.randn(co), c_in, c_out, co, [r.randrange(1, 3), 1], pad, [1, 1], 1, "prefix_groups",
                *(tables if r.random() < 0.5 else (None,) * 3), r.choice(["none", "relu", "silu"]), "auto",
                r.random() < 0.7)  # fmt: skip
        # What is behind a sample's prefix is NaN: nothing may come of it.
        for i, width in enumerate(c_in.tolist()):
            x[i, width:] = float("nan")
        yield _like("sliced_conv2d_ragged", args)


def skip() -> Iterator[Sample]:
    """Masks of every density on batches of more than a tile; the dropped samples hold NaN in x."""
    for seed in range(COUNT):
        r = random.Random(seed)
        torch.manual_seed(seed)
        n, c, mid, side = r.choice([1, 5, 40]), r.randrange(1, 20), r.randrange(1, 20), r.randrange(1, 6)
        keep = (torch.rand(n) < r.choice([0.0, 0.3, 1.0])).float()
        if r.random() < 0.5:
            keep = keep * torch.rand(n)
        x, res = _map(r, n, c, side), None
        if r.random() < 0.5:
            res = torch.randn(x.shape)
            x[keep == 0] = float("nan")
        weights = (torch.randn(mid, c, 3, 3), torch.randn(mid), torch.randn(c, mid, 3, 3), torch.randn(c))
        keep = keep.bool() if r.random() < 0.3 else keep
        yield _like("skip_basic_block", (x, keep, *weights, 1, res, r.choice(["relu", "none"]), "auto"))


def strides() -> Iterator[Sample]:
    """Layouts, geometry, groups and slices around the tiles' sides."""
    for seed in range(COUNT):
        r = random.Random(seed)
        torch.manual_seed(seed)
        groups, ins, outs = r.choice([1, 1, 2]), r.choice([1, 15, 16, 17, 33]), r.choice([1, 16, 31, 65])
        x = _map(r, r.randrange(1, 4), groups * ins, r.choice([4, 9]))
        weight = torch.randn(groups * outs, ins, r.choice([1, 3]), 3)
        geometry = ([r.randrange(1, 3), r.randrange(1, 3)], [r.randrange(3), 1], [1, r.randrange(1, 3)])
        yield _like("rep_conv2d", (x, weight, torch.randn(groups * outs), *geometry, groups, "relu6", None, "auto"))


def ranges() -> Iterator[tuple[Sample, Sample]]:
    """Widths, codes, rows and offsets out of their ranges, each with the call that they are held to."""
    torch.manual_seed(0)
    x, weight = torch.randn(3, 8, 4, 4), torch.randn(12, 8, 3, 3)

    def widths(c_in: list[int], c_out: list[int], row: list[int]) -> Sample:
        tables = (torch.arange(20.0).reshape(2, 10), None, torch.tensor(row))
        args = (x, weight, None, torch.tensor(c_in), torch.tensor(c_out, dtype=torch.int32), 10, [1, 1], [1, 1], [1, 1],
                1, "prefix_groups", *tables, "none", "auto", True)  # fmt: skip
        return _like("sliced_conv2d_ragged", args)

    yield widths([99, -1, 2**40], [2**30, 11, -7], [5, -3, 1]), widths([8, 0, 8], [10, 10, 0], [1, 0, 1])
    book = torch.randn(1, 5, 4)

    def table(codes: list[int], idx: list[int]) -> Sample:
        return _like("pq_embedding", (torch.tensor(idx), torch.tensor([codes], dtype=torch.int32), book, None, None))

    yield table([99, -1, 4], [0, 7, -2]), table([4, 0, 4], [0, 0, 0])
    codes = torch.randint(0, 5, (6, 3), dtype=torch.int32)

    def bags(offsets: list[int]) -> Sample:
        args = (torch.arange(6), codes, book, torch.tensor(offsets), None, "sum", None, None)
        return _like("pq_embedding_bag", args)

    yield bags([-3, 2, 99]), bags([0, 2, 6])


def norms() -> Iterator[Sample]:
    """The gradient of every sample of the batch norms, with no gradient where the sum is too near to the ReLU's corner
    for a sign to be sure."""
    forward = OPS["multi_branch_bn_add_relu"]
    backward = OPS["multi_branch_bn_add_relu_backward"]
    for sample in every_sample().values():
        if sample.op is not forward:
            continue
        xs, weight, bias, _, _, training, _, _, relu = sample.args
        z, mean, invstd, _, _ = forward.reference(*to_double(sample.args[:-1]), False)
        grad = torch.randn(z.shape).masked_fill(z.abs() < 1e-3, 0.0).to(xs[0].dtype)
        grad = grad.contiguous(memory_format=torch.channels_last) if len(xs) == 2 else grad
        needs = [i != 1 for i in range(len(xs))]
        args = (grad, xs, weight, bias, mean, invstd, training, relu, needs)
        yield Sample(sample.name, backward, backward.reference, args, gradient_magnitude)


def gradient_magnitude(
    grad: Tensor, xs: list[Tensor], weight: list[Tensor], bias: list[Tensor], mean: Tensor, invstd: Tensor,
    training: bool, relu: bool, needs: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    """Sizes of what is added up for each result, in fp64, four times: a normalized value is three roundings."""
    g, many = grad.double().abs(), max(grad.numel() // max(grad.size(1), 1), 1)
    column = (1, -1, 1, 1)
    hats = [(x.double().abs() + m.abs().view(column)) * s.view(column)
            for x, m, s in zip(xs, mean, invstd, strict=True)]  # fmt: skip
    total = g.sum((0, 2, 3))
    products = [(g * hat).sum((0, 2, 3)) for hat in hats]
    dxs = []
    for i, need in enumerate(needs):
        inner = g + (total.view(column) + hats[i] * products[i].view(column)) / many
        dxs.append(4 * (weight[i].double().abs() * invstd[i]).view(column) * inner if need else g.new_empty(0))
    return *dxs, 4 * torch.stack(products), 4 * total


CASES: dict[str, Callable[[], Iterator]] = {
    "ragged": ragged,
    "skip": skip,
    "ranges": ranges,
    "strides": strides,
    "norms": norms,
}
