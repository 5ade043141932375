"""The narrow networks that the supernets are measured against are the supernets at that width."""

import pytest
import torch

from benchmarks.bench_supernet import build, draw, loop, narrow


@pytest.mark.parametrize("name, width", [("mobilenet_v1_slimmable", 1), ("ds_mobilenet", 0), ("ds_mobilenet", 14)])
@torch.no_grad()
def test_narrow_is_the_supernet_at_one_width(name, width):
    net, widths = build(name)
    x = torch.randn(2, 3, 32, 32).to(memory_format=torch.channels_last)
    torch.testing.assert_close(narrow(net, width)(x), net(x, width), rtol=1e-3, atol=1e-4)
    assert width < widths


@torch.no_grad()
def test_the_loop_puts_every_sample_back():
    nets = [torch.nn.Flatten(), torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Threshold(9.0, 9.0))]
    x = torch.rand(5, 1, 2, 2)
    index = torch.tensor([1, 0, 0, 1, 0])
    y = loop(x, [(index == i).nonzero().flatten() for i in range(2)], nets)
    assert (y[index == 1] == 9).all() and torch.equal(y[index == 0], x.flatten(1)[index == 0])


def test_draws_are_even():
    counts = draw(14, 32).bincount()
    assert len(counts) == 14 and counts.sum() == 32 and counts.max() - counts.min() == 1
