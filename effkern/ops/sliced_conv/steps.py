"""The steps of a chain of sliced layers, and how they are written for its operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from effkern.ops import _checks as check

Ints = Sequence[int]
_OP = "sliced_chain"
_CONV, _ATTENTION, _MEAN = range(3)


class SlicedStep(NamedTuple):
    """``act(conv2d(v) * scale + shift)`` of the value ``v`` before, at the widths of a configuration.

    Attributes:
        handle: index of the packed weight.
        weight_shape: ``[Co, Ci / groups, kh, kw]`` of the whole weight.
        widths: output channels in every configuration, at most ``Co``.
        table: number of the pair of tables; -1 for none.
        stride, padding, dilation: rows and columns.
        groups: 1, or ``Co`` where the weight is depthwise.
        act: the activation.
    """

    handle: int
    weight_shape: tuple[int, int, int, int]
    widths: tuple[int, ...]
    table: int = -1
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    act: str = "none"


class AttentionStep(NamedTuple):
    """``v * sigmoid(expand(relu(reduce(mean of v over its map)))))``: squeeze and excitation of the running channels.

    Attributes:
        reduce, expand: indices of the packed weights ``[hidden, channels, 1, 1]`` and ``[channels, hidden, 1, 1]``.
        hidden, channels: of the whole weights.
    """

    reduce: int
    expand: int
    hidden: int
    channels: int


class MeanStep(NamedTuple):
    """The mean over the map: ``[n, c, 1, 1]``."""


Step = SlicedStep | AttentionStep | MeanStep


def write_steps(steps: Sequence[Step]) -> list[int]:
    """Steps as the operator takes them: the number of configurations, then every step's kind and fields in order."""
    numbers = [next((len(s.widths) for s in steps if isinstance(s, SlicedStep)), 1)]
    for s in steps:
        if isinstance(s, SlicedStep):
            if len(s.widths) != numbers[0]:
                raise ValueError(f"{_OP}: steps must have {numbers[0]} widths each, got {len(s.widths)}")
            check.check_act(s.act, _OP)
            act = check.ACTIVATIONS.index(s.act)
            numbers += (_CONV, s.handle, s.table, *s.weight_shape, *s.stride, *s.padding, *s.dilation, s.groups, act)
            numbers += s.widths
        elif isinstance(s, AttentionStep):
            numbers += (_ATTENTION, *s)
        else:
            numbers.append(_MEAN)
    return numbers


def read_steps(numbers: Ints) -> tuple[int, list[Step]]:
    """The inverse of :func:`write_steps`, and the number of configurations."""
    rest = list(numbers)

    def take(count: int) -> list[int]:
        if len(rest) < count:
            raise ValueError(f"{_OP}: steps must not end in the middle of one, got {len(numbers)} numbers")
        taken = rest[:count]
        del rest[:count]
        return taken

    (configurations,) = take(1)
    if not 1 <= configurations < check.LIMIT:
        raise ValueError(f"{_OP}: the number of configurations must be in [1, 2**31 - 1], got {configurations}")
    steps: list[Step] = []
    while rest:
        (kind,) = take(1)
        if kind == _CONV:
            handle, table, outs, ins, kh, kw, sh, sw, ph, pw, dh, dw, groups, act = take(14)
            if not 0 <= act < len(check.ACTIVATIONS):
                raise ValueError(f"{_OP}: the activation of a step must be in [0, 4], got {act}")
            widths = tuple(take(configurations))
            geometry = ((sh, sw), (ph, pw), (dh, dw), groups)
            steps.append(SlicedStep(handle, (outs, ins, kh, kw), widths, table, *geometry, check.ACTIVATIONS[act]))
        elif kind == _ATTENTION:
            steps.append(AttentionStep(*take(4)))
        elif kind == _MEAN:
            steps.append(MeanStep())
        else:
            raise ValueError(f"{_OP}: the kind of a step must be in [0, 2], got {kind}")
    if not steps or not isinstance(steps[0], SlicedStep) or not isinstance(steps[-1], SlicedStep):
        raise ValueError(f"{_OP}: the first and the last step must be convolutions")
    return configurations, steps
