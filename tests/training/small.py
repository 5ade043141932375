"""A training run small enough to be killed and repeated: everything random that a real one has."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effkern.data import BatchFeed, Dataset, Split
from effkern.training import Batches, Method, Recipe, Run, Step, evaluate, train

RECIPE = Recipe(epochs=5, lr=0.05, batch_size=16, ema=0.9, clip=1.0, schedule="cosine", warmup=0.2, accumulate=2)


def data(images: int = 64) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (images, 1, 6, 6), generator=generator, dtype=torch.uint8)
    labels = (pixels[:, 0, 2:4, 2:4].float().mean((1, 2)) > 127).long()
    every = Split(pixels, labels)
    return Dataset("noise", "made up", every, every[: images // 2], every, ("dark", "bright"), 0.5, 0.3, flip=True)


def network(norm: bool = True, dropout: bool = True) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4) if norm else nn.GroupNorm(2, 4),
        nn.ReLU(),
        nn.Dropout(0.2 if dropout else 0.0),
        nn.Conv2d(4, 6, 3, stride=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 2),
    ).to(memory_format=torch.channels_last)


class Noisy(Method):
    """Two losses a step, the second on inputs with noise drawn by the step; counts its steps in a buffer."""

    score = "top1"
    steps: Tensor

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def losses(self, x: Tensor, y: Tensor, at: Step):
        yield F.cross_entropy(self.net(x), y)
        noise = at.uniform(len(x), *x.shape[1:], stream=1)
        at.metrics["noise"] = noise.mean()
        yield 0.5 * F.cross_entropy(self.net(x + 0.1 * noise), y)

    def after_step(self, at: Step) -> None:
        self.steps += 1

    def evaluate(self, batches: Batches) -> dict[str, float]:
        return {"top1": evaluate(self.net, batches)}

    def result(self) -> nn.Module:
        return self.net


def go(folder: Path, method: Method | None = None, recipe: Recipe = RECIPE, **options):
    """Train in ``folder``, from its newest checkpoint on."""
    images = data()
    method = Noisy(network()) if method is None else method
    feed = BatchFeed(images, images.train, recipe.batch_size, recipe.seed, augment=True)
    run = Run(folder, **{"save_every_s": 0.0, "log_every": 3, **options})
    held_out = lambda: images.batches(images.val, 32)  # noqa: E731
    return method, train(method, feed, recipe, run=run, held_out=held_out)
