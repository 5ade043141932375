"""Replaces the convolutions, linear layers and embeddings of a model by layers that run from codes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effkern.nn.pq import PQConv2d, PQEmbedding, PQLayer, PQLinear, conv_padding
from effkern.quantize.calibration import input_metric, running_order
from effkern.quantize.kmeans import kmeans
from effkern.quantize.norms import batch_norms_behind, fold

__all__ = ["Encoded", "LayerReport", "Report", "Rule", "encode", "quantize", "regime"]


@dataclass(frozen=True)
class Rule:
    """How to quantize one layer.

    Attributes:
        d: length of a sub-vector; in (channel, row, column) order of a weight row.
        entries: size of the codebook. It is lowered to the largest power of two of at most a quarter of the
            sub-vectors: a book nearly as large as what it stands for saves nothing.
        stages: additive stages, each quantizing what the ones before left over, each with a codebook of its own.
        per_position: one codebook for every position of a row instead of one for the layer.
        row_scale: divide every row by its root mean square first and keep that as the row scale.
    """

    d: int
    entries: int = 256
    stages: int = 1
    per_position: bool = False
    row_scale: bool = False

    def __post_init__(self) -> None:
        for name in ("d", "entries", "stages"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be at least 1, got {getattr(self, name)}")
        if self.stages > 1 and self.per_position:
            raise ValueError("per_position: must be False for more than one stage, whose codebooks belong to stages")


Rules = Callable[[str, nn.Module], "Rule | None"]


@dataclass(frozen=True)
class LayerReport:
    """What became of a layer.

    Attributes:
        name: in the model.
        d, entries, stages: as used; ``entries`` after clamping.
        error: ``|W - decoded W|^2 / |W|^2``.
        why_not: reason for a layer left dense; the numbers are 0 then.
    """

    name: str
    d: int = 0
    entries: int = 0
    stages: int = 0
    error: float = 0.0
    why_not: str = ""


@dataclass
class Report:
    """Layers in the order they were treated, and the batch norms folded into them."""

    layers: list[LayerReport] = field(default_factory=list)
    folded: dict[str, str] = field(default_factory=dict)


def regime(blocks: str = "small", *, stem: bool = False, classifier_entries: int = 1024) -> Rules:
    """The block sizes of "And the Bit Goes Down": what is a sub-vector in which layer.

    3x3 convolutions ``d = 9`` (small) or 18 (large), 1x1 convolutions 4 or 8, linear layers 4 with a codebook of
    ``classifier_entries``, embeddings 8; all others 256 entries. Other kernels: one or two whole kernels a sub-vector.

    Args:
        blocks: ``"small"`` or ``"large"``.
        stem: whether convolutions of an image (at most 4 channels) are quantized too. They have few weights and much
            influence.
        classifier_entries: codebook size of linear layers.
    """
    if blocks not in ("small", "large"):
        raise ValueError(f"blocks: must be small or large, got {blocks!r}")
    times = 1 if blocks == "small" else 2

    def rule(name: str, layer: nn.Module) -> Rule | None:
        if isinstance(layer, nn.Conv2d):
            if layer.groups == 1 and layer.in_channels <= 4 and not stem:
                return None
            taps = layer.kernel_size[0] * layer.kernel_size[1]
            return Rule(4 * times if taps == 1 else taps * min(times, layer.in_channels // layer.groups))
        return Rule(4, classifier_entries) if isinstance(layer, nn.Linear) else Rule(8)

    return rule


@dataclass(frozen=True)
class Encoded:
    """A weight matrix as codes.

    Attributes:
        codes: ``[rows, J]``, or ``[rows, J, stages]`` for more than one stage, int64.
        book: ``[B, K, d]``, float32.
        scale: ``[rows]`` or None.
        error: ``|W - decoded W|^2 / |W|^2``.
    """

    codes: Tensor
    book: Tensor
    scale: Tensor | None
    error: float


def encode(weight: Tensor, rule: Rule, *, metric: Tensor | None = None, iterations: int = 50, seed: int = 0) -> Encoded:
    """Find codes, codebook and row scale for a weight matrix.

    Args:
        weight: ``[rows, columns]``; a tail that does not fill the last sub-vector counts as zeros.
        rule: how; its ``entries`` are lowered where there are too few sub-vectors.
        metric: ``[d, d]`` of :func:`effkern.quantize.kmeans`.
        iterations, seed: of k-means.

    Raises:
        ValueError: if the weight has fewer than 8 sub-vectors, which no codebook pays for.
    """
    rows, columns = weight.shape
    weight = weight.detach().float().cpu()
    size, scale = float(weight.square().sum()), None
    if rule.row_scale:
        scale = weight.square().mean(1).sqrt()
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        weight = weight / scale.unsqueeze(1)
    positions = -(-columns // rule.d)
    rest = F.pad(weight, (0, positions * rule.d - columns)).reshape(rows, positions, rule.d)
    vectors = rows if rule.per_position else rows * positions
    if vectors < 8:
        raise ValueError(f"weight: must have at least 8 sub-vectors of {rule.d} to share a codebook, got {vectors}")
    entries = min(rule.entries, 1 << ((vectors // 4).bit_length() - 1))
    codes, books = [], []
    # One round of k-means a position, or a stage, or only one; a stage sees what the ones before left over.
    for j in range(positions if rule.per_position else rule.stages):
        part = rest[:, j : j + 1] if rule.per_position else rest
        found = kmeans(part.reshape(-1, rule.d), entries, metric=metric, iterations=iterations, seed=seed)
        part -= found.book[found.codes].reshape(part.shape)
        codes.append(found.codes.reshape(part.shape[:2]))
        books.append(found.book)
    joined = torch.cat(codes, 1) if rule.per_position or rule.stages == 1 else torch.stack(codes, 2)
    left = rest.flatten(1) if scale is None else rest.flatten(1) * scale.unsqueeze(1)
    error = float(left[:, :columns].square().sum()) / size if size else 0.0
    return Encoded(joined, _stack_books(books), scale, error)


def _stack_books(books: list[Tensor]) -> Tensor:
    """One tensor of books whose sizes may differ where rows repeat; the filling is never named by a code."""
    most = max(book.shape[0] for book in books)
    return torch.stack([F.pad(book, (0, 0, 0, most - book.shape[0])) for book in books])


def quantize(
    model: nn.Module,
    rules: Rules | Rule | None = None,
    *,
    calibration: Iterable[Any] | None = None,
    fold_batch_norm: bool = False,
    iterations: int = 50,
    seed: int = 0,
    inplace: bool = False,
    progress: Callable[[list[str]], Iterable[str]] | None = None,
) -> tuple[nn.Module, Report]:
    """Give a model the PQ layers that its ``Conv2d``, ``Linear`` and ``Embedding`` layers become.

    With ``calibration``, errors are weighted by the inputs that each layer really gets: layers are treated in the order
    they run, each with those before it quantized already. Otherwise they come in the order of ``named_modules()``.

    Args:
        model: any module. A layer used under several names is replaced under all of them.
        rules: ``rules(name, layer)`` gives the :class:`Rule` of a layer or None to leave it; one rule for all; or None
            for ``regime("small")``.
        calibration: batches of inputs; a batch is what ``model`` is called with (a tuple is unpacked). A few hundred
            images are enough.
        fold_batch_norm: fold batch norms that directly follow a quantized convolution into its row scale and bias,
            where ``torch.fx`` can trace the model and so prove it; the accuracy in eval mode does not change by it.
        iterations, seed: of k-means.
        inplace: change ``model`` itself; by default a copy.
        progress: wraps the list of layer names, for a progress bar.

    Returns:
        The model in eval mode and the report on its layers.

    Raises:
        ValueError: if ``calibration`` is empty.
    """
    model = (model if inplace else copy.deepcopy(model)).eval()
    choose = _as_function(rules)
    batches = None if calibration is None else list(calibration)
    if batches is not None and not batches:
        raise ValueError("calibration: must hold a batch at least, got none")
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if type(layer) in (nn.Conv2d, nn.Linear, nn.Embedding)  # a subclass may do more than its base
    }
    norms = batch_norms_behind(model, list(layers)) if fold_batch_norm else {}
    report = Report()
    chosen = {name: choose(name, layer) for name, layer in layers.items()}
    order = list(layers) if batches is None else running_order(model, layers, batches[0])
    for name in progress(order) if progress else order:
        layer, rule = layers[name], chosen[name]
        if rule is None:
            report.layers.append(LayerReport(name, why_not="left dense by the rules"))
            continue
        try:
            _check_convertible(layer)
            metric = None if batches is None else input_metric(model, layer, batches, rule.d)
            found = encode(_matrix(layer), rule, metric=metric, iterations=iterations, seed=seed)
        except ValueError as reason:
            report.layers.append(LayerReport(name, why_not=str(reason)))
            continue
        report.layers.append(LayerReport(name, rule.d, found.book.shape[1], rule.stages, found.error))
        scale, bias = found.scale, getattr(layer, "bias", None)
        if name in norms:
            norm = model.get_submodule(norms[name])
            factor, bias = fold(norm, bias)
            scale = factor if scale is None else scale * factor.cpu()
            report.folded[name] = norms[name]
            model = _replace(model, norm, nn.Identity())
        model = _replace(model, layer, _coded(layer, found, scale, bias))
    return model.eval(), report


def _as_function(rules: Rules | Rule | None) -> Rules:
    if rules is None:
        return regime("small")
    if isinstance(rules, Rule):
        return lambda name, layer: rules
    return rules


def _matrix(layer: nn.Module) -> Tensor:
    """The weight as rows in (channel, kernel row, kernel column) order, whatever its memory layout."""
    return layer.weight.detach().flatten(1)  # type: ignore[union-attr, operator]


def _check_convertible(layer: nn.Module) -> None:
    """ValueError for what the PQ layers cannot take over."""
    if isinstance(layer, nn.Conv2d):
        conv_padding(layer)
    if isinstance(layer, nn.Embedding) and layer.max_norm is not None:
        raise ValueError(f"max_norm: must be None, got {layer.max_norm}")


def _coded(layer: nn.Module, found: Encoded, scale: Tensor | None, bias: Tensor | None) -> PQLayer:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    book = found.book.to(weight.device, weight.dtype)
    scale = None if scale is None else scale.to(weight.device, weight.dtype)
    codes = found.codes.to(weight.device)
    if isinstance(layer, nn.Conv2d):
        return PQConv2d.from_float(layer, codes, book, scale, bias)
    if isinstance(layer, nn.Linear):
        return PQLinear.from_float(layer, codes, book, scale)
    assert isinstance(layer, nn.Embedding)
    return PQEmbedding.from_float(layer, codes, book, scale)


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """Put ``new`` wherever ``old`` is; the model, which may be ``new`` itself."""
    if old is model:
        return new
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is old:
                setattr(parent, name, new)
    return model
