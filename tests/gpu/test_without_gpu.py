"""Where there is no GPU, the two targets that want one say so and are no failure."""

from __future__ import annotations

import pytest

from tests.native.package import CHECKOUT, python


@pytest.mark.parametrize(("module", "done"), [("tests.gpu.check", "checked"), ("benchmarks.gpu", "measured")])
def test_says_so_and_succeeds(module, done):
    run = python("-m", module, path=CHECKOUT, cwd=CHECKOUT, CUDA_VISIBLE_DEVICES="")
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == f"no GPU was found: nothing was {done}"
