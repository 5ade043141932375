"""Networks that cannot be taken apart as a whole: what is kept, what is optimized all the same, and what it says."""

from __future__ import annotations

import collections
import copy
import pickle
import threading
import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DataParallel

import effkern
from effkern.blockdrop import BlockDropNet, PolicyNet
from effkern.models import create_model
from effkern.nn import SkipStage, skip_form
from tests.inference.common import lived_in, ops, optimized_and_same, same

X = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def block(ci=4, co=4):
    return nn.Sequential(nn.Conv2d(ci, co, 3, padding=1), nn.BatchNorm2d(co), nn.ReLU(inplace=True))


class EarlyExit(nn.Module):
    """The data decide how far it goes; it iterates over what it holds and asks one of its parts for an attribute."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(block(), block(), block())
        self.head = block()
        self.scale = nn.Conv2d(4, 4, 1)

    def forward(self, x, threshold=0.5):
        for part in self.blocks:
            x = part(x)
            if x.mean() > threshold:
                break
        return self.scale(self.head(x)) * self.scale.weight.mean() + len(self.blocks)


def test_control_flow_on_data_is_kept_and_its_parts_are_optimized():
    model = lived_in(EarlyExit())
    result = optimized_and_same(model, X)
    assert len(ops(result)) == 5
    report = result.report()
    assert "control flow" in report.why("")
    for x in (X * 100, X * 0, -X):
        same(result, model, x)
    same(result, model, X, threshold=-1.0)
    same(result, model, X, 100.0)


def test_a_part_that_cannot_be_traced_does_not_spoil_the_rest():
    model = lived_in(nn.Sequential(block(), EarlyExit(), block(), nn.Sequential(block(), EarlyExit())))
    result = optimized_and_same(model, X, depth=12)
    assert len(ops(result)) == 13
    assert "control flow" in result.report().why("1") and "control flow" in result.report().why("3.1")


def test_a_module_with_hooks_is_called_as_it_is():
    seen = []
    model = lived_in(nn.Sequential(block(), block(), nn.Sequential(block(), block())))
    model[1][0].register_forward_hook(lambda m, args, y: seen.append(m))
    model[2].register_forward_pre_hook(lambda m, args: (args[0] * 2,))
    result = optimized_and_same(model, X, depth=12)
    seen.clear()
    result(X)
    assert len(seen) == 1 and seen[0] is not model[1][0]  # the copy's
    assert "hooks" in result.report().why("1.0") and "hooks" in result.report().why("2")
    assert len(ops(result)) == 3


def test_hooks_on_the_whole_model():
    model = lived_in(block())
    model.register_forward_hook(lambda m, args, y: y + 1)
    result = optimized_and_same(model, X)
    assert "hooks" in result.report().why("") and len(ops(result)) == 1  # the convolution alone


def test_a_forward_replaced_on_the_instance_is_called():
    model = lived_in(nn.Sequential(block(), block()))
    inner = model[0][0]
    inner.forward = lambda x, weight=inner.weight: F.conv2d(x, weight, padding=1) + 3
    result = effkern.optimize(model)
    assert "replaced on the instance" in result.report().why("0.0")
    torch.testing.assert_close(result(X), model(X))


def test_arguments_with_defaults_are_fixed():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = block()

        def forward(self, x, mask=None, *, flip: bool = False):
            y = self.block(x)
            if mask is not None:
                y = y * mask
            return y.flip(1) if flip else y

    model = lived_in(Masked())
    result = optimized_and_same(model, X)
    same(result, model, X, mask=None)
    with torch.no_grad():
        assert torch.equal(result(x=X, flip=False), result(X))
    with pytest.raises(ValueError, match=r"mask.*example_input"):
        result(X, torch.ones(()))
    with pytest.raises(ValueError, match="flip"):
        result(X, flip=True)
    with pytest.raises(TypeError, match="x"):
        result()
    mask = torch.rand(2, 1, 8, 8)
    masked = effkern.optimize(model, (X, mask))
    same(masked, model, X, mask)
    same(masked, model, X, mask=mask * 2)
    assert masked.report().error < 1e-5


def decided(**how):
    """A residual network behind a policy, whose decisions on 6 images differ, plain and deployed; the images."""
    net = create_model("resnet20", widths=(8, 16, 24))
    policy = PolicyNet(net.num_blocks, widths=(8, 16))
    model = lived_in(BlockDropNet(net, policy, **how))
    x = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        policy.linear.bias -= policy(x).quantile(0.5, 0)  # half of the images keep a block
        keep = model.decide(x)
    assert (keep.sum(0) == 3).all() and len(keep.unique(dim=0)) > 1
    return model, BlockDropNet(skip_form(net), skip_form(policy), **how).eval(), x


def test_a_network_behind_its_policy_is_one_graph():
    model, deployed, x = decided()
    result = effkern.optimize(deployed, x)
    assert [row.module for row in result.report().left if row.kind == "SkipStage"] == [
        "policy.blocks", "backbone.layer1", "backbone.layer2", "backbone.layer3",
    ]  # fmt: skip
    assert len(ops(result)) == 2, "both stems are one op each"
    for images in (x, *x.split(1)):
        same(result, model, images, depth=24)


def test_the_mask_of_a_network_is_checked_where_it_is_used():
    model = lived_in(create_model("resnet20", widths=(8, 16, 24)))
    x, keep = torch.randn(2, 3, 16, 16), torch.rand(2, model.num_blocks) < 0.5
    result = effkern.optimize(skip_form(model), (x, keep))
    for mask in (keep, ~keep):
        same(result, model, x, mask, depth=24)
    for wrong in (keep[:1], keep[:, 1:], keep[0]):
        with pytest.raises(ValueError, match=r"keep must be \[2, 9\], got"):
            result(x, wrong)
    with pytest.raises(ValueError, match=r"keep must be \[2, 9\], got None"):
        result(x, None)
    with pytest.raises(ValueError, match="keep: this network was optimized for calls with it"):
        result(x)


@pytest.mark.parametrize("how", [{"reorder": True}, {"bucket": 2}], ids=str)
def test_a_part_that_is_called_with_more_than_it_was_optimized_for_runs_as_it_was(how):
    model, deployed, x = decided(**how)
    for example in (None, x):
        result = effkern.optimize(deployed, example)
        assert "traced" in result.report().why("")
        same(result, model, x, depth=24)


def test_an_example_shows_how_a_part_is_called():
    model, deployed, x = decided(bucket=2)
    result, ran = effkern.optimize(deployed, x, cache_bytes=1 << 20), []
    for part in result.modules():
        if isinstance(part, effkern.inference.Optimized) and part is not result:
            part.register_forward_hook(lambda part, *_: ran.append(part.extra_repr()))
    same(result, model, x, depth=24)
    assert set(ran) == {"PolicyNet", "CifarResNet"}, "the backbone is optimized for calls with a mask"


class Calls(nn.Module):
    """Cannot be traced; calls its part as it is told."""

    def __init__(self, part, *calls):
        super().__init__()
        self.part, self.calls = part, calls

    def forward(self, x):
        if x.sum() > 1e9:
            return x
        return sum(self.part(x, **call) for call in self.calls)


class Adds(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x, extra=(0, 0)):
        return torch.relu(self.conv(x)) + extra[0] + extra[1]


@pytest.mark.parametrize("calls", [({},), ({}, {"extra": (X, X)}), ({"extra": (X, X)}, {"extra": (1, 2)})])
@pytest.mark.parametrize("example", [None, X], ids=["no example", "example"])
def test_a_part_may_be_called_in_several_ways(calls, example):
    model = lived_in(Calls(Adds(), *calls))
    same(effkern.optimize(model, example), model, X)


def test_arguments_that_vary_must_be_given():
    model = Adds().eval()
    result = effkern.optimize(model, (X, (X, X)))
    same(result, model, X, (X, -X))
    with pytest.raises(ValueError, match="extra: this network was optimized for calls with it, got none"):
        result(X)
    with pytest.raises(ValueError, match="extra: this network was optimized for extra = "):
        effkern.optimize(model)(X, (X, X))


def test_other_threads_go_on_while_a_network_is_traced():
    model, busy = lived_in(nn.Sequential(*[block() for _ in range(6)])), nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    failed, done, y = [], threading.Event(), torch.randn(2, 4)
    optimized, expected = effkern.optimize(model), busy(y)

    def work():
        while not done.is_set():
            try:
                assert torch.equal(busy(y), expected)
                optimized(X)
                time.sleep(0)
            except BaseException as error:
                failed.append(repr(error))

    def optimize():
        try:
            same(effkern.optimize(model), model, X)
        except BaseException as error:
            failed.append(repr(error))

    worker, twins = threading.Thread(target=work), [threading.Thread(target=optimize) for _ in range(3)]
    for thread in (worker, *twins):
        thread.start()
    for thread in twins:
        thread.join()
    done.set()
    worker.join()
    assert not failed


def test_copies_of_a_checked_network_leave_nothing_behind():
    model = lived_in(create_model("resnet20", widths=(8, 8, 8), blocks=(1, 1, 1)))
    result = effkern.optimize(skip_form(model), (X[:, :3], torch.ones(2, 3)))
    before = len(torch.fx._symbolic_trace._wrapped_fns_to_patch)
    for _ in range(3):
        copy.deepcopy(result)
    assert len(torch.fx._symbolic_trace._wrapped_fns_to_patch) == before


def test_maps_between_what_skips_stay_in_channels_last():
    model = skip_form(lived_in(create_model("resnet20", widths=(8, 16, 24))))
    result, seen = effkern.optimize(model, X[:, :3]), []
    for module in result.modules():
        if isinstance(module, SkipStage):
            module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    y = result(X[:, :3])
    assert len(seen) == 3 and all(x.is_contiguous(memory_format=torch.channels_last) for x in seen)
    assert y.is_contiguous()


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def test_parametrized_blocks_are_baked():
    model = skip_form(lived_in(create_model("resnet20", widths=(8, 8, 8), blocks=(1, 2, 1))))
    nn.utils.parametrize.register_parametrization(model.layer2[1].conv1, "weight", Doubled())
    x = torch.randn(2, 3, 9, 9)
    result = effkern.optimize(model, x)
    with torch.no_grad():
        before = model(x)
        for weight in model.parameters():
            weight.mul_(2)
        torch.testing.assert_close(pickle.loads(pickle.dumps(result))(x), before, rtol=1e-4, atol=1e-4)
    assert nn.utils.parametrize.is_parametrized(model.layer2[1].conv1)


@pytest.mark.parametrize("part", ["layer1", "layer1.0"])
def test_what_skips_is_not_taken_apart(part):
    model = lived_in(skip_form(create_model("resnet20", widths=(8, 16, 24)))).get_submodule(part)
    result = effkern.optimize(model)
    assert not result.report().replaced and "effkern layer" in result.report().why("")
    x = torch.randn(2, 8, 8, 8)
    keep = torch.tensor([[True, False, True], [False, False, True]])
    keep = keep if part == "layer1" else keep[:, 0]
    with torch.no_grad():
        assert torch.equal(result(x, keep), model(x, keep))


def test_isinstance_of_tensor_takes_the_right_branch():
    class Picky(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)

        def forward(self, x):
            if not isinstance(x, torch.Tensor):
                raise TypeError("no tensor")
            if isinstance(x.shape[2], torch.Tensor):
                raise TypeError("a size is no tensor")
            return self.conv(x)

    assert len(ops(optimized_and_same(Picky().eval(), X))) == 1


Pair = collections.namedtuple("Pair", "maps total")


@pytest.mark.parametrize(
    "make",
    [
        lambda y: (y, y.sum()),
        lambda y: [y, (y.mean(1), {"a": y})],
        lambda y: {"b": y, "a": y * 2},
        lambda y: collections.OrderedDict([("b", y), ("a", [y + 1])]),
        lambda y: Pair(y, 3),
        lambda y: (y, None, "name", 2.5),
        lambda y: y.permute(0, 2, 3, 1).contiguous(),
        lambda y: y.flatten(2),
        lambda y: y.view(y.size(0), -1),
        lambda y: y.contiguous().view(y.shape[0], 2, 2, *y.shape[2:]).transpose(1, 2).contiguous().view(y.shape),
        lambda y: y.argmax(1),
        lambda y: torch.stack(y.chunk(2, 1)),
    ],
    ids=["tuple", "nested", "dict", "OrderedDict", "namedtuple", "others", "permuted", "flat", "view", "shuffle",
         "indices", "stack"],
)  # fmt: skip
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_containers_and_layouts_of_outputs(make, layout):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = block()

        def forward(self, x):
            return make(self.block(x))

    model = lived_in(Wrapped())
    x = X.contiguous(memory_format=layout)
    if layout == torch.channels_last and make(X).__class__ is torch.Tensor:
        try:
            model(x)
        except RuntimeError:
            pytest.skip("the original does not take this layout")
    result = effkern.optimize(model)
    same(result, model, X) if layout == torch.contiguous_format else _same_maps(result, model, x)


@torch.no_grad()
def _same_maps(result, model, x):
    for ours, theirs in zip(*(torch.utils._pytree.tree_leaves(f(x)) for f in (result, model)), strict=True):
        if isinstance(ours, torch.Tensor):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
            if ours.dim() == 4 and theirs.is_contiguous(memory_format=torch.channels_last):
                assert ours.stride() == theirs.stride()


def test_weights_in_channels_last_give_outputs_in_channels_last():
    model = lived_in(nn.Sequential(block(), block())).to(memory_format=torch.channels_last)
    optimized_and_same(model, X)


def test_inputs_in_containers():
    class Takes(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = block()

        def forward(self, batch):
            return self.block(batch["image"]) + batch["more"][0]

    model = lived_in(Takes())
    optimized_and_same(model, {"image": X, "more": [X * 2]})
    batch = {"image": X, "more": [X * 2]}
    assert effkern.optimize(model, batch).report().error < 1e-5


def test_a_module_that_looks_at_memory_gets_the_layout_it_knows():
    class Views(nn.Module):
        def forward(self, x):
            if x.numel() < 0:  # cannot be traced
                return x
            return x.view(x.size(0), -1).view(x.size())

    model = lived_in(nn.Sequential(block(), Views(), block()))
    optimized_and_same(model, X, depth=8)


def test_side_by_side_writes_keep_a_module_whole():
    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x):
            y = self.conv(x)
            y[:, :2].mul_(2)
            return y

    model = lived_in(nn.Sequential(block(), Writes(), block()))
    result = optimized_and_same(model, X, depth=8)
    assert "writes into memory" in result.report().why("1")
    assert len(ops(result)) == 3


def test_shared_children_of_an_untraceable_module():
    model = EarlyExit()
    model.head = model.blocks[0]
    optimized_and_same(lived_in(model), X)


@pytest.mark.parametrize("make", [lambda: nn.Sequential(), lambda: nn.Identity(), lambda: nn.Linear(8, 3), nn.ReLU])
def test_networks_without_a_convolution(make):
    result = optimized_and_same(make().eval(), X)
    assert not result.report().replaced


def test_a_convolution_is_a_network():
    assert len(ops(optimized_and_same(nn.Conv2d(4, 8, 3).eval(), X))) == 1
    assert len(ops(optimized_and_same(lived_in(block()), X))) == 1


def test_empty_batches():
    model = lived_in(nn.Sequential(block(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)))
    assert effkern.optimize(model)(X[:0]).shape == (0, 2)


def test_refusals_name_the_remedy():
    with pytest.raises(TypeError, match="Module"):
        effkern.optimize(lambda x: x)
    with pytest.raises(ValueError, match="eval"):
        effkern.optimize(block())
    model = lived_in(block())
    model[1].train()
    with pytest.raises(ValueError, match=r"'1'.*training mode"):
        effkern.optimize(model)
    with pytest.raises(ValueError, match=r"\.module"):
        effkern.optimize(DataParallel(block()).eval())
    with pytest.raises(ValueError, match="compile"):
        effkern.optimize(torch.compile(lived_in(block()), backend="eager"))


def test_without_the_native_library_everything_is_left(monkeypatch):
    monkeypatch.setattr("effkern.inference.entry.available", lambda: False)
    result = optimized_and_same(lived_in(block()), X)
    assert not result.report().replaced and "native library" in result.report().why("")
