"""The gate's two heads, and weights of widths: what trains a choice is what runs it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from effkern.nn import ChannelAttention, DoubleHeadedGate, SlicedConvBNAct, SwitchableBatchNorm2d

WIDTHS = (4, 6, 6, 10)


def trained_norm(norm: SwitchableBatchNorm2d) -> None:
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean):
            tensor.normal_()
        norm.running_var.uniform_(0.5, 2)


def one_hot(choice: torch.Tensor, count: int) -> torch.Tensor:
    return F.one_hot(choice, count).float()


@pytest.mark.parametrize("form", ["sigmoid", "tanh"])
def test_both_heads_by_hand(form):
    gate = DoubleHeadedGate([8, 16], (0, 1, 3), form=form)
    torch.nn.init.normal_(gate.expand.weight)
    x = torch.randn(3, 8, 5, 5)
    attended, logits = gate.decide(x, 0)
    r = (x.mean((2, 3)) @ gate.reduce.weight[:, :8].T + gate.reduce.bias).relu()
    scores = r @ gate.expand.weight[:8].T + gate.expand.bias[:8]
    factor = scores.sigmoid() if form == "sigmoid" else 1 + scores.tanh()
    assert r.shape == (3, 4) and gate.slim.bias is None and logits.shape == (3, 3)
    torch.testing.assert_close(attended, x * factor[:, :, None, None])
    torch.testing.assert_close(logits, r @ gate.slim.weight.T)
    torch.testing.assert_close(gate(x, 0), attended)


def test_tanh_begins_as_identity():
    x = torch.randn(2, 8, 3, 3)
    assert torch.equal(ChannelAttention(8, form="tanh")(x, 0), x)


def test_a_choice_is_the_best_logit_with_its_offset_in_every_mode():
    gate = DoubleHeadedGate([8], (0, 2))
    logits = torch.tensor([[1.0, 2.0], [2.0, 1.0], [0.0, 3.0]])
    for mode in (True, False):
        assert gate.train(mode).choose(logits).tolist() == [1, 0, 1]
    gate.offset.copy_(torch.tensor([0.0, -1.5]))
    assert gate.choose(logits).tolist() == [0, 0, 1]
    assert "offset" in gate.state_dict()


def test_a_space_is_a_view_that_can_be_moved():
    gate = DoubleHeadedGate([8], (0, 1, 2))
    gate.space = range(4, 7)
    assert gate.space == (4, 5, 6)
    for wrong in ([], [1, 0, 2], [0, 0, 1], [-1, 0, 1], [0, 1]):
        with pytest.raises(ValueError, match="space must"):
            gate.space = wrong
    assert gate.space == (4, 5, 6)
    with pytest.raises(ValueError, match="form must be one of sigmoid, tanh"):
        DoubleHeadedGate([8], (0, 1), form="relu")


@pytest.mark.parametrize("affine", ["shared", "per_width"])
@pytest.mark.parametrize("act", ["relu", "silu", "hardswish", "none"])
def test_weights_with_one_1_run_the_width_they_name(affine, act):
    layer = SlicedConvBNAct(WIDTHS, WIDTHS, 3, act=act, affine=affine).eval()
    trained_norm(layer.bn)
    choice = torch.tensor([0, 3, 1, 2, 0])
    x = torch.randn(5, 10, 4, 4)
    for n, i in enumerate(choice):
        x[n, WIDTHS[i] :] = 0
    with torch.no_grad():
        mixed = layer(x, one_hot(choice, 4))
        ragged = layer(x, choice)
        layer.fold()
        assert torch.equal(layer(x, one_hot(choice, 4)), mixed)
    torch.testing.assert_close(mixed, ragged, rtol=1e-5, atol=1e-5)
    for n, i in enumerate(choice):
        assert not mixed[n, WIDTHS[i] :].any()


def test_weights_may_be_of_the_first_widths_only():
    layer = SlicedConvBNAct(3, WIDTHS, 3).eval()
    trained_norm(layer.bn)
    choice = torch.tensor([1, 0])
    x = torch.randn(2, 3, 4, 4)
    with torch.no_grad():
        assert layer(x, one_hot(choice, 2)).shape[1] == 6
        torch.testing.assert_close(layer(x, one_hot(choice, 2)), layer(x, one_hot(choice, 4))[:, :6])


def test_a_weight_learns_what_its_width_would_have_given():
    norm = SwitchableBatchNorm2d([2, 3]).double().eval()
    trained_norm(norm)
    x = torch.randn(2, 3, 2, 2, dtype=torch.float64)
    weights = torch.tensor([[1.0, 0.0], [0.3, 0.7]], dtype=torch.float64, requires_grad=True)
    scale, shift = norm.tables()
    y = norm(x, weights)
    y.sum().backward()
    for i in range(2):
        want = (x * scale[i, :, None, None] + shift[i, :, None, None]).sum((1, 2, 3))
        torch.testing.assert_close(weights.grad[:, i], want, rtol=1e-5, atol=1e-5)


def test_weights_do_not_train_statistics_and_must_fit():
    norm = SwitchableBatchNorm2d([2, 3])
    x = torch.randn(2, 3, 2, 2)
    with pytest.raises(ValueError, match="weights of widths need fixed statistics"):
        norm(x, one_hot(torch.tensor([0, 1]), 2))
    norm.eval()
    for weights in (torch.zeros(3, 2), torch.zeros(2, 1), torch.zeros(2, 3)):
        with pytest.raises(ValueError, match="weights \\[N, M <= 2\\]"):
            norm(x, weights)


def test_weights_keep_their_precision_under_autocast():
    norm = SwitchableBatchNorm2d([8]).eval()
    trained_norm(norm)
    x = torch.randn(2, 8, 2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        y = norm(x, torch.ones(2, 1))
    torch.testing.assert_close(y, norm(x, 0))
