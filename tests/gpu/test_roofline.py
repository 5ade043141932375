"""The table of bounds in docs/gpu.md is the one that the model derives."""

from __future__ import annotations

from tests.gpu.roofline import LAYERS, Card, Layer, Passes, Terms, WeightGradient, least, table
from tests.native.package import CHECKOUT


def test_the_page_shows_the_derived_table():
    assert table() in (CHECKOUT / "docs" / "gpu.md").read_text(), "paste `python -m tests.gpu.roofline`"


def test_bounds_by_hand():
    layer = Layer("1x1", 2, 8, 4, 3, 1)
    assert (layer.macs, layer.bytes) == (2 * 9 * 4 * 8, 2 * (2 * 9 * 8 + 32 + 2 * 9 * 4))
    gradient = WeightGradient("1x1", 2, 8, 4, 3, 1, slices=5)
    assert (gradient.macs, gradient.bytes) == (layer.macs, 2 * 2 * 9 * (8 + 4) + 5 * 2 * 4 * 32 + 2 * 32)
    assert Passes("one branch", 2, 8, 3, reads=2, writes=1, kernels=("act_grad",)).bytes == 3 * 2 * 9 * 8 * 2
    terms = Terms("codes", 1, ("dots",), (8, 16), 5)
    assert (terms.macs, terms.bytes) == (5, 24)
    assert (least(12.34), least(0.06), least(0.04), least(0.004, 2)) == ("12.3", "0.1", "< 0.1", "< 0.01")
    assert layer.bound_us(Card("slow memory", 1e-3, 1e9)) == (layer.bytes, "memory")
    assert layer.bound_us(Card("slow cores", 1e9, 1e-6)) == (2 * layer.macs, "products")
    assert {layer.bound_us(Card("A100", 2039, 312))[1] for layer in LAYERS} == {"memory", "products"}
