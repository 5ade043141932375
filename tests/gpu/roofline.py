"""What a card's data sheet allows at best for some layers: derived, not measured. `python -m tests.gpu.roofline` prints
the table in docs/gpu.md.

The bound is the larger of two times: all bytes once through the card's memory, and all products at the tensor cores'
peak (fp16, sums in fp32, dense). Kernels with mma.sync cannot reach that peak on parts from sm_90 on, whose faster
instructions they do not use.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    name: str
    gb_s: float
    tflops: float


#: NVIDIA's data sheets.
CARDS = (
    Card("A100 80 GB SXM", 2039, 312),
    Card("H100 SXM", 3350, 989),
    Card("L4", 300, 121),
    Card("RTX 4090", 1008, 165),
)


class Work(ABC):
    """What an operator has to do in fp16 for `n` samples."""

    name: str
    n: int

    @property
    def macs(self) -> int:
        return 0

    @property
    @abstractmethod
    def bytes(self) -> int:
        """Read from memory and written to it, each once."""

    def bound_us(self, card: Card) -> tuple[float, str]:
        memory, products = self.bytes / card.gb_s / 1e3, 2 * self.macs / card.tflops / 1e6
        return max(memory, products), "memory" if memory > products else "products"


@dataclass(frozen=True)
class Layer(Work):
    """A convolution: `kept` samples of a batch run, the others are copied (block skipping)."""

    name: str
    n: int
    c_in: int
    c_out: int
    side: int  # of the output
    kernel: int
    groups: int = 1
    stride: int = 1
    kept: float = 1.0
    residual: bool = False

    @property
    def macs(self) -> int:
        taps = self.kernel**2 * self.c_in // self.groups
        return int(self.kept * self.n) * self.side**2 * self.c_out * taps

    @property
    def bytes(self) -> int:
        pixels, kept = self.side**2, int(self.kept * self.n)
        read = kept * pixels * self.stride**2 * self.c_in + self.kernel**2 * self.c_in // self.groups * self.c_out
        copied = (self.n - kept) * pixels * self.c_out
        return 2 * (read + self.n * pixels * self.c_out + copied + self.residual * kept * pixels * self.c_out)


@dataclass(frozen=True)
class WeightGradient(Work):
    """Of a convolution of stride 1: gz and x read, the fp32 sums of each slice written and read, the result written."""

    name: str
    n: int
    c_in: int
    c_out: int
    side: int
    kernel: int
    slices: int  # as wgrad_plan or column_slices cut them
    groups: int = 1

    @property
    def weights(self) -> int:
        return self.kernel**2 * self.c_in // self.groups * self.c_out

    @property
    def macs(self) -> int:
        return self.n * self.side**2 * self.weights

    @property
    def bytes(self) -> int:
        maps = self.n * self.side**2 * (self.c_in + self.c_out)
        return 2 * maps + (2 * 4 * self.slices + 2) * self.weights


@dataclass(frozen=True)
class Passes(Work):
    """Passes over maps: so many read, so many written; what is read or written by channel is little beside them."""

    name: str
    n: int
    channels: int
    side: int
    reads: int
    writes: int

    @property
    def bytes(self) -> int:
        return 2 * self.n * self.side**2 * self.channels * (self.reads + self.writes)


LAYERS: tuple[Work, ...] = (
    Layer("RepVGG 48->48 3x3 @56", 1, 48, 48, 56, 3),
    Layer("RepVGG 192->192 3x3 @14", 32, 192, 192, 14, 3),
    Layer("RepVGG 512->512 3x3 @14", 32, 512, 512, 14, 3),
    Layer("ResNet 256->64 1x1 @56", 32, 256, 64, 56, 1),
    Layer("sliced 1x1 512->512 @14, half of both", 32, 256, 256, 14, 1),
    Layer("depthwise 3x3 512 @14", 32, 512, 512, 14, 3, groups=512),
    Layer("depthwise 3x3 64->64 @112", 32, 64, 64, 112, 3, groups=64),
    Layer("skip: last 3x3 64 @8, half kept", 128, 64, 64, 8, 3, kept=0.5, residual=True),
    Passes("batch norms: 3 branches 64 @56", 32, 64, 56, reads=2 * 3, writes=1),
    Passes("their gradient", 32, 64, 56, reads=2 * (1 + 3), writes=3),
    Passes("relu's slope and bias's gradient, 192 @14", 32, 192, 14, reads=2, writes=1),
    WeightGradient("weight's gradient 192->192 3x3 @14", 32, 192, 192, 14, 3, slices=10),
    WeightGradient("weight's gradient, depthwise 3x3 512 @14", 32, 512, 512, 14, 3, slices=66, groups=512),
)


def table() -> str:
    head = "| layer, fp16 | N | MB | GMAC | " + " | ".join(card.name for card in CARDS) + " |"
    rows = [head, "|---|---|---|---|" + "---|" * len(CARDS)]
    for layer in LAYERS:
        bounds = " | ".join("{:.1f} us ({})".format(*layer.bound_us(card)) for card in CARDS)
        rows.append(f"| {layer.name} | {layer.n} | {layer.bytes / 1e6:.2f} | {layer.macs / 1e9:.3f} | {bounds} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
