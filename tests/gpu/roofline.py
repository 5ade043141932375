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
    kernels: tuple[str, ...]

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
    kernels: tuple[str, ...] = ("conv",)

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
    kernels: tuple[str, ...] = ("wgrad", "fold")

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
    kernels: tuple[str, ...]

    @property
    def bytes(self) -> int:
        return 2 * self.n * self.side**2 * self.channels * (self.reads + self.writes)


@dataclass(frozen=True)
class Terms(Work):
    """What is neither: the bytes of one tensor after the other."""

    name: str
    n: int
    kernels: tuple[str, ...]
    moved: tuple[int, ...]
    products: int = 0

    @property
    def macs(self) -> int:
        return self.products

    @property
    def bytes(self) -> int:
        return sum(self.moved)


LAYERS: tuple[Work, ...] = (
    Layer("RepVGG 48->48 3x3 @56", 1, 48, 48, 56, 3),
    Layer("RepVGG 192->192 3x3 @14", 32, 192, 192, 14, 3),
    Layer("RepVGG 512->512 3x3 @14", 32, 512, 512, 14, 3),
    Layer("ResNet 256->64 1x1 @56", 32, 256, 64, 56, 1),
    Layer("sliced 1x1 512->512 @14, half of both", 32, 256, 256, 14, 1),
    Layer("depthwise 3x3 512 @14", 32, 512, 512, 14, 3, groups=512, kernels=("depthwise",)),
    Layer("depthwise 3x3 64->64 @112", 32, 64, 64, 112, 3, groups=64, kernels=("depthwise",)),
    Layer("skip: last 3x3 64 @8, half kept", 128, 64, 64, 8, 3, kept=0.5, residual=True),
    # The mask, the list and its length.
    Terms("skip: the list of rows", 128, ("compact",), (128, 128 * 4, 4)),
    # Maps in and out, biases, weights once, the mask; 18 blocks of two convolutions.
    Terms(
        "stage: 18 blocks 16 @32, all kept", 128, ("stage",),
        (2 * 128 * 32**2 * 16 * 2, 36 * 16 * 4, 36 * 9 * 16**2 * 2, 128 * 18),
        128 * 36 * 32**2 * 9 * 16**2,
    ),
    # Two widths and a table row each; the list with its length, rows, and four classes of four numbers.
    Terms("ragged: the list by widths", 32, ("schedule",), (3 * 32 * 8, 32 * 4 + 4, 32 * 4, 4 * 16)),
    # Codes, the book, the weight.
    Terms("codes to a weight, 512->512 3x3, d = 9", 1, ("decode",), (512**2, 256 * 9 * 2, 512**2 * 9 * 2)),
    # Codes, the book, x, y.
    Terms("codes times a row, 4096->4096, d = 8", 1, ("dots_mma",), (4096 * 512, 256 * 8 * 2, 2 * 4096 * 2), 4096**2),
    # The codes once for 32 rows.
    Terms(
        "codes times 64 rows, 4096->4096, d = 8", 64, ("dots_mma",),
        (2 * 4096 * 512, 256 * 8 * 2, 64 * 2 * 4096 * 2), 64 * 4096**2,
    ),
    Terms("a row in fp32", 1, ("dots",), (4096 * 512, 256 * 8 * 4, 2 * 4096 * 4), 4096**2),
    # Names, codes, the book, rows of the result.
    Terms("embedding of 512 numbers, d = 8", 4096, ("lookup",), (4096 * 8, 4096 * 64, 256 * 8 * 2, 4096 * 512 * 2)),
    Passes(
        "batch norms: 3 branches 64 @56", 32, 64, 56, reads=2 * 3, writes=1,
        kernels=("bn_statistics", "bn_finish", "bn_apply"),
    ),
    Passes(
        "their gradient", 32, 64, 56, reads=2 * (1 + 3), writes=3,
        kernels=("bn_gradient_sums", "bn_gradient_finish", "bn_gradient_apply"),
    ),
    Passes(
        "relu's slope and bias's gradient, 192 @14", 32, 192, 14, reads=2, writes=1, kernels=("act_grad", "fold_sums")
    ),
    WeightGradient("weight's gradient 192->192 3x3 @14", 32, 192, 192, 14, 3, slices=10),
    WeightGradient(
        "weight's gradient, depthwise 3x3 512 @14", 32, 512, 512, 14, 3, slices=66, groups=512,
        kernels=("depthwise_wgrad", "fold"),
    ),
    Terms("the weight turned round, 192->192 3x3", 1, ("transpose",), (2 * 192**2 * 9 * 2,)),
    # gy of all, the output of those kept; their gz, the shortcut's gradient of all.
    Terms(
        "skip: at the sum, 64 @8, half kept", 128, ("block_grad",),
        (128 * 64 * 8**2 * 2, 64 * 64 * 8**2 * 2, 64 * 64 * 8**2 * 2, 128 * 64 * 8**2 * 2),
    ),
    # gy, y and gz of half of the channels; the sums of bias and tables, twice.
    Terms(
        "ragged: relu's slope, half of 512 @14", 32, ("ragged_grad", "fold_table"),
        (3 * 32 * 256 * 14**2 * 2, 2 * 2 * 32 * 512 * 4),
    ),
    # The weight's gradient in fp32, codes, and 256 slices of sums twice.
    Terms(
        "codebook's gradient, 512->512 3x3, d = 9", 1, ("book_grad", "book_fold"),
        (512**2 * 9 * 4, 512**2, 2 * 256 * 256 * 9 * 4),
    ),
    Terms("scales' gradient of that layer", 1, ("row_dots",), (512**2 * 9 * 4, 512**2, 256 * 9 * 4, 512 * 4)),
)  # fmt: skip


def table() -> str:
    head = "| layer, fp16 | kernels | N | MB | GMAC | " + " | ".join(card.name for card in CARDS) + " |"
    rows = [head, "|---|---|---|---|---|" + "---|" * len(CARDS)]
    for layer in LAYERS:
        bounds = " | ".join(f"{least(us)} us ({by})" for us, by in map(layer.bound_us, CARDS))
        kernels = ", ".join(f"`{kernel}`" for kernel in layer.kernels)
        size = f"{least(layer.bytes / 1e6, 2)} | {layer.macs / 1e9:.3f}"
        rows.append(f"| {layer.name} | {kernels} | {layer.n} | {size} | {bounds} |")
    return "\n".join(rows)


def least(number: float, digits: int = 1) -> str:
    """Rounded, but not to nothing."""
    rounded = f"{number:.{digits}f}"
    return rounded if float(rounded) else f"< {10.0**-digits:g}"


if __name__ == "__main__":
    print(table())
