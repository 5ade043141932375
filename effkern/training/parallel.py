"""Data parallel training under ``torchrun``: every rank takes its part of each batch and gradients are averaged.

One flat all-reduce a step rather than ``DistributedDataParallel``: that averages during the one backward of one module,
whereas a step here may have several backwards through several modules, and blocks that a rank skipped have no gradient.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = ["World", "world"]


@dataclass(frozen=True)
class World:
    """This process among those that train together."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes the files and draws the bars."""
        return self.rank == 0

    @torch.no_grad()
    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Add up the gradients of all ranks. A parameter without one on any rank stays without."""
        if self.size == 1:
            return
        parameters = list(parameters)
        used = torch.tensor([p.grad is not None for p in parameters], dtype=torch.float32, device=parameters[0].device)
        dist.all_reduce(used)
        taking_part = [p for p, ranks in zip(parameters, used.tolist(), strict=True) if ranks]
        for parameter in taking_part:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        _sum([p.grad for p in taking_part if p.grad is not None])

    @torch.no_grad()
    def average_statistics(self, module: nn.Module) -> None:
        """Average the floating-point buffers of parts in training mode (running statistics) over the ranks."""
        if self.size > 1:
            live = [part for part in module.modules() if part.training]
            buffers = [b for part in live for b in part.buffers(False) if b.is_floating_point() and b.numel()]
            _sum(buffers)
            for buffer in buffers:
                buffer /= self.size

    def sum(self, values: list[float], device: torch.device) -> list[float]:
        """Add up plain numbers over the ranks."""
        if self.size == 1:
            return values
        vector = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(vector)
        return vector.tolist()

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.size > 1:
            dist.barrier()

    @torch.no_grad()
    def copy_from_first(self, module: nn.Module) -> None:
        """Give every rank the weights and buffers of the first."""
        if self.size > 1:
            for tensor in module.state_dict().values():
                dist.broadcast(tensor, 0)


def _sum(tensors: list[Tensor]) -> None:
    """Add up each tensor over the ranks, in one message a dtype."""
    for dtype in dict.fromkeys(t.dtype for t in tensors):
        same = [t for t in tensors if t.dtype == dtype]
        flat = torch.cat([t.reshape(-1) for t in same])
        dist.all_reduce(flat)
        for tensor, part in zip(same, flat.split([t.numel() for t in same]), strict=True):
            tensor.copy_(part.view(tensor.shape))


def world(device: torch.device | None = None) -> World:
    """The processes that ``torchrun`` started, or this one alone.

    The group stays for the life of the process: several trainings follow one another, and destroying a gloo group joins
    a thread that may want the interpreter lock its caller holds.

    Args:
        device: CUDA devices talk by NCCL, everything else by gloo.
    """
    if not dist.is_available() or (not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) == 1):
        return World()
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device is not None and device.type == "cuda" else "gloo")
    return World(dist.get_rank(), dist.get_world_size())
