"""Stage 2: a RepVGG-style network, trained with three branches a layer, folded to one convolution, run fused."""

from __future__ import annotations

import torch
from torch import nn

from effkern.models import create_model
from effkern.reparam import check, fold_model, unfuse
from effkern.training import Recipe, bytes_on_disk, count_macs, count_params

from .context import DemoContext, StageResult, Subject
from .measuring import eager_forms

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
    recipe = Recipe(epochs=5, lr=0.4, budget_s=ctx.time_left("rep_conv"))
    trained = ctx.fit(model, recipe, batch_size=256, stream=2, desc="rep_conv: train")

    fused = fold_model(model)
    fused.memory_format = torch.channels_last  # type: ignore[assignment]
    plain = unfuse(fused)
    plain.memory_format = None  # type: ignore[assignment]  # eager's own convolutions follow their weights' layout
    agreeing, images = _agreement(ctx, model, fused)
    sample = next(iter(ctx.batches("test")))[0]
    errors = check(model, sample, fused)

    image = torch.zeros(1, *ctx.shape)
    rows = ctx.measure_rows(
        "rep_conv",
        [
            Subject(
                name=TRAINED,
                top1=ctx.accuracy(model),
                params=count_params(model),
                bytes_on_disk=bytes_on_disk(model),
                macs=count_macs(model, image),
                eager=eager_forms(model),
                relative_to=TRAINED,
                note="Three branches a layer, eager PyTorch on both sides: the time before folding.",
            ),
            Subject(
                name=FOLDED,
                top1=ctx.accuracy(fused),
                params=count_params(fused),
                bytes_on_disk=bytes_on_disk(fused),
                macs=count_macs(fused, image),
                eager=eager_forms(plain),
                run=fused,
                relative_to=TRAINED,
                note=f"Same prediction as the training form on {agreeing} of {images} test images. "
                "Eager runs the folded convolutions with a ReLU behind each.",
            ),
        ],
    )
    extra = {
        "val_top1": ctx.accuracy(model, "val"),
        "training": trained.plain(),
        "agreeing": agreeing,
        "images": images,
        "train_form_error": errors.train_error,
        "folded_error": errors.deploy_error,
    }
    notes = [trained.remark("The RepVGG")] if trained.cut_short else []
    state = {"train": model.state_dict(), "deploy": fused.state_dict()}
    return StageResult(rows, extra, state, notes)


@torch.inference_mode()
def _agreement(ctx: DemoContext, model: nn.Module, fused: nn.Module) -> tuple[int, int]:
    """Test images on which both forms have the same first choice, and how many images there are."""
    agreeing = images = 0
    for x, _ in ctx.batches("test"):
        agreeing += int((model(x).argmax(1) == fused(x).argmax(1)).sum())
        images += len(x)
    return agreeing, images
