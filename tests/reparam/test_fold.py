"""Each rule of the fold algebra against the branches themselves, in fp64."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from effkern.reparam import Conv, ReparamError, add, embed, fold_batch_norm, identity, read_conv, regroup

EXACT = 1e-12


def run(conv, x):
    """A held convolution applied in fp64; pads may differ between sides, or crop."""
    (top, bottom), (left, right) = conv.padding
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    x = F.pad(x, (left, right, top, bottom), mode)
    return F.conv2d(x, conv.weight, conv.bias, conv.stride, 0, conv.dilation, conv.groups)


def trained_norm(channels, **options):
    norm = nn.BatchNorm2d(channels, **options).double().eval()
    with torch.no_grad():
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        norm.num_batches_tracked.fill_(1)
        if norm.affine:
            norm.weight.normal_()
            norm.bias.normal_()
    return norm


def random_conv(outs, depth, kernel, **options):
    return Conv(torch.randn(outs, depth, *kernel).double(), torch.randn(outs).double(), **options)


def close(a, b):
    a, b = a.detach(), b.detach()
    assert a.shape == b.shape
    assert (a - b).abs().max() <= EXACT * max(1.0, float(b.abs().max()))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [nn.BatchNorm2d, nn.SyncBatchNorm])
def test_batch_norm_folds_into_the_convolution(kind, bias, affine):
    conv = nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=2, bias=bias).double()
    norm = trained_norm(8, affine=affine)
    x = torch.randn(2, 6, 7, 9).double()
    expected = norm(conv(x))
    if kind is nn.SyncBatchNorm:
        norm = nn.SyncBatchNorm.convert_sync_batchnorm(norm)
    close(run(fold_batch_norm(read_conv(conv), norm), x), expected)


def test_frozen_batch_norm_folds():
    class FrozenBatchNorm2d(nn.Module):  # torchvision's, by its attributes
        eps = 1e-5

        def __init__(self, norm):
            super().__init__()
            for name in ("weight", "bias", "running_mean", "running_var"):
                self.register_buffer(name, getattr(norm, name).detach().clone())

    conv, norm = nn.Conv2d(3, 4, 3).double(), trained_norm(4)
    x = torch.randn(2, 3, 6, 6).double()
    close(run(fold_batch_norm(read_conv(conv), FrozenBatchNorm2d(norm)), x), norm(conv(x)))


@pytest.mark.filterwarnings("ignore:Using padding=:UserWarning")  # of the Conv2d compared with
@pytest.mark.parametrize("padding", ["same", "valid", (1, 2)])
def test_conv_is_read_with_its_padding(padding):
    conv = nn.Conv2d(3, 4, (2, 3), padding=padding, dilation=(3, 1)).double()
    x = torch.randn(2, 3, 8, 6).double()
    close(run(read_conv(conv), x), conv(x))


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_identity_is_a_delta_in_every_group(groups):
    delta = regroup(identity(6), groups)
    x = torch.randn(2, 6, 5, 5).double()
    assert delta.groups == groups and delta.weight.shape == (6, 6 // groups, 1, 1)
    assert torch.equal(run(delta, x), x)


@pytest.mark.parametrize("groups, fewer", [(6, 3), (6, 2), (6, 1), (4, 2), (4, 4), (2, 1)])
def test_regroup_is_block_diagonal(groups, fewer):
    conv = random_conv(12, 12 // groups, (3, 2), groups=groups, padding=((1, 1), (0, 1)))
    x = torch.randn(2, 12, 5, 5).double()
    close(run(regroup(conv, fewer), x), run(conv, x))


@pytest.mark.parametrize("groups", [3, 4, 0, 8])
def test_groups_that_do_not_divide_are_refused(groups):
    with pytest.raises(ReparamError, match="groups"):
        regroup(random_conv(12, 6, (1, 1), groups=2), groups)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_embedding_is_exact_for_every_place(data):
    """Kernels, dilations, strides, pads that differ between sides, crops: all places a branch can have."""
    draw = data.draw
    stride = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    big, dil, small, step, start, pads, inner = [], [], [], [], [], [], []
    for _ in range(2):
        kernel = draw(st.integers(1, 5))
        d = draw(st.integers(1, 2))
        k = draw(st.integers(1, kernel))
        m = draw(st.integers(1, (kernel - 1) // (k - 1))) if k > 1 else 1
        a = draw(st.integers(0, kernel - 1 - m * (k - 1)))
        pad = (draw(st.integers(0, 5)), draw(st.integers(0, 5)))
        big.append(kernel), dil.append(d), small.append(k), step.append(m), start.append(a), pads.append(pad)
        inner.append((pad[0] - a * d, pad[1] - (kernel - 1 - a - m * (k - 1)) * d))
    target = random_conv(3, 2, big, stride=stride, padding=tuple(pads), dilation=tuple(dil))
    branch = random_conv(
        3, 2, small, stride=stride, padding=tuple(inner), dilation=tuple(m * d for m, d in zip(step, dil, strict=True))
    )
    x = torch.randn(1, 2, 12, 13).double()
    close(run(embed(branch, target), x), run(branch, x))
    close(run(add([target, branch]), x), run(target, x) + run(branch, x))


LIKE = Conv(torch.zeros(4, 4, 3, 3).double(), torch.zeros(4).double(), padding=((1, 1), (1, 1)))
ONE = Conv(torch.zeros(4, 4, 1, 1).double(), torch.zeros(4).double())
MISPLACED = {
    "stride": (Conv(ONE.weight, ONE.bias, stride=(2, 1)), "strides"),
    "padding": (Conv(ONE.weight, ONE.bias, padding=((1, 1), (1, 1))), "line up"),
    "lucky size": (Conv(ONE.weight, ONE.bias, padding=((0, 0), (1, -1))), None),  # legal: it looks one pixel left
    "one side": (Conv(ONE.weight, ONE.bias, padding=((0, 1), (0, 0))), "line up"),
    "outside": (Conv(ONE.weight, ONE.bias, padding=((2, -2), (0, 0))), "line up"),
    "dilation": (Conv(LIKE.weight, ONE.bias, dilation=(2, 2), padding=((2, 2),) * 2), "line up"),
    "mode": (Conv(LIKE.weight, ONE.bias, padding=((1, 1), (1, 1)), padding_mode="circular"), "modes"),
    "too large": (Conv(torch.zeros(4, 4, 1, 5).double(), ONE.bias, padding=((0, 0), (2, 2))), "fit"),
    "channels out": (Conv(torch.zeros(5, 4, 1, 1).double(), torch.zeros(5).double()), "channels"),
    "channels in": (Conv(torch.zeros(4, 5, 1, 1).double(), ONE.bias), "channels"),
    "coarser groups": (Conv(ONE.weight, ONE.bias), "groups"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISPLACED)
def test_branches_without_an_exact_place_are_refused(case):
    branch, match = MISPLACED[case]
    like = LIKE if case != "coarser groups" else Conv(LIKE.weight[:, :2], LIKE.bias, padding=LIKE.padding, groups=2)
    if match is None:
        add([like, branch])
        return
    with pytest.raises(ReparamError, match=match) as caught:
        add([like, branch])
    assert caught.value.reason and caught.value.remedy


def test_dilated_branch_needs_a_multiple():
    like = Conv(torch.zeros(4, 4, 5, 5).double(), LIKE.bias, dilation=(2, 2), padding=((4, 4), (4, 4)))
    branch = Conv(torch.zeros(4, 4, 3, 3).double(), LIKE.bias, dilation=(3, 3), padding=((3, 3), (3, 3)))
    with pytest.raises(ReparamError, match="multiple"):
        embed(branch, like)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_other_padding_modes_commute_with_the_fold(mode):
    big = random_conv(4, 3, (3, 3), padding=((1, 1), (1, 1)), padding_mode=mode)
    row = random_conv(4, 3, (1, 3), padding=((0, 0), (1, 1)), padding_mode=mode)
    point = random_conv(4, 3, (1, 1))
    x = torch.randn(2, 3, 6, 6).double()
    close(run(add([point, row, big]), x), sum(run(b, x) for b in (point, row, big)))


def test_sum_does_not_depend_on_the_order():
    branches = [random_conv(4, 4, (3, 3), padding=((1, 1),) * 2), random_conv(4, 4, (1, 1)), identity(4)]
    x = torch.randn(1, 4, 5, 5).double()
    expected = sum(run(b, x) for b in branches)
    for order in itertools.permutations(branches):
        close(run(add(order), x), expected)


class TestBatchNormsThatCannotBeFolded:
    conv = Conv(torch.zeros(4, 3, 1, 1).double(), torch.zeros(4).double())

    def test_training_mode(self):
        with pytest.raises(ReparamError, match=r"training.*eval"):
            fold_batch_norm(self.conv, trained_norm(4).train())

    def test_no_running_statistics(self):
        with pytest.raises(ReparamError, match="running statistics"):
            fold_batch_norm(self.conv, nn.BatchNorm2d(4, track_running_stats=False).eval())

    @pytest.mark.parametrize("norm", [nn.GroupNorm(2, 4), nn.InstanceNorm2d(4), nn.Identity(), nn.LayerNorm(4)])
    def test_other_norms(self, norm):
        norm.eval()
        if isinstance(norm, nn.InstanceNorm2d):
            assert isinstance(norm, nn.modules.batchnorm._NormBase)  # close to a batch norm, and yet none
        with pytest.raises(ReparamError, match="not a batch norm"):
            fold_batch_norm(self.conv, norm)

    def test_channels(self):
        with pytest.raises(ReparamError, match="channels"):
            fold_batch_norm(self.conv, trained_norm(5))

    def test_untrained_warns(self):
        with pytest.warns(UserWarning, match="no batch"):
            fold_batch_norm(self.conv, nn.BatchNorm2d(4).eval())


@pytest.mark.parametrize("wrap", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm])
def test_parametrized_weights_must_be_baked_first(wrap):
    with pytest.raises(ReparamError, match="bake"):
        read_conv(wrap(nn.Conv2d(3, 4, 3)))


def test_error_names_module_reason_and_remedy():
    error = ReparamError("no exact fold", "do this").at("stages.0")
    assert (error.module, error.reason, error.remedy) == ("stages.0", "no exact fold", "do this")
    assert str(error) == "stages.0: no exact fold; do this"
    assert isinstance(error, ValueError)
