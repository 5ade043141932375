"""Stage 1: a small dense ResNet in plain PyTorch, the network that the other stages are held against."""

from __future__ import annotations

import torch
from torch import nn

from effkern.models import create_model
from effkern.training import Recipe, bytes_on_disk, count_macs, count_params

from .context import DemoContext, StageResult, Subject
from .measuring import eager_forms, measure_rows

__all__ = ["NAME", "build", "run", "trained"]

NAME = "ResNet-20, dense"


def build(ctx: DemoContext) -> nn.Module:
    """The network, untrained: ResNet-20 with a stem of stride 2, so that a CPU trains it in two minutes."""
    blocks = (1, 1, 1) if ctx.quick else None
    channels, _, _ = ctx.shape
    return create_model("resnet20", in_channels=channels, num_classes=ctx.classes, stem_stride=2, blocks=blocks)


def run(ctx: DemoContext) -> StageResult:
    """Train the dense network and time it in eager PyTorch."""
    torch.manual_seed(ctx.seed)
    model = build(ctx).to(memory_format=torch.channels_last)
    # A large batch keeps both cores busy at 14x14; one cycle makes few epochs count. No augmentation: after 4 epochs
    # (one seed) it had cost 0.2 to 0.4 points, and a slower machine may get no more than 3.
    recipe = Recipe(epochs=5, lr=0.4, budget_s=ctx.time_left("baseline"))
    result = ctx.fit(model, recipe, batch_size=256, stream=1, augment=False, desc="baseline: train")

    macs = count_macs(model, torch.zeros(1, *ctx.shape))
    subject = Subject(
        name=NAME,
        top1=ctx.accuracy(model),
        params=count_params(model),
        bytes_on_disk=bytes_on_disk(model),
        macs=macs,
        eager=eager_forms(model, fold=True),
        relative_to=NAME,
        note="Eager PyTorch on both sides: effkern has no part in this row.",
    )
    extra = {"val_top1": ctx.accuracy(model, "val"), "training": result.plain()}
    notes = [result.remark("The baseline")] if result.cut_short else []
    return StageResult(measure_rows(ctx, "baseline", [subject]), extra, {"model": model.state_dict()}, notes)


def trained(ctx: DemoContext) -> nn.Module:
    """The network that this stage trained, in eval mode, a fresh copy each time.

    Raises:
        CheckpointError: if the stage has not finished.
    """
    model = build(ctx)
    model.load_state_dict(ctx.load_state("baseline", "model"))
    return model.eval()
