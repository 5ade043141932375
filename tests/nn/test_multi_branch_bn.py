"""MultiBranchBNAddReLU and the blocks that use it: the same training as with torch's batch norms, to rounding."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from effkern.nn import MultiBranchBNAddReLU, RepVGGBlock
from effkern.reparam import ACBlock


def eager(layer, *xs):
    z = sum(norm(x) for norm, x in zip(layer.norms, xs, strict=True))
    return F.relu(z) if layer.relu else z


def states_agree(a, b):
    assert list(a) == list(b)
    for key in a:
        assert a[key].dtype == b[key].dtype
        torch.testing.assert_close(a[key], b[key], atol=1e-6, rtol=1e-5, msg=key)


@pytest.mark.parametrize("branches", [1, 2, 3, 4])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("relu", [False, True])
def test_trains_as_batch_norms_do(branches, momentum, relu):
    layer = MultiBranchBNAddReLU(12, branches, momentum=momentum, relu=relu)
    plain = copy.deepcopy(layer)
    for step in range(3):
        xs = [torch.randn(4, 12, 5, 5) + i + step for i in range(branches)]
        y, want = layer(*xs), eager(plain, *xs)
        torch.testing.assert_close(y, want, atol=1e-5, rtol=1e-5)
        grad = torch.randn(y.shape)
        y.backward(grad)
        want.backward(grad)
        for p, q in zip(layer.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, atol=1e-4, rtol=1e-4)
        states_agree(layer.state_dict(), plain.state_dict())
    layer.eval(), plain.eval()
    torch.testing.assert_close(layer(*xs), eager(plain, *xs), atol=1e-5, rtol=1e-5)


def test_without_running_statistics():
    layer = MultiBranchBNAddReLU(6, 2, track_running_stats=False)
    xs = [torch.randn(3, 6, 4, 4) for _ in range(2)]
    for module in (layer, layer.eval()):
        torch.testing.assert_close(module(*xs), eager(layer, *xs), atol=1e-5, rtol=1e-5)


def test_refuses_other_numbers_of_branches():
    for branches in (0, 5):
        with pytest.raises(ValueError, match="branches must lie in 1 to 4"):
            MultiBranchBNAddReLU(3, branches)
    with pytest.raises(ValueError, match="xs must be 2 tensors, got 1"):
        MultiBranchBNAddReLU(3, 2)(torch.ones(2, 3, 4, 4))


def test_bfloat16_parameters():
    layer = MultiBranchBNAddReLU(8, 2, dtype=torch.bfloat16)
    xs = [torch.randn(4, 8, 6, 6).bfloat16() for _ in range(2)]
    torch.testing.assert_close(layer(*xs), eager(copy.deepcopy(layer), *xs), atol=5e-2, rtol=2e-2)
    assert all(norm.running_mean.dtype == torch.bfloat16 for norm in layer.norms)


def calls_the_op(block, x):
    y = block(x)
    return y.grad_fn is not None and "multi_branch_bn" in y.grad_fn.name()


BLOCKS = {
    "repvgg": lambda: RepVGGBlock(8, 8),
    "repvgg_down": lambda: RepVGGBlock(8, 12, stride=2),
    "repvgg_linear": lambda: RepVGGBlock(8, 8, act="none"),
    "acnet": lambda: ACBlock(8, 8),
}


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("training", [False, True])
def test_blocks_are_the_sum_of_their_branches(name, training):
    block = BLOCKS[name]().train(training)
    plain = copy.deepcopy(block)
    plain.fuse_norms = False
    x = torch.randn(4, 8, 6, 6).contiguous(memory_format=torch.channels_last)
    assert calls_the_op(block, x) and not calls_the_op(plain, x)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, want = block(a), plain(b)
    torch.testing.assert_close(y, want, atol=1e-5, rtol=1e-5)
    grad = torch.randn(y.shape)
    y.backward(grad)
    want.backward(grad)
    torch.testing.assert_close(a.grad, b.grad, atol=1e-4, rtol=1e-4)
    for p, q in zip(block.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-4, rtol=1e-3)
    states_agree(block.state_dict(), plain.state_dict())


def unlike(block):
    block.branches["conv1"].norm.eps = 1e-3


def hooked(block):
    block.branches["identity"].register_forward_hook(lambda *_: None)


def frozen(block):
    block.branches["conv3"].norm.eval()


def averaging(block):
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None


def another_norm(block):
    block.branches["identity"] = nn.GroupNorm(2, 8)


@pytest.mark.parametrize("change", [unlike, hooked, frozen, averaging, another_norm])
def test_what_one_call_cannot_stand_for_runs_branch_by_branch(change):
    block = RepVGGBlock(8, 8)
    change(block)
    plain = copy.deepcopy(block)
    plain.fuse_norms = False
    x = torch.randn(4, 8, 6, 6)
    assert not calls_the_op(block, x)
    assert torch.equal(block(x), plain(x))


def test_other_types_and_activations_run_branch_by_branch():
    assert not calls_the_op(RepVGGBlock(8, 8, act="silu"), torch.randn(2, 8, 4, 4))
    assert not calls_the_op(RepVGGBlock(8, 8, dtype=torch.float64), torch.randn(2, 8, 4, 4, dtype=torch.float64))


def test_functional_transforms_still_see_through_a_block():
    block = RepVGGBlock(4, 4).eval()
    x, t = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    _, tangent = torch.func.jvp(block, (x,), (t,))
    block.fuse_norms = False
    torch.testing.assert_close(tangent, torch.func.jvp(block, (x,), (t,))[1])


def test_a_block_compiles_to_one_graph():
    block = RepVGGBlock(8, 8)
    plain = copy.deepcopy(block)
    torch._dynamo.reset()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    x = torch.randn(4, 8, 6, 6)
    compiled(x).sum().backward()
    plain(x).sum().backward()
    states_agree(block.state_dict(), plain.state_dict())
    for p, q in zip(block.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-5, rtol=1e-4)
    torch._dynamo.reset()
