"""No kernel is missing in what docs/gpu.md says kernel by kernel."""

from __future__ import annotations

from tests.gpu.kernel_table import forms, kernel_of, sources, span, table, triton
from tests.gpu.roofline import LAYERS
from tests.native.package import CHECKOUT


def test_the_page_shows_the_tables():
    page = (CHECKOUT / "docs" / "gpu.md").read_text()
    assert table() in page and triton() in page, "paste `python -m tests.gpu.kernel_table`"
    assert f"all {sum(map(len, forms().values()))} forms of the {len(sources())} kernels" in page


def test_every_kernel_is_compiled_and_has_a_bound():
    assert set(sources()) == set(forms()) == {kernel for layer in LAYERS for kernel in layer.kernels}


def test_forms_are_told_by_their_kernel():
    names = ("BF16 32x32 16x16 4", "listed wgrad F16 64x64 32x32 2u", "stage F32 16", "compact<unsigned int>")
    assert [kernel_of(name) for name in names] == ["conv", "wgrad", "stage", "compact"]
    assert (span([3]), span([2.5, 1, 1024])) == ("3", "1 to 1024")
