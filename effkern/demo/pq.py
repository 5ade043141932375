"""Stage 5: the baseline's convolutions and classifier as codes, run from the codes."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effkern.nn.pq import PQConv2d, PQLayer, PQLinear
from effkern.nn.residual import ResidualBlock
from effkern.quantize import Report, Rule, distillation_loss, packed_state, quantize, size_of
from effkern.quantize.storage import unpacked_state
from effkern.training import Recipe, bytes_on_disk, count_macs, count_params

from . import baseline
from .context import DemoContext, StageResult, Subject
from .measuring import eager_forms, measure_rows

__all__ = ["run"]

DENSE = "ResNet-20, dense (again)"
RESIDENT, PER_CALL = "ResNet-20 as codes", "ResNet-20 as codes, decoded per call by eager"
ENTRIES, CLASSIFIER_ENTRIES = 256, 64
CALIBRATION = 256  # images
ITERATIONS = 20  # of k-means: the tuning afterwards gains more from a second than the last iterations do


class FusedBlock(nn.Module):
    """A residual block of PQ convolutions with folded batch norms, the first ReLU fused."""

    def __init__(self, block: ResidualBlock) -> None:
        super().__init__()
        if not isinstance(block.conv1, PQConv2d) or not isinstance(block.bn1, nn.Identity):
            raise ValueError("block: must have PQ convolutions with their batch norms folded in")
        self.conv1, self.conv2, self.bn2, self.downsample = block.conv1, block.conv2, block.bn2, block.downsample
        self.conv1.act = "relu"

    def forward(self, x: Tensor, keep: None = None) -> Tensor:
        """The block with all samples kept."""
        shortcut = x if self.downsample is None else self.downsample(x)
        return F.relu(self.bn2(self.conv2(self.conv1(x))) + shortcut)


class DecodingLayer(nn.Module):
    """A PQ layer as it is usually run: eager PyTorch rebuilds the dense weight at every call."""

    def __init__(self, layer: PQConv2d | PQLinear) -> None:
        super().__init__()
        self.layer = layer
        self.register_buffer("index", layer.codes.long(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Index, scale, then the dense layer."""
        layer = self.layer
        weight = layer.codebook[0][self.index].flatten(1)[:, : layer.columns]
        if layer.scale is not None:
            weight = weight * layer.scale.unsqueeze(1)
        return _dense(layer, x, weight)


class DenseLayer(nn.Module):
    """A PQ layer decoded once, its dense weight kept."""

    def __init__(self, layer: PQConv2d | PQLinear) -> None:
        super().__init__()
        self.layer = layer
        weight = layer.dense_weight().detach()
        if isinstance(layer, PQConv2d):
            weight = weight.reshape(layer.out_channels, -1, *layer.kernel_size)
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        """The dense layer."""
        return _dense(self.layer, x, self.weight)


def _dense(layer: PQConv2d | PQLinear, x: Tensor, weight: Tensor) -> Tensor:
    if isinstance(layer, PQLinear):
        return F.linear(x, weight, layer.bias)
    weight = weight.reshape(layer.out_channels, -1, *layer.kernel_size)
    y = F.conv2d(x, weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)  # type: ignore[arg-type]
    return F.relu(y) if layer.act == "relu" else y


def _with_layers(model: nn.Module, make: Any) -> nn.Module:
    """A copy of the model with every PQ layer replaced by ``make(layer)``."""
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, PQLayer):
                setattr(parent, name, make(child))
    return model.eval()


def _fuse(model: nn.Module) -> nn.Module:
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, ResidualBlock):
                setattr(parent, name, FusedBlock(child))
    return model


def _rule(ctx: DemoContext, layer: nn.Module) -> Rule | None:
    """A code for every 3x3 kernel and every 4 weights of the classifier; the stem, 0.05 % of the weights, stays."""
    if isinstance(layer, nn.Linear):
        return Rule(4, CLASSIFIER_ENTRIES)
    if isinstance(layer, nn.Conv2d) and layer.in_channels == ctx.shape[0]:
        return None
    # The row scale costs nothing: the folded batch norm needs one anyway.
    return Rule(9, 16 if ctx.quick else ENTRIES, row_scale=True)


def _through_the_file(model: nn.Module) -> None:
    """Give the model the weights that its file holds, whose codebooks are rounded to 16 bits."""
    model.load_state_dict(unpacked_state(packed_state(model), model))


def run(ctx: DemoContext) -> StageResult:
    """Quantize the trained baseline, tune its centroids, and time it against eager PyTorch."""
    dense = baseline.trained(ctx)
    batch = next(iter(ctx.batches("train", 64 if ctx.quick else CALIBRATION, train=True, stream=51)))[0]
    coded, report = quantize(
        dense,
        lambda name, layer: _rule(ctx, layer),
        calibration=[batch],
        fold_batch_norm=True,
        iterations=ITERATIONS,
        seed=ctx.seed,
        progress=lambda names: ctx.progress(names, "pq: k-means"),
    )
    untuned = ctx.accuracy(coded, "val")
    # Adam, because the gradient of a centroid grows with the number of its uses and Adam's step does not.
    recipe = Recipe(epochs=1.5, lr=3e-3, optimizer="adamw", weight_decay=0.0, budget_s=0.9 * ctx.time_left("pq"))
    tuned = ctx.fit(coded, recipe, batch_size=128, stream=52, loss=distillation_loss(dense), desc="pq: tune centroids")
    _through_the_file(coded)
    return _measured(ctx, dense, _fuse(coded), report, untuned, tuned)


def _measured(
    ctx: DemoContext, dense: nn.Module, coded: nn.Module, report: Report, untuned: float, tuned: Any
) -> StageResult:
    x = torch.zeros(1, *ctx.shape)
    size, dense_bytes = size_of(coded), bytes_on_disk(dense)
    coded = coded.to(memory_format=torch.channels_last).eval()
    resident, per_call = _with_layers(coded, DenseLayer), _with_layers(coded, DecodingLayer)
    common: dict[str, Any] = {
        "top1": ctx.accuracy(coded),
        "params": count_params(dense),
        "bytes_on_disk": size.total,
        "macs": count_macs(coded, x),
        "run": lambda x: coded(x.to(memory_format=torch.channels_last)),
        "relative_to": DENSE,
    }
    again = Subject(
        DENSE,
        ctx.accuracy(dense),
        count_params(dense),
        dense_bytes,
        count_macs(dense, x),
        eager_forms(dense),
        relative_to=DENSE,
        note="The baseline, timed together with its quantized form.",
    )
    kept = Subject(
        RESIDENT,
        eager=eager_forms(resident),
        note=f"Eager keeps the decoded dense weights, {dense_bytes / size.total:.0f} times the bytes of the codes.",
        **common,
    )
    rebuilt = Subject(
        PER_CALL,
        eager=eager_forms(per_call),
        note="The same network; eager holds the codes too and rebuilds the dense weights at every call.",
        **common,
    )
    rows = measure_rows(ctx, "pq", [again, kept, rebuilt])
    extra = {
        "val_top1_untuned": untuned,
        "val_top1": ctx.accuracy(coded, "val"),
        "training": tuned.plain(),
        "bytes": {"codes": size.codes, "codebooks": size.codebooks, "rest": size.rest, "header": size.header},
        "layers": [{"name": r.name, "d": r.d, "entries": r.entries, "error": round(r.error, 4)} for r in report.layers],
    }
    notes = [
        f"pq: as codes the network takes {size.total / 1e3:.0f} kB instead of {dense_bytes / 1e3:.0f} kB. On held-out "
        f"images it was right in {untuned:.1f} % after k-means, {extra['val_top1']:.1f} % after tuning the centroids.",
        *([f"pq: {r.name} stayed dense: {r.why_not}" for r in report.layers if r.why_not]),
        *([tuned.remark("The tuning of the centroids")] if tuned.cut_short else []),
    ]
    return StageResult(rows, extra, {"model": coded.state_dict()}, notes)
