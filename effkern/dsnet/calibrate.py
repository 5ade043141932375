"""Batch-norm statistics of every width, measured on training data once the weights stand."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from effkern.dsnet.route import routed
from effkern.nn.switchable_bn import SwitchableBatchNorm2d


@torch.no_grad()
def calibrate(
    model: nn.Module, batches: Iterable[Tensor], widths: Sequence[int], ways: Sequence[Sequence[int]] = ()
) -> None:
    """Replace all running statistics by the plain average over ``batches``, at every width of ``widths``.

    Running averages remember only the last batches, taken while the weights still moved; a slimmable network shares
    its weights between widths, so this costs it accuracy (arXiv 1903.05134). Train or eval mode is left as it was.

    Args:
        model: Called as ``model(images, width)``.
        batches: Images, seen once; each batch runs at all widths.
        widths: Every configuration that will run. Statistics of others are forgotten.
        ways: Of a network with gates whose statistics are those of ways (``statistics="way"``): a width a gate, for
            every way that will be gone besides those of one width; see `all_ways`. Others share what a way of their
            last width throughout has.

    Raises:
        RuntimeError: if a layer has a width that no configuration reached, or there were no batches: its statistics
            would be those of an untrained layer.
    """
    with averaging(model):
        for images in batches:
            for width in widths:
                model(images, width)
            for way in ways:
                model.along(images, way)  # type: ignore[operator]
    if hasattr(model, "share_statistics"):
        model.share_statistics()
    if missed := uncalibrated(model):
        raise RuntimeError(f"calibration reached no batch at: {', '.join(missed)}")


@contextmanager
def averaging(model: nn.Module) -> Iterator[None]:
    """Inside, batch norms take the plain average of the batches that pass, from the first one on; all else is as at
    inference."""
    modes = {module: module.training for module in model.modules()}
    momenta = {norm: norm.momentum for _, norm in _norms(model)}
    model.train()  # drops folded tables; a fused block runs its batch norm in training mode only
    for module in model.modules():
        if isinstance(module, SwitchableBatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
        elif not list(module.children()):
            module.training = False  # dropout and other norms behave as they will at inference
    try:
        yield
    finally:
        for norm, momentum in momenta.items():
            norm.momentum = momentum
        for module, mode in modes.items():
            module.training = mode


def all_ways(model: nn.Module) -> list[tuple[int, ...]]:
    """Every way the gates of a network can choose, a width for each gate."""
    return list(itertools.product(*(gate.space for gate in routed(model).gates)))


def uncalibrated(model: nn.Module) -> list[str]:
    """Name every batch norm and width index whose statistics no batch has touched, as ``"name[index]"``."""
    counts = {name: norm.num_batches_tracked.tolist() for name, norm in _norms(model)}
    return [f"{name}[{i}]" for name, seen in counts.items() for i, batches in enumerate(seen) if batches == 0]


def _norms(model: nn.Module) -> Iterator[tuple[str, SwitchableBatchNorm2d]]:
    return ((name, m) for name, m in model.named_modules() if isinstance(m, SwitchableBatchNorm2d))
