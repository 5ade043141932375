"""Tuning of centroids, scales and biases after quantization; the codes stay."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from effkern.nn.pq import PQLayer
from effkern.training import soft_divergence

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


def distillation_loss(teacher: nn.Module, temperature: float = 1.0) -> Loss:
    """``loss(model, x, labels)``: Kullback-Leibler divergence of the teacher's softened scores; labels are not used."""
    if not temperature > 0:
        raise ValueError(f"temperature: must be positive, got {temperature}")
    teacher = teacher.eval()

    def loss(model: nn.Module, x: Tensor, labels: Tensor | None = None) -> Tensor:
        with torch.no_grad():
            wanted = teacher(x)
        return soft_divergence(model(x), wanted, temperature)

    return loss


def uses(layer: PQLayer) -> Tensor:
    """How many codes name each entry, ``[books, K]``; 0 for an entry without a use."""
    books, entries, _ = layer.codebook.shape
    codes = layer.codes.long()
    if books > 1:
        codes = codes + torch.arange(books, device=codes.device) * entries
    return torch.bincount(codes.flatten(), minlength=books * entries).reshape(books, entries)


@contextmanager
def mean_gradients(model: nn.Module) -> Iterator[None]:
    """Inside, gradients of codebooks are means over the uses of an entry, as in "And the Bit Goes Down", not sums."""
    handles = []
    for layer in {m for m in model.modules() if isinstance(m, PQLayer)}:
        counts = uses(layer).clamp(min=1).unsqueeze(2)
        handles.append(layer.codebook.register_hook(lambda grad, counts=counts: grad / counts))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def tune(
    model: nn.Module,
    teacher: nn.Module,
    batches: Iterable[Tensor],
    *,
    lr: float = 0.01,
    momentum: float = 0.9,
    temperature: float = 1.0,
    grad_reduce: str = "mean",
) -> list[float]:
    """Tune what is left to tune in a quantized model until its scores are the teacher's.

    One SGD step a batch with a learning rate that falls to 0 along a cosine over the batches. The model stays in eval
    mode, so that batch norms keep their statistics; their weights are tuned.

    Args:
        model: changed in place.
        teacher: the dense model.
        batches: inputs.
        lr: at the start; for ``grad_reduce="sum"`` about ten times smaller than for ``"mean"``.
        momentum: of SGD.
        temperature: of both softmaxes.
        grad_reduce: ``"mean"`` divides the gradient of an entry by the number of its uses, ``"sum"`` does not.

    Returns:
        The loss of every step.

    Raises:
        FloatingPointError: if the loss stops being finite.
    """
    if grad_reduce not in ("mean", "sum"):
        raise ValueError(f"grad_reduce: must be mean or sum, got {grad_reduce!r}")
    inputs = list(batches)
    loss, model = distillation_loss(teacher, temperature), model.eval()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr, momentum=momentum)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, len(inputs)))
    losses: list[float] = []
    with mean_gradients(model if grad_reduce == "mean" else nn.Identity()):
        for x in inputs:
            optimizer.zero_grad(set_to_none=True)
            value = loss(model, x, x)
            value.backward()
            losses.append(value.item())
            if not torch.isfinite(value.detach()):
                raise FloatingPointError(f"the loss became {losses[-1]} after {len(losses) - 1} steps")
            optimizer.step()
            schedule.step()
    return losses
