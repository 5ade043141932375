"""The measurement phase of a stage: subjects in, rows of the table out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from itertools import cycle, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from effkern.training import Timing

from .context import BATCH, POOL, SINGLES, DemoContext, Predict, Row, Subject

__all__ = ["eager_forms", "measure_rows"]

TOLERANCE = 1e-3  # of the largest score: fp32 sums in another order differ by about 1e-6, a wrong kernel by far more
ALLOWED = 0.01  # images whose dynamic decision may tip over on such a difference


LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


def eager_forms(model: nn.Module, *, fold: bool = False) -> dict[str, Predict]:
    """Copies of a network in both memory layouts, in eval mode: what eager PyTorch offers.

    Args:
        model: any network.
        fold: whether to add both layouts with batch norm folded into the convolution before it, as who cares for
            speed does. Pairs are neighbours in a Sequential, elsewhere ``conv<x>`` and ``bn<x>``.
    """
    forms = {"": model, **({", norms folded": _folded(model)} if fold else {})}
    return {
        name + suffix: copy.deepcopy(form).eval().to(memory_format=layout)
        for suffix, form in forms.items()
        for name, layout in LAYOUTS.items()
    }


def _folded(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model).eval()
    for parent in list(model.modules()):
        children = dict(parent.named_children())
        if isinstance(parent, nn.Sequential):
            pairs = list(pairwise(children))
        else:
            pairs = [(name, name.replace("conv", "bn")) for name in children]
        for conv_name, norm_name in pairs:
            conv, norm = children[conv_name], children.get(norm_name)
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(parent, conv_name, fuse_conv_bn_eval(conv, norm))
                setattr(parent, norm_name, nn.Identity())
    return model


def measure_rows(ctx: DemoContext, stage: str, subjects: Sequence[Subject]) -> list[Row]:
    """Time every subject and its eager forms at batch 1 and 64, all interleaved, and make the table's rows.

    Call it once a stage, when training is over. Timed calls take different test images in turn, the same ones
    for everybody. Before that every form must give the same scores as the first one: wrong results have no speed.

    Raises:
        ValueError: if names repeat, a subject has nothing to run, ``relative_to`` names no subject, or there are
            fewer test images than a batch.
        RuntimeError: if two forms of one subject disagree on more than 1 % of the images.
    """
    forms = _forms(subjects)
    images = ctx.data.normalize(ctx.data.test[: BATCH * POOL].images)
    if len(images) < BATCH:
        raise ValueError(f"data.test: must hold at least {BATCH} images to time a batch, got {len(images)}")
    disagreeing = {subject.name: _disagreeing(stage, subject, images) for subject in subjects}
    seconds = ctx.measure_s * len(forms) / 2  # half for each batch size
    timings = {
        size: ctx.measure({key: _turns(function, images, size) for key, function in forms.items()}, seconds)
        for size in (1, BATCH)
    }
    rows = [_row(stage, subject, timings, disagreeing[subject.name]) for subject in subjects]
    by_name = {row.name: row for row in rows}
    for row, subject in zip(rows, subjects, strict=True):
        if subject.relative_to is not None:
            whole = by_name[subject.relative_to]
            row.macs_left = row.macs / whole.macs
            row.time_left_b1 = row.ms_b1 / whole.ms_b1
            row.time_left_b64 = row.ms_b64 / whole.ms_b64
    return rows


def _forms(subjects: Sequence[Subject]) -> dict[Any, Predict]:
    """(subject, form) -> function, with form None for effkern's own."""
    names = [subject.name for subject in subjects]
    if len(set(names)) != len(names):
        raise ValueError(f"subjects: names must differ, got {names}")
    forms: dict[Any, Predict] = {}
    for subject in subjects:
        if not subject.eager:
            raise ValueError(f"subjects[{subject.name!r}].eager: must hold at least one form, got none")
        if subject.relative_to is not None and subject.relative_to not in names:
            raise ValueError(
                f"subjects[{subject.name!r}].relative_to: must be one of {names}, got {subject.relative_to!r}"
            )
        if subject.run is not None:
            forms[subject.name, None] = subject.run
        forms.update({(subject.name, form): function for form, function in subject.eager.items()})
    return forms


def _turns(function: Predict, images: Tensor, size: int) -> Callable[[], object]:
    """A function without arguments that runs the next batch of ``images`` at each call."""
    if size == 1:
        groups = [[image[None] for image in group] for group in images.split(SINGLES)]
    else:
        groups = [[group] for group in images.split(size) if len(group) == size]
    turn = cycle(groups)

    def call() -> None:
        for x in next(turn):
            function(x)

    return call


def _disagreeing(stage: str, subject: Subject, images: Tensor) -> float:
    """Largest fraction of images on which two forms give different scores."""
    functions = {**({"effkern": subject.run} if subject.run else {}), **subject.eager}
    with torch.inference_mode():
        scores = {form: torch.cat([f(x) for x in images.split(BATCH)]).float() for form, f in functions.items()}
    first, wanted = next(iter(scores.items()))
    worst = 0.0
    for form, got in scores.items():
        apart = (got - wanted).abs().amax(1) > TOLERANCE * wanted.abs().max()
        share = float(apart.float().mean()) if bool(got.isfinite().all()) else 1.0
        if share > ALLOWED:
            raise RuntimeError(
                f"{stage}, {subject.name}: {form!r} and {first!r} must agree, "
                f"but differ on {100 * share:.1f} % of the images"
            )
        worst = max(worst, share)
    return worst


def _row(stage: str, subject: Subject, timings: dict[int, dict[Any, Timing]], disagreeing: float) -> Row:
    values: dict[str, Any] = {}
    for size, label in ((1, "b1"), (BATCH, "b64")):
        images = SINGLES if size == 1 else size
        eager = {form: timings[size][subject.name, form].per(images) for form in subject.eager}
        form = min(eager, key=lambda name: eager[name].median_ms)
        own = eager[form] if subject.run is None else timings[size][subject.name, None].per(images)
        values |= {
            f"ms_{label}": own.median_ms,
            f"ms_{label}_min": own.min_ms,
            f"eager_ms_{label}": eager[form].median_ms,
            f"eager_ms_{label}_min": eager[form].min_ms,
            f"eager_form_{label}": form,
        }
        values["repetitions"] = min(values.get("repetitions", own.n), own.n)
    return Row(
        stage=stage,
        name=subject.name,
        top1=subject.top1,
        params=subject.params,
        bytes_on_disk=subject.bytes_on_disk,
        macs=subject.macs,
        relative_to=subject.relative_to,
        eager_only=subject.run is None,
        disagreeing=disagreeing,
        note=subject.note,
        **values,
    )
