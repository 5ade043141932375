"""Whole networks on a GPU, as the package's modules run them, against the same networks of plain PyTorch.

All have their batch norms folded, and random weights with the batch norm statistics of random images, so that maps have
the size of a trained network's. Of what is left out of the work, the rest is compared with all of it: ``all: ...`` are
the whole network's times.

- RepVGG-A0 and MobileNetV2 folded by `effkern.reparam.fold_model`; peers: the same in `torch.nn`'s layers.
- ResNet-110 for CIFAR, half of its blocks kept at random; peers: every block and a choice by mask; the kept samples
  gathered and scattered, for which the host has to wait for the mask, so that no graph can hold it.
- Slimmable networks at one width and at a width a sample; peers: the narrow network; one after the other on the samples
  of each width, whose indices are known beforehand.
- ResNet-50 of codes, one code for 9 weights of a 3x3 kernel or 4 of a 1x1 one, 256 entries a layer; peers: every call
  decodes by lookup; the dense network, four and more times the weights.
- A training step of RepVGG-A0 without its optimizer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.bench_block_skip import Folded, draw, folded, gathered, masked, through
from benchmarks.bench_supernet import loop, narrow
from benchmarks.gpu_cases import Case, Ops, Spec, Waits, cudnn_block
from benchmarks.gpu_timing import Call
from benchmarks.networks import calibrated, for_peers, macs
from effkern.models import create_model
from effkern.models.resnet import ResNet
from effkern.nn import PQConv2d, SlicedConvBNAct, SwitchableBatchNorm2d, freeze_packs, skip_form
from effkern.nn.multi_branch_bn import bn_add_relu
from effkern.nn.repvgg_block import BranchBlock, ConvBN
from effkern.nn.residual import fold_bn
from effkern.reparam import fold_model, unfuse

DEEP = 6.0  # times the difference of one op that tens of layers may make


class Networks(Ops):
    """The cases of whole networks, before those of single operators."""

    def images(self, n: int, size: int, channels: int = 3) -> Tensor:
        return self.normal(n, channels, size, size).contiguous(memory_format=torch.channels_last)

    def ready(self, net: nn.Module, layout: torch.memory_format = torch.channels_last) -> nn.Module:
        """A copy in the dtype and layout to be timed."""
        return copy.deepcopy(net).eval().requires_grad_(False).to(self.dtype).to(memory_format=layout)

    def made(self, name: str, size: int, channels: int = 3, **options: Any) -> nn.Module:
        """A calibrated network in float32."""
        net = create_model(name, **options).to(self.device)
        return calibrated(net, torch.randn(16, channels, size, size, device=self.device))

    def plain(self, net: nn.Module, x: Tensor, before: str = "") -> dict[str, Call]:
        """A network of `torch.nn` in both layouts."""
        return {
            f"{before}channels_last": Call(self.ready(net), x),
            f"{before}contiguous": Call(self.ready(net, torch.contiguous_format), x.contiguous()),
        }

    def folded_network(self, n: int, name: str, size: int, small: str) -> Case:
        channels = 1 if self.small and small == "repvgg_small" else 3
        n, name, size = self.size(n, 2), small if self.small else name, 28 if self.small else size
        net = fold_model(self.made(name, size, channels))
        x, reference = self.images(n, size, channels), unfuse(net)
        work = macs(reference, torch.empty(1, channels, size, size, device=self.device)) * n
        ours = Call(self.ready(net), x)
        return Case(ours, self.plain(reference, x), work, self.moved(ours), cold=False, close=DEEP)

    def moved(self, call: Call) -> float:
        """Weights, images and scores: what no network can do without."""
        assert isinstance(call.function, nn.Module)
        return sum(p.nbytes for p in call.function.parameters()) + call.bytes()

    def skipping(self, n: int, keep: float, compiled: bool) -> Case:
        n, blocks = self.size(n, 4), (1, 1, 1) if self.small else None
        net = self.made("resnet110", 32, shortcut="pool", blocks=blocks)
        assert isinstance(net, ResNet)
        skip = freeze_packs(self.ready(skip_form(net)))
        assert isinstance(skip, ResNet)
        x, mask = self.images(n, 32), draw(keep, n, net.num_blocks)[0].to(self.device)
        weight, bias = (t.to(self.dtype) for t in _stem(net))
        head = self.ready(net.linear)
        parts = [(block.stride, self.ready(block.downsample or nn.Identity())) for block in net.blocks()]

        def around(body: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
            """Stem and classifier are PyTorch's for all."""
            return head(body(F.relu(F.conv2d(x, weight, bias, 1, 1))).mean((2, 3)))

        def ours(x: Tensor, mask: Tensor) -> Tensor:
            return around(lambda y: skip.body(y, mask), x)

        def other(run: Callable[..., Tensor], layout: torch.memory_format) -> Callable[..., Tensor]:
            weights = [self.laid(folded(block, layout)) for block in net.blocks()]
            blocks = [_Block(stride, shortcut) for stride, shortcut in parts]
            return lambda x, mask: around(lambda y: through(run, y, mask, blocks, weights), x)  # type: ignore[arg-type]

        last, first = torch.channels_last, torch.contiguous_format
        peers: dict[str, Call] = {
            "masked": Call(other(masked, last), x, mask),
            "gathered": Waits(other(gathered, last), x, mask),
        }
        one, plain = torch.ones_like(mask), x.contiguous()
        whole = {
            "all: effkern": Call(ours, x, one),
            "all: channels_last": Call(other(_dense, last), x, one),
            "all: contiguous": Call(other(_dense, first), plain, one),
        }
        if self.device == "cuda":
            whole["all: cudnn fused"] = Call(other(_cudnn, last), x, one)
        always, each = net.block_macs((3, 32, 32))
        left = float((mask.cpu().double() * torch.tensor(each, dtype=torch.float64)).sum()) + n * always
        moved = sum(p.nbytes for p in skip.parameters()) + x.nbytes
        names = ("all: channels_last",) if compiled else ()
        share = left / (n * (always + sum(each)))
        return Case(Call(ours, x, mask), peers, left, moved, names, whole, share, cold=False, close=DEEP)

    def laid(self, pairs: Folded) -> Folded:
        return [(w.to(self.dtype), b.to(self.dtype)) for w, b in pairs]

    def slimmable(self, name: str, size: int) -> tuple[nn.Module, int]:
        """A supernet with statistics of every width, ready to run, and the number of its widths."""
        net = create_model(name).to(self.device)
        norms = [m for m in net.modules() if isinstance(m, SwitchableBatchNorm2d)]
        widths = getattr(net, "num_widths", None) or len(net.width_mults)  # type: ignore[arg-type]
        images = torch.randn(8, 3, size, size, device=self.device)
        for norm in norms:
            norm.momentum = 1.0
        net.train()
        for width in range(widths):
            net(images, width)
        net = self.ready(net)
        for layer in net.modules():
            if isinstance(layer, SlicedConvBNAct):
                layer.fold()
        return net, widths

    def one_width(self, n: int, name: str, width: int) -> Case:
        n, size = self.size(n, 2), 32 if self.small else 224
        net, widths = self.slimmable(name, 64 if size > 64 else size)
        x, image = self.images(n, size), torch.zeros(1, 3, size, size, device=self.device, dtype=self.dtype)
        narrowed, widest = narrow(net, width), narrow(net, widths - 1)
        ours = Call(lambda x: net(x, width), x)
        whole = {"all: effkern": Call(lambda x: net(x, widths - 1), x)} | self.plain(widest, x, "all: ")
        work, most = macs(narrowed, image), macs(widest, image)
        moved = sum(p.nbytes for p in narrowed.parameters()) + x.nbytes
        compiled = ("channels_last",) if width == widths // 2 else ()  # one of a network: each takes ten seconds
        options: dict[str, Any] = {"whole": whole, "share": work / most, "cold": False, "close": DEEP}
        return Case(ours, self.plain(narrowed, x), work * n, moved, compiled, **options)

    def mixed_widths(self, n: int, name: str, classes: Sequence[int]) -> Case:
        n, size = self.size(n, 4), 32 if self.small else 224
        net, widths = self.slimmable(name, 64 if size > 64 else size)
        index = torch.tensor(classes, device=self.device).repeat(n // len(classes))
        x, image = self.images(n, size), torch.zeros(1, 3, size, size, device=self.device, dtype=self.dtype)
        rows = [(index == width).nonzero().flatten() for width in classes]
        narrowed, widest = [self.ready(narrow(net, width)) for width in classes], narrow(net, widths - 1)
        each = [partial(net, width=width) for width in classes]
        peers = {
            "loop channels_last": Call(lambda x: loop(x, rows, narrowed), x),
            "loop effkern": Call(lambda x: loop(x, rows, each), x),  # type: ignore[arg-type]
        }
        whole = {"all: effkern": Call(lambda x: net(x, widths - 1), x)} | self.plain(widest, x, "all: ")
        work = sum(macs(one, image) for one in narrowed) / len(classes)
        moved = sum(p.nbytes for p in narrowed[-1].parameters()) + x.nbytes
        options: dict[str, Any] = {"whole": whole, "share": work / macs(widest, image), "cold": False, "close": DEEP}
        return Case(Call(net, x, index), peers, work * n, moved, (), **options)

    def coded(self, n: int) -> Case:
        n, size = self.size(n, 2), 32 if self.small else 224
        name = "resnet18" if self.small else "resnet50"
        net = for_peers(self.made(name, size).cpu()).to(self.device)
        dense, decoded = copy.deepcopy(net), copy.deepcopy(net)
        for path, conv in list(net.named_modules()):
            if not isinstance(conv, nn.Conv2d) or conv.in_channels < 16:
                continue
            d, out = 9 if conv.kernel_size == (3, 3) else 4, conv.out_channels
            codes = torch.randint(256, (out, conv.weight[0].numel() // d), device=self.device)
            book = torch.randn(1, 256, d, device=self.device) / conv.weight[0].numel() ** 0.5
            _put(net, path, PQConv2d.from_float(conv, codes, book))
            _put(decoded, path, _Decoded(conv, codes, book))
            with torch.no_grad():
                dense.get_submodule(path).weight.copy_(book[0][codes].view_as(conv.weight))  # type: ignore[operator]
        x = self.images(n, size)
        ours = Call(self.ready(net), x)
        peers = self.plain(dense, x) | {"decoded": Call(self.ready(decoded), x)}
        work = macs(dense, torch.zeros(1, 3, size, size, device=self.device)) * n
        coded = sum(t.nbytes for t in ours.function.state_dict().values())  # type: ignore[attr-defined]
        return Case(ours, peers, work, coded + x.nbytes, ("decoded",) if n > 1 else (), cold=False, close=DEEP)

    def training(self, n: int) -> Case:
        n, size, channels = self.size(n, 4), 28 if self.small else 224, 1 if self.small else 3
        net = create_model("repvgg_small" if self.small else "repvgg_a0").to(self.device).train()
        net = net.to(self.dtype).to(memory_format=torch.channels_last)
        for norm in net.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.float()  # as autocast has them
        other = copy.deepcopy(net)
        for block in net.modules():
            if isinstance(block, BranchBlock):
                block.forward = partial(_fused, block)  # type: ignore[method-assign]
        x = self.images(n, size, channels)
        incoming = self.normal(n, net.head.out_features) / n  # type: ignore[operator]

        def step(net: nn.Module) -> Callable[..., tuple[Tensor, ...]]:
            parameters = list(net.parameters())

            def run(x: Tensor, incoming: Tensor) -> tuple[Tensor, ...]:
                with torch.enable_grad():
                    y = net(x)
                return (y.detach(), *torch.autograd.grad(y, parameters, incoming))

            return run

        image = torch.zeros(1, channels, size, size, device=self.device, dtype=self.dtype)
        work = 3 * n * macs(copy.deepcopy(other).eval(), image)
        moved = 2 * sum(p.nbytes for p in net.parameters()) + x.nbytes
        peers = {"channels_last": Call(step(other), x, incoming)}
        return Case(Call(step(net), x, incoming), peers, work, moved, (), cold=False, close=DEEP)

    def specs(self) -> Iterator[Spec]:
        for n in (1, 64):
            make = partial(self.folded_network, n, "repvgg_a0", 224, "repvgg_small")
            yield Spec("networks", f"RepVGG-A0 n{n}", make)
        for n in (1, 64, 256):
            yield Spec("networks", f"ResNet-110 CIFAR n{n} keep 0.5", partial(self.skipping, n, 0.5, n == 64))
        yield Spec("networks", "ResNet-110 CIFAR n64 keep 0.25", partial(self.skipping, 64, 0.25, False))
        for n in (1, 64):
            make = partial(self.folded_network, n, "mobilenet_v2", 224, "mobilenet_v2")
            yield Spec("networks", f"MobileNetV2 n{n}", make)
        for n, width in ((1, 0), (64, 0), (64, 7), (64, 13)):
            make = partial(self.one_width, n, "ds_mobilenet", width)
            yield Spec("supernets", f"DS-Net MobileNet n{n} width {width}", make)
        for n in (16, 64):
            make = partial(self.mixed_widths, n, "ds_mobilenet", (0, 4, 9, 13))
            yield Spec("supernets", f"DS-Net MobileNet n{n}, widths 0 4 9 13", make)
        for width in (0, 2):
            make = partial(self.one_width, 64, "mobilenet_v1_slimmable", width)
            yield Spec("supernets", f"slimmable MobileNetV1 n64 width {width}", make)
        make = partial(self.mixed_widths, 64, "mobilenet_v1_slimmable", (0, 1, 2, 3))
        yield Spec("supernets", "slimmable MobileNetV1 n64, widths 0 1 2 3", make)
        for n in (1, 64):
            yield Spec("networks", f"ResNet-50 of codes n{n}", partial(self.coded, n))
        yield Spec("networks", "RepVGG-A0 forward and backward n64", partial(self.training, 64))
        yield from super().specs()


class _Block:
    """What `through` asks of a block."""

    def __init__(self, stride: int, shortcut: nn.Module) -> None:
        self.stride, self.shortcut = stride, shortcut


class _Decoded(nn.Module):
    """A convolution whose weight is looked up at every call."""

    def __init__(self, conv: nn.Conv2d, codes: Tensor, book: Tensor) -> None:
        super().__init__()
        self.register_buffer("codes", codes.to(torch.uint8))
        self.book, self.bias = nn.Parameter(book[0]), conv.bias
        self.shape, self.stride, self.padding = conv.weight.shape, conv.stride, conv.padding

    def forward(self, x: Tensor) -> Tensor:
        weight = F.embedding(self.codes.int(), self.book).view(self.shape)  # type: ignore[operator]
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


def _put(net: nn.Module, path: str, layer: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(net.get_submodule(parent), name, layer)


def _stem(net: ResNet) -> tuple[Tensor, Tensor]:
    weight, bias = fold_bn(net.conv1, net.bn1)  # type: ignore[arg-type]
    return weight.float().contiguous(memory_format=torch.channels_last), bias.float()


def _dense(x: Tensor, keep: Tensor, block: Folded, stride: int, shortcut: Tensor) -> Tensor:
    """The block for every sample."""
    (w1, b1), (w2, b2) = block
    y = F.conv2d(F.relu_(F.conv2d(x, w1, b1, stride, 1)), w2, b2, 1, 1)
    return F.relu_(y.add_(shortcut))


def _cudnn(x: Tensor, keep: Tensor, block: Folded, stride: int, shortcut: Tensor) -> Tensor:
    """The same in cuDNN's own fused calls."""
    (w1, b1), (w2, b2) = block
    return cudnn_block(x, w1, b1, w2, b2, stride, shortcut.contiguous(memory_format=torch.channels_last))


def _fused(block: BranchBlock, x: Tensor) -> Tensor:
    """The training form of a block with its batch norms in one op."""
    branches = list(block.branches.values())
    maps = [b.conv(x) if isinstance(b, ConvBN) else x for b in branches]
    norms = [b.norm if isinstance(b, ConvBN) else b for b in branches]
    return bn_add_relu(maps, norms)  # type: ignore[arg-type]
