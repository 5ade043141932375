"""Skipping layers against the plain residual block: same parameters, same function, no stale weights."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import effkern
from effkern.blockdrop import BlockDropNet, PolicyNet
from effkern.models import create_model
from effkern.nn import SkipBlock, SkipStage, freeze_packs, skip_form
from effkern.nn.residual import ResidualBlock, ResidualStage

FORMS = [("basic", 4, 4, 1, "identity"), ("basic", 4, 6, 2, "pool"), ("basic", 4, 6, 2, "subsample")]
FORMS += [("basic", 4, 6, 2, "conv"), ("bottleneck", 8, 2, 1, "identity"), ("bottleneck", 6, 3, 2, "conv")]


def lived(net: nn.Module) -> nn.Module:
    """Statistics and affine parameters as after training."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.3, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return net


def pair(kind: str, into: int, channels: int, stride: int, shortcut: str) -> tuple[ResidualBlock, SkipBlock]:
    plain = lived(ResidualBlock(into, channels, stride, kind, shortcut)).eval()
    skip = SkipBlock(into, channels, stride, kind, shortcut)
    skip.load_state_dict(plain.state_dict())
    return plain, skip.eval()


def block() -> SkipBlock:
    return pair(*FORMS[0])[1]


def close(actual: Tensor, expected: Tensor) -> None:
    """Within 1e-5 of the largest value: two roundings of the folded weights and a chain of fp32 sums."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("keep", ["1011", "0000", "1111", None, "soft"])
def test_block_equals_the_plain_one(form, keep):
    plain, skip = pair(*form)
    x = torch.randn(4, form[1], 7, 6).to(memory_format=torch.channels_last)
    mask = (
        torch.tensor([0.0, 0.3, 1.0, 0.9]) if keep == "soft" else keep and torch.tensor([int(c) for c in keep]).byte()
    )
    with torch.no_grad():
        y, want = skip(x, mask), plain(x, mask)
        close(y, want)
        if keep == "1011" and form[-1] != "conv":
            assert torch.equal(y[1], plain.shortcut(x)[1])


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_training_is_that_of_the_plain_block(form):
    plain, skip = pair(*form)
    plain.train(), skip.train()
    x, keep = torch.randn(4, form[1], 7, 6), torch.tensor([True, False, True, True])
    for bn_over in ("all", "kept"):
        plain.bn_over = skip.bn_over = bn_over
        a, b = plain(x, keep), skip(x, keep)
        assert torch.equal(a, b)
        a.sum().backward(), b.sum().backward()
    for (name, p), q in zip(plain.named_parameters(), skip.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name
    assert all(torch.equal(v, skip.state_dict()[k]) for k, v in plain.state_dict().items())


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_gradients_in_eval_mode_are_those_of_the_plain_block(form):
    plain, skip = pair(*form)
    x, keep = torch.randn(4, form[1], 7, 6), torch.tensor([1.0, 0.0, 0.4, 1.0])
    grads = []
    for net in (plain, skip):
        leaf, gate = x.clone().requires_grad_(), keep.clone().requires_grad_()
        net(leaf, gate).square().sum().backward()
        grads.append([leaf.grad, gate.grad, *(p.grad for p in net.parameters())])
    for a, b in zip(*grads, strict=True):
        assert (a - b).abs().max() <= 1e-4 * a.abs().max()


def test_stage_equals_the_plain_one_in_whole_and_in_parts():
    plain = ResidualStage(ResidualBlock(4, 6, 2, "basic", "conv"), *[ResidualBlock(6, 6) for _ in range(3)])
    lived(plain).eval()
    stage = SkipStage.from_stage(plain)
    x, keep = torch.randn(5, 4, 8, 8), torch.rand(5, 4) < 0.5
    with torch.no_grad():
        close(stage(x, keep), plain(x, keep))
        close(stage(x), plain(x))
        part = stage(stage(x, keep, 0, 2), keep, 2)
        assert torch.equal(part, stage(x, keep))
        assert torch.equal(stage(x, keep, 1, 1), x)
    assert stage.state_dict().keys() == plain.state_dict().keys()
    assert stage.train()(x, keep).requires_grad
    with pytest.raises(TypeError, match="must be SkipBlock, got ResidualBlock"):
        SkipStage(ResidualBlock(4, 4))


def test_stage_of_one_block_kinds_apart():
    stage = SkipStage(SkipBlock(8, 8), SkipBlock(8, 2, kind="bottleneck"), SkipBlock(8, 2, kind="bottleneck"))
    lived(stage).eval()
    x, keep = torch.randn(3, 8, 5, 5), torch.tensor([[1, 0, 1], [0, 1, 1], [1, 1, 0]]).bool()
    with torch.no_grad():
        want = x
        for k, one in enumerate(stage):
            want = one(want, keep[:, k])
        assert torch.equal(stage(x, keep), want)


def changes_value(skip: SkipBlock, change) -> None:
    """Run, change something, run: the second result must be that of a fresh block with the changed state."""
    x, keep = torch.randn(2, 4, 5, 5), torch.tensor([True, True])
    with torch.no_grad():
        before = skip(x, keep)
        change(skip)
        fresh = block()
        fresh.load_state_dict(skip.state_dict())
        assert torch.equal(skip(x, keep), fresh(x, keep))
        assert not torch.equal(skip(x, keep), before)


def load(skip: SkipBlock, assign: bool) -> None:
    other = {k: v + 0.25 if v.is_floating_point() else v for k, v in skip.state_dict().items()}
    skip.load_state_dict(other, assign=assign)


def replace_twice(skip: SkipBlock) -> None:
    for _ in range(2):  # the second tensor could get the first one's address
        skip.conv1.weight.data = skip.conv1.weight.data * 1.5


CHANGES = {
    "data replaced twice": replace_twice,
    "in place": lambda s: s.conv1.weight.mul_(1.5),
    "statistics": lambda s: s.bn2.running_var.add_(1),
    "copied": lambda s: s.bn1.bias.copy_(torch.ones(4)),
    "replaced": lambda s: setattr(s.conv2, "weight", nn.Parameter(torch.randn(4, 4, 3, 3))),
    "data replaced": lambda s: setattr(s.conv2.weight, "data", torch.randn(4, 4, 3, 3)),
    "vector": lambda s: nn.utils.vector_to_parameters(torch.randn(304), s.parameters()),
    "loaded": lambda s: load(s, False),
    "assigned": lambda s: load(s, True),
    "data in place, then dropped": lambda s: (s.conv1.weight.data.mul_(1.5), s.drop_packed()),
    "part replaced": lambda s: setattr(s, "bn1", lived(nn.BatchNorm2d(4)).eval()),
}


@pytest.mark.parametrize("name", CHANGES)
def test_packed_weights_are_never_stale(name):
    changes_value(block(), CHANGES[name])


def test_packed_weights_follow_statistics_gathered_by_the_block_they_are_shared_with():
    """Batch norm moves its running statistics without counting a version."""
    plain = lived(ResidualBlock(4, 6, 2)).eval()
    skip, x = SkipBlock.from_block(plain), torch.randn(8, 4, 5, 5)
    with torch.no_grad():
        close(skip(x), plain(x))
        plain.train()(x)
        close(skip(x), plain.eval()(x))


def test_parts_changed_from_inside_are_noticed():
    skip, x = pair("basic", 4, 6, 2, "conv")[1], torch.randn(2, 4, 5, 5)
    with torch.no_grad():
        skip(x)
        skip.downsample[0] = nn.Conv2d(4, 6, 1, stride=2, bias=False)
        close(skip(x), ResidualBlock.forward(skip, x))
        nn.utils.parametrize.register_parametrization(skip.conv2, "weight", nn.Tanh())
        for _ in range(2):
            close(skip(x), ResidualBlock.forward(skip, x))
            skip.conv2.parametrizations.weight.original.mul_(2)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("fused", [False, True])
def test_packed_weights_follow_every_optimizer(mode, fused):
    """Fused optimizers bump no version counter."""

    def step(skip: SkipBlock) -> None:
        skip.train(mode == "train")
        with torch.enable_grad():
            skip(torch.randn(4, 4, 5, 5), torch.ones(4)).square().sum().backward()
            torch.optim.Adam(skip.parameters(), lr=0.1, fused=fused).step()
        skip.eval()

    changes_value(block(), step)


@pytest.mark.parametrize("stage", [False, True])
def test_a_step_after_an_inference_after_the_gradient_is_followed(stage):
    """As where a loop evaluates between backward and step: the step of a fused optimizer leaves no trace in tensors."""
    skip = SkipStage(block(), block()) if stage else block()
    x, keep = torch.randn(4, 4, 5, 5), torch.ones((4, 2) if stage else 4)
    skip(x, keep).square().sum().backward()
    bystander = block()
    with torch.no_grad():
        before, _ = skip(x, keep), bystander(x, torch.ones(4))
        packed = bystander._packed
        torch.optim.SGD(skip.parameters(), lr=0.1, fused=True).step()
        assert not torch.equal(skip(x, keep), before)
        close(skip(x, keep), copy.deepcopy(skip)(x, keep))
        bystander(x, torch.ones(4))
        assert bystander._packed is packed


def test_invalidate_reaches_blocks():
    skip, x = block(), torch.randn(4, 4, 5, 5)
    with torch.no_grad():
        skip(x)
        skip.conv1.weight.data.mul_(2)
        effkern.invalidate()
        close(skip(x), copy.deepcopy(skip)(x))


def test_weights_are_packed_once_and_leave_no_trace():
    skip, x, keep = block(), torch.randn(2, 4, 5, 5), torch.ones(2)
    with torch.no_grad():
        y = skip(x, keep)
        packed = skip._packed
        skip(x, keep)
        assert packed is not None and skip._packed is packed
        assert "_packed" not in "".join(skip.state_dict())
        for other in (copy.deepcopy(skip), pickle.loads(pickle.dumps(skip))):
            assert other._packed is None
            assert torch.equal(other(x, keep), y)
        file = io.BytesIO()
        torch.save(skip, file)
        file.seek(0)
        assert torch.equal(torch.load(file, weights_only=False)(x, keep), y)
    skip.train()
    assert skip._packed is None


def test_modules_made_in_inference_mode_are_not_cached():
    with torch.inference_mode():
        skip = lived(SkipBlock(4, 4)).eval()
        x, keep = torch.randn(2, 4, 5, 5), torch.ones(2)
        y = skip(x, keep)
        skip.conv1.weight.mul_(2)
        assert not torch.equal(skip(x, keep), y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_storage(dtype):
    plain, _ = pair(*FORMS[1])
    x, keep = torch.randn(3, 4, 6, 6), torch.tensor([True, False, True])
    low = SkipBlock.from_block(copy.deepcopy(plain).to(dtype))
    want = copy.deepcopy(low).float()
    with torch.no_grad():
        y = low(x.to(dtype), keep)
        assert y.dtype == dtype
        # Folding rounds the weights once more, then the output is rounded.
        exact = want(x.to(dtype).float(), keep)
        assert (y.float() - exact).abs().max() <= 4 * torch.finfo(dtype).eps * exact.abs().max()
        with pytest.raises(TypeError, match="dtype"):
            low(x, keep)


def test_memory_format_moves_through():
    skip, x, keep = block(), torch.randn(2, 4, 5, 5), torch.ones(2)
    with torch.no_grad():
        want = skip(x, keep)
        y = skip.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last), keep)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y, want)


def test_autocast():
    skip, x, keep = block(), torch.randn(2, 4, 5, 5), torch.tensor([True, False])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y = skip(x, keep)
    assert y.dtype == torch.bfloat16
    with torch.no_grad():
        want = skip(x, keep)
    assert (y.float() - want).abs().max() <= 4 * torch.finfo(torch.bfloat16).eps * want.abs().max()


@pytest.mark.parametrize("grad", [False, True])
def test_stage_compiles_to_one_graph(grad):
    torch._dynamo.reset()
    stage = lived(SkipStage(SkipBlock(4, 6, 2, shortcut="pool"), SkipBlock(6, 6))).eval()
    stage.requires_grad_(grad)
    x, keep = torch.randn(3, 4, 6, 6), torch.tensor([[1, 0], [1, 1], [0, 1]]).bool()
    compiled = torch.compile(stage, backend="aot_eager", fullgraph=True)
    y, want = compiled(x, keep), stage(x, keep)
    assert torch.equal(y, want)
    if grad:
        y.sum().backward()
        got = [p.grad.clone() for p in stage.parameters()]
        stage.zero_grad()
        want.sum().backward()
        for a, p in zip(got, stage.parameters(), strict=True):
            torch.testing.assert_close(a, p.grad)


def test_stage_exports_with_a_dynamic_batch():
    stage = lived(SkipStage(SkipBlock(4, 6, 2, shortcut="pool"), SkipBlock(6, 6))).eval().requires_grad_(False)
    x, keep = torch.randn(3, 4, 6, 6), torch.tensor([[1, 0], [1, 1], [0, 1]]).bool()
    batch = torch.export.Dim("batch", min=2, max=64)
    shapes = {"x": {0: batch}, "keep": {0: batch}}
    program = torch.export.export(stage, (x, keep), dynamic_shapes=shapes, strict=False)
    rows = torch.tensor([0, 2, 1, 1, 0])
    close(program.module()(x[rows], keep[rows]), stage(x[rows], keep[rows]))


def test_wraps_in_ddp(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        plain, wrapped = create_model("resnet20", blocks=(2, 1, 1), widths=(4, 6, 8)), None
        wrapped = nn.parallel.DistributedDataParallel(skip_form(plain).train())
        x, keep = torch.randn(4, 3, 8, 8), torch.tensor([[1, 0, 1, 1]] * 3 + [[0, 1, 0, 0]]).bool()
        wrapped(x, keep).square().sum().backward()
        plain.train()(x, keep).square().sum().backward()
        for p, q in zip(wrapped.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("name", ["resnet20", "resnet18", "resnet50"])
def test_whole_network_skips_as_masked(name):
    """One batch of mixed decisions equals the masked network, each image alone, and any order of the batch."""
    small = {"widths": (4, 6, 8), "blocks": (2, 3, 1)} if name == "resnet20" else {"widths": (4, 4, 6, 8)}
    net = lived(create_model(name, num_classes=5, **small)).eval()
    skip = skip_form(net)
    x, keep = torch.randn(5, 3, 40, 36), torch.rand(5, net.num_blocks) < 0.5
    keep[0], keep[1] = False, True
    with torch.no_grad():
        y = skip(x, keep)
        close(y, net(x, keep))
        close(skip(x), net(x))
        order = torch.tensor([3, 0, 4, 2, 1])
        state = skip.stem(x)
        features = skip.body(state, keep)
        assert torch.equal(skip.body(state[order], keep[order]), features[order])
        for i in range(5):
            assert torch.equal(skip.body(state[i : i + 1], keep[i : i + 1])[0], features[i])
    assert skip.state_dict().keys() == net.state_dict().keys()
    net.load_state_dict(skip.state_dict())


def test_policy_and_backbone_in_one_call():
    net = BlockDropNet(create_model("resnet20", widths=(4, 6, 8)), PolicyNet(9, widths=(4, 4, 4)))
    lived(net).eval()
    skip = skip_form(net)
    x = torch.randn(6, 3, 16, 16)
    assert isinstance(skip.policy.blocks, SkipStage)
    with torch.no_grad():
        assert torch.equal(skip.decide(x), net.decide(x))
        close(skip(x), net(x))
    with pytest.raises(ValueError, match="no residual block"):
        skip_form(nn.Linear(2, 2))
    assert isinstance(skip_form(ResidualBlock(4, 4)), SkipBlock)
    assert isinstance(skip_form(ResidualStage(ResidualBlock(4, 4))), SkipStage)


@pytest.mark.parametrize("name", [n for n in CHANGES if "dropped" not in n])
def test_stage_remembers_its_packs_as_a_whole_and_never_uses_stale_ones(name):
    stage = SkipStage(*[block() for _ in range(3)]).eval()
    x, keep = torch.randn(2, 4, 5, 5), torch.ones(2, 3, dtype=torch.bool)
    with torch.no_grad():
        before = [stage(x, keep) for _ in range(3)][-1]
        assert stage._runs[0, 3].stage is not None
        CHANGES[name](stage[1])
        fresh = SkipStage(*[block() for _ in range(3)]).eval()
        fresh.load_state_dict(stage.state_dict())
        assert torch.equal(stage(x, keep), fresh(x, keep))
        assert not torch.equal(stage(x, keep), before)
        stage[2] = block()
        fresh[2].load_state_dict(stage[2].state_dict())
        assert torch.equal(stage(x, keep), fresh(x, keep))
    assert not copy.deepcopy(stage)._runs and not pickle.loads(pickle.dumps(stage))._runs


def test_frozen_packs_stay_until_they_are_dropped():
    net = freeze_packs(SkipStage(*[block() for _ in range(3)], pair("basic", 4, 6, 2, "conv")[1]).eval())
    x, keep = torch.randn(2, 4, 5, 5), torch.ones(2, 4, dtype=torch.bool)
    with torch.no_grad():
        before = net(x, keep)
        for part in net:
            part.conv1.weight.mul_(1.5)
        assert torch.equal(net(x, keep), before) and torch.equal(net(x, keep), before)
        assert not torch.equal(copy.deepcopy(net)(x, keep), before)
        after = net.train().eval()(x, keep)
        assert not torch.equal(after, before)
        freeze_packs(net)
        assert torch.equal(net(x, keep), after)
    net(x, keep).sum().backward()
    assert net[0].conv1.weight.grad is not None and net[0]._packed is None
    with pytest.raises(RuntimeError, match="eval mode"):
        net[0].train().freeze_pack()


def test_blocks_saved_before_there_were_transforms_load():
    block = SkipBlock(8, 8).eval()
    block.__dict__.pop("transforms", None)
    x, keep = torch.randn(1, 8, 4, 4), torch.ones(1)
    with torch.no_grad():
        assert torch.equal(pickle.loads(pickle.dumps(block))(x, keep), block(x, keep))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_transforms_in_the_packs_change_no_bit(form):
    kind, into, channels, stride, shortcut = form
    block = SkipBlock(8 * into, 8 * channels, stride, kind, shortcut)
    lived(block).eval()
    x, keep = torch.randn(3, 8 * into, 9, 9), torch.tensor([True, False, True])
    with torch.no_grad():
        plain, sizes = block(x, keep), [sum(w.numel() for w in block._packed.weights)]
        block.transforms = True
        assert block._packed is None
        assert torch.equal(block(x, keep), plain)
        assert torch.equal(copy.deepcopy(block)(x, keep), plain)
    sizes.append(sum(w.numel() for w in block._packed.weights))
    assert sizes[1] > 1.5 * sizes[0] if (kind, stride) != ("bottleneck", 2) else sizes[1] == sizes[0]
    assert [block.pack_bytes(transforms) for transforms in (False, True)] == sizes


def test_elsewhere_than_on_the_cpu_folded_weights_are_no_handles():
    net = SkipStage(*[block() for _ in range(2)], pair("basic", 4, 6, 2, "conv")[1]).eval().to("meta")
    x, keep = torch.empty(2, 4, 5, 5, device="meta"), torch.ones(2, 3, dtype=torch.bool, device="meta")
    for _ in range(2):
        packs = [part._packed for part in net]
        with torch.no_grad():
            assert net(x, keep).shape == (2, 6, 3, 3)
        for part in net:
            assert all(
                w.dim() == 4 and w.is_contiguous(memory_format=torch.channels_last) for w in part._packed.weights
            )
        if packs[0] is not None:
            assert [part._packed for part in net] == packs
        freeze_packs(net)
