"""Stage 3: a BlockDrop policy decides for every image which blocks of the baseline it needs; only those are
computed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from effkern.blockdrop import BlockDropNet, Curriculum, Finetune, PolicyGradient, PolicyNet, Usage, evaluate
from effkern.models.resnet import ResNet
from effkern.nn import skip_form
from effkern.nn.residual import set_bn_over
from effkern.training import FitResult, Recipe, bytes_on_disk, count_macs, count_params

from .context import DemoContext, StageResult, Subject
from .measuring import eager_forms

__all__ = ["run"]

NAME = "block_skip"
ALL = "ResNet-20, all blocks"
POLICY = "BlockDrop policy"
SHARE_A = 0.3  # of the training time for the policy alone; the rest trains both
EPOCHS_A, EPOCHS_B = 2.0, 4.0  # what that time is worth on two quiet cores
RAMP = 0.5  # share of phase A over which the curriculum frees the blocks
SAMPLES = 12


def build_policy(ctx: DemoContext, num_blocks: int) -> PolicyNet:
    """A policy network of about a twentieth of the baseline's multiply-adds."""
    return PolicyNet(num_blocks, in_channels=ctx.shape[0], widths=(8, 16, 32), stem_stride=2, init=1.0)


def run(ctx: DemoContext) -> StageResult:
    """Train the policy, then policy and network together; compare decisions, accuracy and time."""
    torch.manual_seed(ctx.seed)
    base = ctx.baseline()
    assert isinstance(base, ResNet)
    policy = build_policy(ctx, base.num_blocks)
    seconds = ctx.time_left(NAME)

    loss_a = PolicyGradient(fast(base), gamma=1.0, curriculum=Curriculum(base.num_blocks), generator=ctx.generator(31))
    trained_a = train_policy(ctx, policy, loss_a, SHARE_A * seconds)
    after_a = evaluate(loss_a.backbone, policy, ctx.batches("val", 250))

    network = ctx.baseline()
    assert isinstance(network, ResNet)
    net = BlockDropNet(network, policy).to(memory_format=torch.channels_last)
    loss_b = Finetune(gamma=5.0, bn_stats="active", generator=ctx.generator(32))
    trained_b = ctx.fit(
        net,
        Recipe(EPOCHS_B, lr=1e-3, optimizer="adamw", weight_decay=0.0, schedule="cosine", budget_s=ctx.time_left(NAME)),
        stream=33,
        desc=f"{NAME}: policy and network",
        loss=loss_b,
    )

    skipping = fast(net)
    used = evaluate(skipping.backbone, skipping.policy, ctx.batches("test", 250))
    others = static_policies(ctx, skipping.backbone, used)
    subjects, macs = compare(ctx, base, net, skipping, used)
    extra = {
        "macs": macs,
        "phases": {"policy alone": trained_a.plain(), "policy and network": trained_b.plain()},
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
    notes += [r.remark(n) for r, n in ((trained_a, "The policy"), (trained_b, "The fine-tuning")) if r.cut_short]
    return StageResult(ctx.measure_rows(NAME, subjects), extra, {"model": net.state_dict()}, notes)


def fast(net: nn.Module) -> Any:
    """The skipping form in the engine's native layout."""
    return skip_form(net).to(memory_format=torch.channels_last)


def train_policy(ctx: DemoContext, policy: PolicyNet, loss: PolicyGradient, seconds: float) -> FitResult:
    """Phase A. The curriculum frees the blocks over the first half of the steps, or of the time if that is scarce."""
    course, begin = loss.curriculum, time.monotonic()
    assert course is not None
    planned = max(1, round(EPOCHS_A * len(ctx.data.train) / 256))

    def free_blocks(step: int) -> None:
        done = max(step / planned, (time.monotonic() - begin) / max(seconds, 1e-9))
        course.free_blocks = 1 + int(done / RAMP * course.num_blocks)

    recipe = Recipe(EPOCHS_A, lr=2e-3, optimizer="adamw", weight_decay=0.0, schedule="cosine", budget_s=seconds or 1e-9)
    return ctx.fit(policy, recipe, stream=30, desc=f"{NAME}: policy", loss=loss, after_step=free_blocks)


def static_policies(ctx: DemoContext, backbone: nn.Module, used: Usage) -> dict[str, dict[str, float]]:
    """What decisions that do not look at the image make of the same network with as many blocks or more.

    ``random``: every image draws its own blocks, as many as the learned policy runs on average. ``fixed``: the same
    blocks for all images: those the policy uses most, or the first ones, whichever is better on held-out images.
    """
    total, generator = used.keep.shape[1], ctx.generator(34)

    def at_random(x: Tensor) -> Tensor:
        low = int(used.blocks)
        counts = low + (torch.rand(len(x), 1, generator=generator) < used.blocks - low).long()
        ranks = torch.rand(len(x), total, generator=generator).argsort(1).argsort(1)
        return ranks < counts

    def always(blocks: Sequence[int]) -> Callable[[Tensor], Tensor]:
        row = torch.zeros(total, dtype=torch.bool)
        row[list(blocks)] = True
        return lambda x: row.expand(len(x), -1)

    count = min(total, -int(-used.blocks // 1))  # rounded up, in favour of the fixed choice
    popular = sorted(range(total), key=lambda k: -used.by_block[k])[:count]
    fixed = max(
        (always(popular), always(range(count))),
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
