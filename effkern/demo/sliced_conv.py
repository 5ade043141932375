"""Stage 4: a slimmable network of four widths, run at each of them and at per-image widths."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import count

import torch
from torch import Tensor, nn

from effkern.dsnet import AtWidth, SandwichRule, calibrate, mac_table, sandwich_backward
from effkern.models.slimmable import SlimmableCNN
from effkern.nn import SlicedConvBNAct
from effkern.training import FitResult, Recipe, bytes_on_disk, count_params

from .context import DemoContext, StageResult, Subject
from .measuring import eager_forms, measure_rows

__all__ = ["run"]

WIDTHS = (8, 16, 24, 32)  # of the first stage
BLOCKS = (1, 2, 1)
CALIBRATION_BATCHES = 40

Predict = Callable[[Tensor], Tensor]


def run(ctx: DemoContext) -> StageResult:
    """Train by the sandwich rule, calibrate every width, time each of them and a mixed batch against eager PyTorch."""
    torch.manual_seed(ctx.seed)
    model = SlimmableCNN(WIDTHS, BLOCKS, num_classes=ctx.classes, in_channels=ctx.shape[0])
    widths = range(len(model.widths))
    trained = _train(ctx, model)
    state = copy.deepcopy(model.state_dict())
    macs = mac_table(model, ctx.shape, len(widths))
    for layer in blocks(model):
        layer.fold()

    subjects = []
    widest = f"slimmable, {model.widths[-1]} channels"
    for i in reversed(widths):
        narrow = narrow_network(model, i)
        subjects.append(
            Subject(
                name=f"slimmable, {model.widths[i]} channels",
                top1=ctx.accuracy(AtWidth(model, i)),
                params=count_params(narrow),
                bytes_on_disk=bytes_on_disk(state),
                macs=float(macs[i]),
                run=AtWidth(model, i),
                eager=eager_forms(narrow),
                relative_to=widest,
                note="Eager runs a separate, folded network of this width; effkern slices the one set of weights.",
            )
        )
    rule = InkRule(ctx, len(widths))
    test = ctx.data.normalize(ctx.data.test.images)
    counts = rule(test).bincount(minlength=len(widths))
    mixed = Mixed(model, rule)
    subjects.append(
        Subject(
            name="slimmable, a width per image",
            top1=ctx.accuracy(mixed),
            params=count_params(model),
            bytes_on_disk=bytes_on_disk(state),
            macs=float((counts * macs).sum()) / len(test),
            run=mixed,
            eager=eager_mixed_forms(model, rule),
            relative_to=widest,
            note="The width follows the ink of the image, a fixed rule; eager loops over the widths of the batch.",
        )
    )
    extra = {
        "widths": list(model.widths),
        "macs": macs.tolist(),
        "images_per_width": counts.tolist(),
        "training": trained.plain(),
    }
    notes = [
        "A width per image shows the cost of mixed batches only: the width follows the amount of ink, nothing learned."
    ]
    if trained.cut_short:
        notes.append(trained.remark("The slimmable network"))
    return StageResult(measure_rows(ctx, "sliced_conv", subjects), extra, {"model": state}, notes)


def _train(ctx: DemoContext, model: SlimmableCNN) -> FitResult:
    """Sandwich rule on labels, then the batch-norm statistics of every width from training images."""
    rule = SandwichRule(len(model.widths), seed=ctx.seed)
    step = count()

    def loss(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
        # Labels teach all widths: within two minutes the widest net is too weak a teacher for the others.
        return sandwich_backward(model, x, labels, rule.draw(next(step))).mean()

    # The last tenth of the time is the calibration's.
    recipe = Recipe(epochs=3, lr=0.1, budget_s=0.9 * ctx.time_left("sliced_conv"))
    trained = ctx.fit(model, recipe, batch_size=128, stream=4, loss=loss, desc="sliced_conv: train")
    images = ctx.data.train.images
    batches = (ctx.data.normalize(part) for part in images[: 256 * CALIBRATION_BATCHES].split(256))
    calibrate(model, batches, range(len(model.widths)))
    return trained


def blocks(model: SlimmableCNN) -> list[SlicedConvBNAct]:
    """The convolutions of the network, in order."""
    return [layer for layer in model.features if isinstance(layer, SlicedConvBNAct)]


def narrow_network(model: SlimmableCNN, width: int) -> nn.Sequential:
    """The network at one width as eager PyTorch runs it fastest: slices copied out, batch norm folded, no wrapper."""
    layers = [plain for layer in blocks(model) for plain in layer.narrow(width)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), model.classifier.narrow(width)).eval()


class InkRule:
    """A width index for every image from its mean brightness: as many images in every class, on the validation set."""

    def __init__(self, ctx: DemoContext, widths: int) -> None:
        ink = ctx.data.normalize(ctx.data.val.images).mean((1, 2, 3))
        self.limits = ink.quantile(torch.arange(1, widths) / widths)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.bucketize(x.mean((1, 2, 3)), self.limits)


class Mixed:
    """The slimmable network with the rule's width for each image of a batch, in one pass."""

    def __init__(self, model: nn.Module, rule: InkRule) -> None:
        self.model, self.rule = model, rule

    def __call__(self, x: Tensor) -> Tensor:
        return self.model(x, self.rule(x))


def eager_mixed_forms(model: SlimmableCNN, rule: InkRule) -> dict[str, Predict]:
    """What one writes in eager PyTorch: a loop over the widths in the batch, each on its own images."""
    forms: dict[str, Predict] = {}
    for name in eager_forms(nn.Identity()):
        networks = [eager_forms(narrow_network(model, i))[name] for i in range(len(model.widths))]

        def predict(x: Tensor, networks: list = networks) -> Tensor:
            widths = rule(x)
            scores = x.new_empty(len(x), model.classifier.out_features[-1])
            for i, network in enumerate(networks):
                rows = (widths == i).nonzero().flatten()
                if len(rows):
                    scores[rows] = network(x[rows])
            return scores

        forms[name] = predict
    return forms
