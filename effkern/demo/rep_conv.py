"""Stage 2: a RepVGG-style network, trained with three branches a layer, folded to one convolution, run fused."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from effkern.models import create_model
from effkern.nn import freeze_packs
from effkern.reparam import check, fold_model, unfuse
from effkern.training import Recipe, bytes_on_disk, count_macs, count_params

from .context import DemoContext, StageResult, Subject
from .measuring import eager_forms, measure_rows

__all__ = ["FOLDED", "TRAINED", "build", "run"]

TRAINED = "RepVGG, training form"
FOLDED = "RepVGG, folded"


def build(ctx: DemoContext) -> nn.Module:
    """The training form, untrained."""
    channels, _, _ = ctx.shape
    return create_model("repvgg_small", in_channels=channels, num_classes=ctx.classes, width=8 if ctx.quick else 24)


def run(ctx: DemoContext) -> StageResult:
    """Train, fold, compare the two forms image by image, and time them."""
    torch.manual_seed(ctx.seed)
    model = build(ctx).to(memory_format=torch.channels_last)
    # One cycle; branches with batch norms of their own bear a large rate.
    recipe = Recipe(epochs=4, lr=0.4, budget_s=ctx.time_left("rep_conv"))
    trained = ctx.fit(model, recipe, batch_size=256, stream=2, desc="rep_conv: train")

    fused = freeze_packs(fold_model(model))
    fused.memory_format = torch.channels_last  # type: ignore[assignment]
    plain = unfuse(fused)
    plain.memory_format = None  # type: ignore[assignment]  # eager's own convolutions follow their weights' layout
    both = _compare(ctx, model, fused)
    sample = next(iter(ctx.batches("test")))[0]
    errors = check(model, sample, fused)

    image = torch.zeros(1, *ctx.shape)
    rows = measure_rows(
        ctx,
        "rep_conv",
        [
            Subject(
                name=TRAINED,
                top1=both.top1_trained,
                params=count_params(model),
                bytes_on_disk=bytes_on_disk(model),
                macs=count_macs(model, image),
                eager=eager_forms(model),
                relative_to=TRAINED,
                note="Three branches a layer, eager PyTorch on both sides: the time before folding.",
            ),
            Subject(
                name=FOLDED,
                top1=both.top1_fused,
                params=count_params(fused),
                bytes_on_disk=bytes_on_disk(fused),
                macs=count_macs(fused, image),
                eager=eager_forms(plain),
                run=fused,
                relative_to=TRAINED,
                note=f"Same prediction as the training form on {both.agreeing} of {both.images} test images. "
                "Eager runs the folded convolutions with a ReLU behind each.",
            ),
        ],
    )
    extra = {
        "val_top1": ctx.accuracy(model, "val"),
        "training": trained.plain(),
        "agreeing": both.agreeing,
        "images": both.images,
        "train_form_error": errors.train_error,
        "folded_error": errors.deploy_error,
    }
    notes = [trained.remark("The RepVGG")] if trained.cut_short else []
    state = {"train": model.state_dict(), "deploy": fused.state_dict()}
    return StageResult(rows, extra, state, notes)


@dataclass(frozen=True)
class _Comparison:
    """Both forms on the test images: how many there are, how many get the same first choice, top-1 in percent."""

    images: int
    agreeing: int
    top1_trained: float
    top1_fused: float


@torch.inference_mode()
def _compare(ctx: DemoContext, model: nn.Module, fused: nn.Module) -> _Comparison:
    images = agreeing = right_trained = right_fused = 0
    for x, y in ctx.batches("test"):
        trained, folded = model(x).argmax(1), fused(x).argmax(1)
        images += len(x)
        agreeing += int((trained == folded).sum())
        right_trained += int((trained == y).sum())
        right_fused += int((folded == y).sum())
    return _Comparison(images, agreeing, 100 * right_trained / images, 100 * right_fused / images)
