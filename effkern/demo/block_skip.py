"""Stage 3: a BlockDrop policy decides for every image which blocks of the baseline it needs; only those are
computed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effkern.blockdrop import (
    BlockDropNet,
    Curriculum,
    Finetune,
    PolicyGradient,
    PolicyNet,
    Usage,
    evaluate,
    first_blocks,
    fixed_policy,
    random_policy,
)
from effkern.models.resnet import ResNet
from effkern.nn import draw_keep, skip_form
from effkern.nn.residual import set_bn_over
from effkern.stochastic_depth import survival_schedule
from effkern.training import FitResult, Recipe, bytes_on_disk, count_macs, count_params

from . import baseline
from .context import DemoContext, StageResult, Subject
from .measuring import eager_forms, measure_rows

__all__ = ["run"]

NAME = "block_skip"
ALL = "ResNet-20, all blocks"
POLICY = "BlockDrop policy"
SHARES = {"blocks": 0.3, "policy": 0.2}  # of the training time; the rest trains both together
EPOCHS = {"blocks": 2.0, "policy": 1.6, "both": 2.0}  # what that time is worth on two quiet cores
KEPT = 0.8  # of the blocks while the network learns to do without some
GAMMA_B = 3.0  # penalty of a wrong answer in the last phase
RAMP = 0.5  # share of phase A over which the curriculum frees the blocks
SAMPLES = 12


def build_policy(ctx: DemoContext, num_blocks: int) -> PolicyNet:
    """A policy network with about a thirtieth of the baseline's multiply-adds, on the image at half its size."""
    return PolicyNet(num_blocks, in_channels=ctx.shape[0], widths=(16, 16), stem_stride=2, pool=2, init=1.0)


def run(ctx: DemoContext) -> StageResult:
    """Train the policy, then policy and network together; compare decisions, accuracy and time."""
    torch.manual_seed(ctx.seed)
    base, network = baseline.trained(ctx), baseline.trained(ctx)
    assert isinstance(base, ResNet) and isinstance(network, ResNet)
    policy = build_policy(ctx, base.num_blocks)
    seconds = ctx.time_left(NAME)

    trained_blocks = loosen(ctx, network, SHARES["blocks"] * seconds)
    loss_a = PolicyGradient(
        fast(network), gamma=1.0, curriculum=Curriculum(base.num_blocks), generator=ctx.generator(31)
    )
    trained_a = train_policy(ctx, policy, loss_a, SHARES["policy"] * seconds)
    after_a = evaluate(loss_a.backbone, policy, ctx.batches("val", 250))

    net = BlockDropNet(network, policy).to(memory_format=torch.channels_last)
    loss_b = Finetune(gamma=GAMMA_B, bn_stats="active", generator=ctx.generator(32))
    recipe = Recipe(
        EPOCHS["both"], lr=5e-4, optimizer="adamw", weight_decay=0.0, schedule="cosine", budget_s=budget(ctx)
    )
    trained_b = ctx.fit(net, recipe, stream=33, desc=f"{NAME}: policy and network", loss=loss_b)

    skipping = fast(net)
    used = evaluate(skipping.backbone, skipping.policy, ctx.batches("test", 250))
    others = static_policies(ctx, skipping.backbone, used)
    subjects, macs = compare(ctx, base, net, skipping, used)
    extra = {
        "macs": macs,
        "phases": {
            "blocks": trained_blocks.plain(),
            "policy alone": trained_a.plain(),
            "policy and network": trained_b.plain(),
        },
        "policy_alone": {"val_top1": after_a.top1, "blocks": after_a.blocks, "patterns": after_a.patterns},
        "same_budget": others,
        "network_all_blocks_top1": ctx.accuracy(skipping.backbone),
        "blocks_by_class": dict(zip(ctx.data.classes, used.by_class, strict=False)),
        "blocks": {
            "usage": used.by_block,
            "patterns": used.patterns,
            "samples": sample_images(ctx, skipping, used),
        },
        "curves": [
            curve("mean reward of the drawn decisions", "reward", loss_a.rewards, loss_b.rewards),
            curve("blocks run by the drawn decisions", "blocks", loss_a.usages, loss_b.usages, base.num_blocks),
        ],
    }
    notes = [
        f"{used.blocks:.2f} of {base.num_blocks} blocks an image, {used.patterns} different decisions. The same number "
        f"of blocks at random gives {others['random']['top1']:.1f} %, the best fixed choice of "
        f"{others['fixed']['blocks']} blocks tried {others['fixed']['top1']:.1f} %, on the same network."
    ]
    phases = ((trained_blocks, "Loosening the blocks"), (trained_a, "The policy"), (trained_b, "The last phase"))
    notes += [trained.remark(name) for trained, name in phases if trained.cut_short]
    return StageResult(measure_rows(ctx, NAME, subjects), extra, {"model": net.state_dict()}, notes)


def fast(net: nn.Module) -> Any:
    """The skipping form in the engine's native layout."""
    return skip_form(net).to(memory_format=torch.channels_last)


def budget(ctx: DemoContext, share: float | None = None) -> float:
    """Seconds a phase may take: what is left, or a share computed before; never 0, which no recipe takes."""
    return max(1e-3, ctx.time_left(NAME) if share is None else share)


def loosen(ctx: DemoContext, network: ResNet, seconds: float) -> FitResult:
    """Train the blocks to do without each other: stochastic depth, one draw of blocks a batch, dropped ones cost
    nothing.

    The baseline was trained with every block; a policy in front of it could drop hardly any.
    """
    schedule = survival_schedule(network.num_blocks, KEPT, "uniform")
    generator = ctx.generator(35)
    set_bn_over(network, "kept")

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x, draw_keep(schedule, len(x), "batch", generator)), y)

    recipe = Recipe(EPOCHS["blocks"], lr=0.05, schedule="cosine", budget_s=budget(ctx, seconds))
    return ctx.fit(network.to(memory_format=torch.channels_last), recipe, stream=36, desc=f"{NAME}: blocks", loss=loss)


def train_policy(ctx: DemoContext, policy: PolicyNet, loss: PolicyGradient, seconds: float) -> FitResult:
    """Phase A. The curriculum frees the blocks over the first half of the steps, or of the time if that is scarce."""
    course, begin = loss.curriculum, time.monotonic()
    assert course is not None
    planned = max(1, round(EPOCHS["policy"] * len(ctx.data.train) / 256))

    def free_blocks(step: int) -> None:
        done = max(step / planned, (time.monotonic() - begin) / max(seconds, 1e-9))
        course.free_blocks = 1 + int(done / RAMP * course.num_blocks)

    recipe = Recipe(
        EPOCHS["policy"], lr=4e-3, optimizer="adamw", weight_decay=0.0, schedule="cosine", budget_s=budget(ctx, seconds)
    )
    return ctx.fit(policy, recipe, stream=30, desc=f"{NAME}: policy", loss=loss, after_step=free_blocks)


def static_policies(ctx: DemoContext, backbone: nn.Module, used: Usage) -> dict[str, dict[str, float]]:
    """What decisions that do not look at the image make of the same network with as many blocks or more.

    ``random``: every image draws its own blocks, as many as the learned policy runs on average. ``fixed``: the same
    blocks for all images: those the policy uses most, or the first ones, whichever is better on held-out images.
    """
    total, generator = used.keep.shape[1], ctx.generator(34)

    at_random = random_policy(total, used.blocks, generator)
    first = first_blocks(total, used.blocks)  # rounded up, in favour of the fixed choice
    popular = torch.zeros_like(first)
    popular[torch.tensor(used.by_block).argsort(descending=True, stable=True)[: int(first.sum())]] = True
    fixed = max(
        (fixed_policy(popular), fixed_policy(first)),
        key=lambda decide: evaluate(backbone, decide, ctx.batches("val", 250)).top1,
    )
    result = {}
    for name, decide in (("random", at_random), ("fixed", fixed)):
        usage = evaluate(backbone, decide, ctx.batches("test", 250))
        result[name] = {"top1": usage.top1, "blocks": usage.blocks}
    return result


def compare(
    ctx: DemoContext, base: ResNet, net: BlockDropNet, skipping: BlockDropNet, used: Usage
) -> tuple[list[Subject], dict[str, float]]:
    """The rows of the table, and the multiply-adds they rest on."""
    image = torch.zeros(1, *ctx.shape)
    always, each = base.block_macs(ctx.shape)
    everything, policy = float(always + sum(each)), count_macs(net.policy, image)
    run = always + sum(share * macs for share, macs in zip(used.by_block, each, strict=True))
    macs = {
        "all_blocks": everything,
        "blocks_run": run,
        "policy": policy,
        "left_without_policy": run / everything,
        "left_with_policy": (run + policy) / everything,
    }
    masked = {f"masked, {name}": form for name, form in eager_forms(net).items()}
    gathered = {f"gathered, {name}": form for name, form in eager_forms(net).items()}
    for form in masked.values():
        set_bn_over(form, "all")
    for form in gathered.values():
        set_bn_over(form, "kept")
    subjects = [
        Subject(
            name=ALL,
            top1=ctx.accuracy(fast(base)),
            params=count_params(base),
            bytes_on_disk=bytes_on_disk(base),
            macs=everything,
            eager=eager_forms(base),
            run=fast(base),
            relative_to=ALL,
            note="The baseline with every block, on the same ops.",
        ),
        Subject(
            name=POLICY,
            top1=used.top1,
            params=count_params(net),
            bytes_on_disk=bytes_on_disk(net),
            macs=run + policy,
            eager={**masked, **gathered},
            run=skipping,
            relative_to=ALL,
            note=f"Runs {used.blocks:.2f} of {base.num_blocks} blocks; the policy network is in the multiply-adds "
            f"({100 * policy / everything:.0f} %) and in the time. Eager computes every block and masks, or gathers "
            "the kept images block by block; the faster one counts.",
        ),
    ]
    return subjects, macs


def sample_images(ctx: DemoContext, net: BlockDropNet, used: Usage) -> list[dict[str, Any]]:
    """Test images for the page: from those that ran the fewest blocks to those that ran the most."""
    counts = used.keep.sum(1)
    order = counts.argsort(stable=True)
    places = torch.linspace(0, len(order) - 1, min(SAMPLES, len(order))).long()
    chosen = order[places]
    with torch.inference_mode():
        scores = net(ctx.data.normalize(ctx.data.test[chosen].images))
    return [
        {"index": int(i), "predicted": int(score.argmax()), "keep": used.keep[i].int().tolist()}
        for i, score in zip(chosen, scores, strict=True)
    ]


def curve(title: str, y: str, first: Sequence[float], second: Sequence[float], scale: float = 1.0) -> dict[str, Any]:
    """A plot over the steps of both phases, in means of a few steps."""

    def points(values: Sequence[float], offset: int) -> list[list[float]]:
        width = max(1, len(values) // 40)
        chunks = [values[i : i + width] for i in range(0, len(values), width)]
        return [
            [offset + i * width + len(chunk) / 2, scale * sum(chunk) / len(chunk)] for i, chunk in enumerate(chunks)
        ]

    series = {"policy alone": points(first, 0), "policy and network": points(second, len(first))}
    return {"title": title, "x": "step", "y": y, "series": series}
