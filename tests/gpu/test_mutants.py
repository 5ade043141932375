"""Seeded faults fit the sources, and the page of them (docs/gpu-mutants.md) fits both. `make test-gpu-proof` kills
them."""

from __future__ import annotations

import pytest

from tests.gpu.mutant_table import PAGE, SURVIVES, page, read
from tests.gpu.mutants import MUTANTS
from tests.native.package import CHECKOUT


def test_mutants_change_text_that_is_there_once():
    for mutant in MUTANTS:
        assert (CHECKOUT / "csrc" / mutant.file).read_text().count(mutant.old) == 1, mutant.what
        assert mutant.old != mutant.new


def test_mutants_are_told_apart_by_their_words():
    assert len({m.what for m in MUTANTS}) == len(MUTANTS)
    assert not [m.what for m in MUTANTS if "|" in m.what]


@pytest.mark.skipif(not PAGE.exists(), reason="docs/gpu-mutants.md is not made yet: python -m tests.gpu.mutant_table")
def test_the_page_is_made_from_the_mutants():
    kills = read(PAGE)
    assert kills.keys() <= {m.what for m in MUTANTS} and SURVIVES not in kills.values()
    assert PAGE.read_text() == page(kills), "`make test-gpu-proof`, then `python -m tests.gpu.mutant_table`"
