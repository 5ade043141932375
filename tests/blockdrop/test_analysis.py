"""Baselines that do not look at the image, and the analysis of a policy, on hand-made decisions."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

from effkern.blockdrop import (
    Usage,
    accuracy_by_blocks,
    best_static,
    best_statics,
    easiest_and_hardest,
    evaluate,
    first_blocks,
    fixed_policy,
    random_policy,
    summary,
    unique_policies,
)

KEEP = torch.tensor([[1, 0, 1], [1, 1, 1], [1, 0, 1], [0, 0, 0], [1, 0, 1]]).bool()
RIGHT = torch.tensor([1, 0, 1, 1, 0]).bool()
LABELS = torch.tensor([0, 1, 1, 0, 1])


class Voting(nn.Module):
    """Class 1 needs block 2, class 0 needs none; block 0 spoils class 0 unless block 1 runs too."""

    num_blocks = 3

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        assert keep is not None
        label, keep = x[:, 0].long(), keep.bool()
        right = torch.where(label == 1, keep[:, 2], ~keep[:, 0] | keep[:, 1])
        return nn.functional.one_hot(torch.where(right, label, 1 - label), 2).float()


def used() -> Usage:
    batches = [(LABELS[:, None].float(), LABELS)]
    return evaluate(Voting(), lambda x: KEEP, batches)


def test_evaluation_keeps_the_labels():
    assert torch.equal(used().labels, LABELS) and torch.equal(used().keep, KEEP)


def usage() -> Usage:
    return Usage(60.0, 1.8, 3, [0.8, 0.2, 0.8], [1.0, 7 / 3], KEEP, RIGHT, LABELS)


def test_policies_are_counted_with_their_accuracy():
    first, *others = unique_policies(usage())
    assert first == {"keep": [1, 0, 1], "blocks": 2, "images": 3, "top1": pytest.approx(200 / 3)}
    assert sorted((p["blocks"], p["images"], p["top1"]) for p in others) == [(0, 1, 100.0), (3, 1, 0.0)]
    assert len(unique_policies(usage(), 1)) == 1


def test_accuracy_against_blocks():
    assert accuracy_by_blocks(usage()) == [
        {"blocks": 0, "images": 1, "top1": 100.0},
        {"blocks": 2, "images": 3, "top1": pytest.approx(200 / 3)},
        {"blocks": 3, "images": 1, "top1": 0.0},
    ]


def test_easy_images_run_few_blocks():
    easy, hard = easiest_and_hardest(usage(), 2)
    assert easy.tolist() == [3, 0] and hard.tolist() == [1, 0]
    easy, hard = easiest_and_hardest(usage(), 1, label=1)
    assert easy.tolist() == [2] and hard.tolist() == [1]


def test_summary_is_plain_data():
    plain = summary(usage(), ["no", "yes", "never"])
    assert json.loads(json.dumps(plain)) == plain
    assert plain["by_class"] == {"no": 1.0, "yes": 7 / 3, "never": None}
    assert plain["unique_policies"] == 3 and plain["blocks_deviation"] == pytest.approx(0.96**0.5)


@pytest.mark.parametrize("blocks", [0, 1.25, 2, 3])
def test_random_decisions_have_the_budget_and_nothing_else(blocks):
    keep = random_policy(3, blocks, torch.Generator().manual_seed(0))(torch.empty(20_000, 1))
    counts = keep.sum(1)
    assert set(counts.tolist()) <= {int(blocks), -int(-blocks // 1)}
    assert counts.double().mean().item() == pytest.approx(blocks, abs=0.02)
    torch.testing.assert_close(keep.float().mean(0), torch.full((3,), blocks / 3), rtol=0, atol=0.02)


def test_first_blocks_are_rounded_up():
    assert [first_blocks(3, n).tolist() for n in (0, 0.1, 2, 3)] == [
        [False] * 3,
        [True, False, False],
        [True, True, False],
        [True] * 3,
    ]
    for call in (lambda: first_blocks(3, 4), lambda: random_policy(3, -1)):
        with pytest.raises(ValueError, match=r"blocks: must be in \[0, 3\]"):
            call()


def test_the_best_static_choice_is_found():
    """Of one block only block 2 answers everything; the first block alone is wrong on all."""
    batches = [(LABELS[:, None].float(), LABELS)]
    found = best_static(Voting(), iter(batches), 0.7)
    assert found.tolist() == [False, False, True]
    assert evaluate(Voting(), fixed_policy(found), batches).top1 == 100
    assert evaluate(Voting(), fixed_policy(first_blocks(3, 0.7)), batches).top1 == 0


class Trap(Voting):
    """Dropping any one of the blocks 1 and 2 is worst, dropping both is best: elimination does not find it."""

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        assert keep is not None
        label = x[:, 0].long()
        drops = 3 - keep.bool().sum(1)
        wrong = (drops == 1) & keep[:, 0].bool() | (drops == 2) & ~keep[:, 0].bool()
        return nn.functional.one_hot(torch.where(wrong, 1 - label, label), 2).float()


def test_other_candidates_are_considered():
    batches = [(LABELS[:, None].float(), LABELS)]
    keep = torch.tensor([True, False, False])
    assert torch.equal(best_static(Trap(), batches, 1, [keep]), keep)
    found = best_statics(Trap(), iter(batches), [1, 2, 3], [keep])
    # Elimination would end with two blocks that are wrong on all, but what one block reaches, two may too.
    assert sorted(found) == [1, 2, 3] and all(int(one.sum()) <= count for count, one in found.items())
    assert torch.equal(found[1], best_static(Trap(), batches, 1, [keep]))
    right = [evaluate(Trap(), fixed_policy(found[count]), batches).top1 for count in (1, 2, 3)]
    assert right == sorted(right)
    with pytest.raises(ValueError, match="budgets: must be at least one"):
        best_statics(Trap(), batches, [])
    with pytest.raises(ValueError, match=r"budgets: must be at least one number of blocks in \[0, 3\], got \[4\]"):
        best_statics(Trap(), batches, [4])
    with pytest.raises(ValueError, match=r"others: must be \[3\] each, got \[\[2\]\]"):
        best_statics(Trap(), batches, [1], [torch.ones(2, dtype=torch.bool)])
    with pytest.raises(TypeError, match="float"):
        best_statics(Trap(), batches, [1.5])
    with pytest.raises(ValueError, match="others: must have at most 1 blocks"):
        best_static(Trap(), batches, 1, [torch.ones(3, dtype=torch.bool)])
