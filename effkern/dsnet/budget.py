"""Meet a budget of multiply-adds: one price on them, the same for all images, found on images held out."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from effkern.dsnet.route import Routed, routed

__all__ = ["meet_budget"]

_STEPS = 60


@torch.no_grad()
def meet_budget(net: nn.Module, images: Iterable[Tensor], budget: float, costs: Tensor) -> float:
    """Set the gates' offsets to ``-price * cost`` so that ``images`` cost ``budget`` multiply-adds on average.

    A gate trained towards a budget comes near it; its average over other images, and any other budget asked of the same
    gate later, is a matter of where its logits are cut. The cost falls with the price, so halving an interval finds it.

    Args:
        net: See `effkern.dsnet.Routed`; in eval mode.
        images: Batches of images, gone through once for a network of one gate, again and again for one of several.
        budget: Multiply-adds an image, gates included.
        costs: Of the ways, from `effkern.dsnet.route_costs`.

    Returns:
        What ``images`` cost then, as near as different images allow.

    Raises:
        ValueError: if no way is so cheap or so dear.
    """
    model = routed(net)
    low, high = int(costs.min()), int(costs.max())
    if not low <= budget <= high:
        raise ValueError(f"budget: must be in [{low}, {high}] multiply-adds, got {budget:g}")
    shares = [_marginal(costs, k) / high for k in range(costs.dim())]
    known = [_first_logits(model, x) for x in images] if costs.dim() == 1 else None

    def spent(price: float) -> float:
        for gate, share in zip(model.gates, shares, strict=True):
            gate.offset.copy_(-price * share)
        if known is not None:
            choices = [model.gates[0].choose(z)[:, None] for z in known]
        else:
            choices = [model.route(x)[1] for x in images]
        return float(costs[torch.cat(choices).cpu().unbind(1)].double().mean())

    cheap, dear = 1.0, -1.0
    while spent(cheap) > budget and cheap < 1e6:
        cheap *= 2
    while spent(dear) < budget and dear > -1e6:
        dear *= 2
    for _ in range(_STEPS if known is not None else 16):
        middle = (cheap + dear) / 2
        if spent(middle) > budget:
            dear = middle
        else:
            cheap = middle
    return spent(min((cheap, dear), key=lambda price: abs(spent(price) - budget)))


def _marginal(costs: Tensor, k: int) -> Tensor:
    """Cost of the choices of gate ``k``, the mean over those of the others."""
    others = [dim for dim in range(costs.dim()) if dim != k]
    return costs.double().mean(others) if others else costs.double()


def _first_logits(model: Routed, x: Tensor) -> Tensor:
    return model.gates[0].decide(model.segment(0, x, 0), 0)[1]
