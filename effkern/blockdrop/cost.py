"""What the blocks of a network cost, for a reward that counts work or time instead of blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from effkern.blockdrop.network import BlockDropNet, eval_mode
from effkern.training import count_macs, measure

__all__ = ["CostKind", "block_costs"]

CostKind = Literal["macs", "time"]


def block_costs(
    net: BlockDropNet, image: Sequence[int], kind: CostKind = "macs", batch: int = 8, seconds: float = 1.0
) -> tuple[Tensor, float]:
    """What each block costs, float32 ``[K]``, and what every image costs besides: stem, shortcuts, head, policy.

    Args:
        net: backbone and policy. For ``"macs"`` the backbone has ``block_macs(image)``, for ``"time"`` ``stem``,
            ``body`` and ``head``, as :class:`effkern.models.resnet.ResNet`.
        image: ``(C, H, W)``.
        kind: ``"macs"``: multiply-adds an image. ``"time"``: milliseconds a batch on this machine, as it is now: a
            block's is the time of its stretch of the network with it less that without. Another measurement gives other
            numbers; :class:`effkern.blockdrop.PolicyTraining` keeps those it began with in its checkpoints.
        batch: images in a measurement.
        seconds: of the measurement, at least; every block is run ten times or more.

    Raises:
        ValueError: for an unknown kind, or a backbone that lacks what it needs.
    """
    backbone: Any = net.backbone
    if kind not in ("macs", "time"):
        raise ValueError(f"kind must be 'macs' or 'time', got {kind!r}")
    for part in ("block_macs",) if kind == "macs" else ("stem", "body", "head"):
        if not hasattr(backbone, part):
            raise ValueError(f"backbone: {type(backbone).__name__} has no {part}(), which its costs are found by")
    parameter = next(net.parameters())
    x = torch.zeros(1, *image, device=parameter.device, dtype=parameter.dtype)
    if kind == "macs":
        always, each = backbone.block_macs(tuple(image))
        return torch.tensor(each, dtype=torch.float32), float(always) + count_macs(net.policy, x)
    x = x.expand(batch, -1, -1, -1).contiguous(memory_format=torch.channels_last)
    with eval_mode(net), torch.no_grad():
        return _measured(backbone, net.policy, x, seconds)


def _measured(backbone: Any, policy: nn.Module, x: Tensor, seconds: float) -> tuple[Tensor, float]:
    count = int(backbone.num_blocks)
    on = torch.ones(len(x), count, dtype=torch.bool, device=x.device)
    functions: dict[str, Callable[[], object]] = {"policy": partial(policy, x), "stem": partial(backbone.stem, x)}
    state = backbone.stem(x)
    for k in range(count):
        for name, keep in (("with", on), ("without", ~on)):
            functions[f"{name} {k}"] = partial(backbone.body, state, keep, k, k + 1)
        state = backbone.body(state, on, k, k + 1)
    functions["head"] = partial(backbone.head, state)
    ms = {name: time.median_ms for name, time in measure(functions, seconds=seconds).items()}
    each = [max(0.0, ms[f"with {k}"] - ms[f"without {k}"]) for k in range(count)]
    return torch.tensor(each), sum(ms.values()) - sum(ms[f"with {k}"] for k in range(count))
