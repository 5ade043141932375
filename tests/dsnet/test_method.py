"""The supernet's losses by hand, its teacher, and its training on the loop."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from effkern.data import BatchFeed, load_digits
from effkern.dsnet import SandwichRule, SupernetTraining, soft_cross_entropy
from effkern.models import create_model
from effkern.training import Recipe, Run, Step, train

DATA = load_digits()


def supernet() -> nn.Module:
    torch.manual_seed(0)
    return create_model("slimmable_cnn", widths=(2, 4, 6, 8), blocks=(1, 1))


def batch(n: int = 16):
    return DATA.normalize(DATA.val.images[:n]), DATA.val.labels[:n]


def test_soft_cross_entropy_is_divergence_plus_entropy():
    z, t = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64).softmax(1)
    divergence = F.kl_div(z.log_softmax(1), t, reduction="batchmean")
    torch.testing.assert_close(soft_cross_entropy(z, t), divergence - (t * t.log()).sum(1).mean())
    assert torch.autograd.gradcheck(lambda z: soft_cross_entropy(z, t), z.requires_grad_())
    one = soft_cross_entropy(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.25, 0.75]]))
    assert one.item() == pytest.approx(torch.tensor(2.0).log().item())


@pytest.mark.parametrize(
    ("target", "ensemble"),
    [("labels", False), ("distillation", False), ("bootstrapping", False), ("bootstrapping", True)],
)
def test_losses_by_hand(target, ensemble):
    model, (x, y) = supernet(), batch()
    method = SupernetTraining(model, 4, target=target, ensemble=ensemble).train()
    if method.teacher is not None:
        for parameter in method.teacher.parameters():  # a teacher that is not the network itself
            parameter.mul_(1.1)
    got = [loss.item() for loss in method.losses(x, y, Step(3, seed=5))]
    widths = SandwichRule(4, 2, 5).draw(3)
    assert len(got) == len(widths) == 4 and widths[0] == 3 and widths[-1] == 0
    live = supernet().train()
    logits = [live(x, width).detach() for width in widths]
    want = [F.cross_entropy(logits[0], y, label_smoothing=0.1).item()]
    for slot in (1, 2, 3):
        if target == "labels":
            loss = F.cross_entropy(logits[slot], y, label_smoothing=0.1)
        elif target == "distillation":
            loss = F.cross_entropy(logits[slot], logits[0].softmax(1))
        else:
            says = [method.teacher(x, width).softmax(1) for width in widths[:3]]
            loss = F.cross_entropy(logits[slot], sum(says) / 3 if ensemble and slot == 3 else says[0])
        want.append(loss.item())
    assert got == pytest.approx(want, rel=1e-5)


def test_teacher_has_no_gradient_and_its_statistics_follow():
    model, (x, y) = supernet(), batch()
    method = SupernetTraining(model, 4).train()
    before = {name: buffer.clone() for name, buffer in method.teacher.module.named_buffers()}
    for loss in method.losses(x, y, Step(0)):
        loss.backward()
    assert all(p.grad is None for p in method.teacher.parameters())
    assert all(p.grad is not None for p in model.parameters())
    assert all(torch.equal(b, before[name]) for name, b in method.teacher.module.named_buffers())
    assert not method.teacher.module.training and model.training
    method.after_step(Step(0))
    name = "features.0.bn.running_mean"
    want = before[name].lerp(dict(model.named_buffers())[name], 0.9)  # decay 1/10 at the first update
    torch.testing.assert_close(dict(method.teacher.module.named_buffers())[name], want)


def test_the_teacher_has_the_decay_asked_for():
    teacher = SupernetTraining(supernet(), 4, decay=0.05).teacher
    assert teacher.current_decay() == 0.05  # below where the warm-up begins


def test_each_width_updates_its_own_statistics():
    model, (x, y) = supernet(), batch()
    norm = model.features[0].bn
    list(SupernetTraining(model, 4, random=1).train().losses(x, y, Step(0)))
    middle = SandwichRule(4, 1, 0).draw(0)[1]
    assert norm.num_batches_tracked.tolist() == [int(i in (0, middle, 3)) for i in range(4)]


@pytest.mark.parametrize("target", ["labels", "distillation", "bootstrapping"])
def test_trains_on_the_loop_and_resumes_with_its_teacher(tmp_path, target):
    recipe = Recipe(epochs=0.2, lr=0.05, batch_size=64)

    def go(folder, stop=None):
        method = SupernetTraining(supernet(), 4, target=target, decay=0.9, evaluated=(0, 3))
        inner = method.after_step

        def after(at: Step) -> None:
            inner(at)
            if at.number == stop:
                raise InterruptedError

        method.after_step = after
        feed = BatchFeed(DATA, DATA.train, 64)
        result = train(
            method, feed, recipe, run=Run(folder, save_every_s=0), held_out=lambda: DATA.batches(DATA.val, 100)
        )
        return method, result

    whole, result = go(tmp_path / "whole")
    assert result.steps == 4 and set(result.metrics) == {"top1", "top1_slimmest", "top1_widest"}
    assert whole.report()["widths"] == [0, 3] and len(whole.report()["top1_by_width"]) == 2
    with pytest.raises(InterruptedError):
        go(tmp_path / "halves", stop=2)
    halves, _ = go(tmp_path / "halves")
    pairs = zip(whole.state_dict().values(), halves.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_steps_lower_the_loss_of_every_network():
    method, (x, y) = SupernetTraining(supernet(), 4, decay=0.9).train(), batch(64)
    optimizer = torch.optim.Adam(method.model.parameters(), 1e-2)
    course = []
    for n in range(60):
        optimizer.zero_grad()
        course.append([])
        for loss in method.losses(x, y, Step(n)):
            loss.backward()
            course[-1].append(loss.item())
        optimizer.step()
        method.after_step(Step(n))
    assert all(last < first - 0.2 for first, last in zip(course[0], course[-1], strict=True))


def test_one_width_is_plain_training():
    torch.manual_seed(0)
    model = create_model("slimmable_cnn", widths=(4,), blocks=(1, 1))
    assert len(list(SupernetTraining(model, 1).losses(*batch(), Step(0)))) == 1
    with pytest.raises(ValueError, match="target: must be one of labels"):
        SupernetTraining(model, 1, target="teacher")
