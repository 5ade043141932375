"""Residual blocks and stages that do only the kept samples' work at inference."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from effkern.nn.residual import ResidualBlock, ResidualStage, fold_bn, share_parts, span
from effkern.ops import _direct
from effkern.ops._handle import handle_bytes
from effkern.ops._memo import tell
from effkern.ops._pack import with_transforms
from effkern.ops.block_skip import skip_basic_block, skip_bottleneck, skip_stage
from effkern.ops.rep_conv import pack_conv_weight, rep_conv2d, rep_conv2d_packed


@dataclass(frozen=True, eq=False)
class _Packed:
    """Folded weights, on the CPU as handles, and what they were made from."""

    weights: list[Tensor]
    biases: list[Tensor]
    key: Hashable
    dtype: torch.dtype
    alive: list[Tensor]  # aliases of the sources: while they live, no other tensor gets a source's address


class SkipBlock(ResidualBlock):
    """A residual block that costs nothing but its shortcut for the samples that drop it.

    Parameters, state dict and training are those of :class:`~effkern.nn.residual.ResidualBlock`. In eval mode batch
    norm is folded into the convolutions (in float64, rounded once) and :func:`effkern.ops.skip_basic_block` or
    :func:`effkern.ops.skip_bottleneck` runs. Without gradients the folded weights are packed once and kept until a
    parameter or statistic is replaced or written in place, the module changes its mode, dtype or device, a state dict
    is loaded or a gradient is taken; with gradients they are folded at every call, differentiably. Writing through
    ``.data`` or a NumPy alias goes unnoticed: call :func:`effkern.invalidate` after it. Looking for changes takes
    0.1 us a tensor; :meth:`freeze_pack` promises that there are none.

    The block knows no policy: every forward is given its keep mask.

    Attributes:
        transforms: whether packs hold the Winograd transforms of 3x3 kernels as well, see
            :func:`effkern.ops.pack_conv_weight`: five times the memory, the same bits, less to do at every call.
            :func:`effkern.optimize` sets it where the packs of a network then fit the processor's cache.
    """

    transforms: bool = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._packed: _Packed | None
        self._frozen: bool
        self._stores: list[dict[str, Any]] | None
        self.drop_packed()

    @classmethod
    def from_block(cls, block: ResidualBlock) -> SkipBlock:
        """The same block in this form. Parameters and statistics are shared with ``block``."""
        return share_parts(cls, block)

    @property
    def is_identity(self) -> bool:
        """Whether the shortcut is the input itself, so that the block may run in place inside a stage."""
        return self.downsample is None

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """As :meth:`ResidualBlock.forward`; in eval mode dropped samples are bit for bit the shortcut."""
        if self.training:
            return super().forward(x, keep)
        keep = x.new_ones(x.shape[0], dtype=torch.bool) if keep is None else keep
        weights, biases = self.folded(x, keep)
        n = len(self.layers())
        shortcut = None if self.downsample is None else self._shortcut(x, weights[n:], biases[n:])
        weights, biases = weights[:n], biases[:n]
        pairs = [t for pair in zip(weights, biases, strict=True) for t in pair]
        op: Callable[..., Tensor] = skip_basic_block if self.kind == "basic" else skip_bottleneck
        return op(x, keep, *pairs, stride=self.stride, res=shortcut)

    def _shortcut(self, x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
        if not weights:
            return self.shortcut(x)
        (weight,), (bias,) = weights, biases
        if weight.dim() == 4:
            return rep_conv2d(x, weight, bias, self.stride, act="none")
        return rep_conv2d_packed(x, weight, self.out_channels, 1, self.stride, act="none")

    def _folded_layers(self) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
        """The branch's convolutions and, where there is one, the shortcut's."""
        if not isinstance(self.downsample, nn.Sequential):
            return list(self.layers())
        conv, bn = self.downsample
        assert isinstance(conv, nn.Conv2d) and isinstance(bn, nn.BatchNorm2d)
        return [*self.layers(), (conv, bn)]

    def folded(self, x: Tensor, keep: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Weights and biases with batch norm folded in: differentiable where a gradient is wanted, else packed.

        Those of the branch, then the shortcut's convolution if there is one (a handle of it holds its bias as well).

        Raises:
            TypeError: if ``x`` has another dtype than the block, and autocast is off.
        """
        compiling = torch.compiler.is_compiling()
        wants_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (x, keep, *self._sources()))
        if wants_grad or compiling:
            # What follows a gradient may be an optimizer that bumps no version counter (fused=True): pack anew then.
            self.drop_packed()
            pairs = [fold_bn(conv, bn) for conv, bn in self._folded_layers()]
            return [w.to(x.dtype) for w, _ in pairs], [b.float() for _, b in pairs]
        packed, key = self._packed, None if self._frozen else self._state()
        if packed is None or (key is not None and packed.key != key):
            packed = self._pack(key)
            self._packed = None if key is _UNKNOWN or self._is_parametrized() else packed
        if x.dtype != packed.dtype and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(f"x must have the block's dtype {packed.dtype}, got {x.dtype}")
        return packed.weights, packed.biases

    @torch.no_grad()
    def _pack(self, key: Hashable) -> _Packed:
        dtype, branch = self.conv1.weight.dtype, len(self.layers())
        weights, biases = [], []
        tell(self)
        for i, (conv, bn) in enumerate(self._folded_layers()):
            weight, bias = fold_bn(conv, bn)
            biases.append(bias.float())
            weight = weight.to(dtype)
            if weight.is_cpu:
                algo = "winograd" if self.transforms and _transforms_of(conv) else "auto"
                weights.append(pack_conv_weight(weight, biases[-1] if i >= branch else None, algo=algo))
            else:  # handles are the CPU engine's layout; a GPU's kernels read weights of this one in place
                weights.append(weight.contiguous(memory_format=torch.channels_last))
        sources = self._sources()
        return _Packed(weights, biases, key, sources[0].dtype, [t.detach() for t in sources])

    def pack_bytes(self, transforms: bool) -> int:
        """Memory of the packed weights on the CPU, with or without :attr:`transforms`."""
        total, branch = 0, len(self.layers())
        for i, (conv, _) in enumerate(self._folded_layers()):
            transformed = transforms and bool(_transforms_of(conv))
            outs, depth, rows, columns = conv.weight.shape
            total += handle_bytes(outs, depth, rows, columns, conv.groups, i >= branch, transformed)
        return total

    def _sources(self) -> list[Tensor]:
        """Every tensor the folded weights are made of."""
        return [t for store in self._source_stores() for t in store.values() if t is not None]

    def _source_stores(self) -> list[dict[str, Any]]:
        """The dicts that hold them. Asked at every inference, so the walk itself is remembered."""
        stores = self._stores  # read once: another thread may drop it meanwhile
        if stores is None or isinstance(self.downsample, nn.Sequential):  # whose parts may be replaced behind our back
            stores = self._stores = [
                store for conv, bn in self._folded_layers() for store in (conv._parameters, bn._parameters, bn._buffers)
            ]
        return stores

    def _state(self) -> Hashable:
        """Changes when any of the sources is replaced or written to in place.

        Batch norm updates its running statistics without counting a version; its counter of batches, which is among
        the sources, tells.
        """
        state = _direct.state_of(self._source_stores())
        if state is not None:
            return state
        try:
            return tuple([(t.data_ptr(), t._version) for t in self._sources()])
        except RuntimeError:  # tensors made in inference mode count no versions
            return _UNKNOWN

    def _is_parametrized(self) -> bool:
        """Whether a weight is computed from tensors that :meth:`_sources` does not list."""
        return any(part._modules for layer in self._folded_layers() for part in layer)

    def drop_packed(self) -> None:
        """Forget the packed weights, frozen or not; the next inference packs anew."""
        self._packed = self._stores = None
        self._frozen = False

    def freeze_pack(self) -> None:
        """Fold and pack now, and use this for every inference, whatever the parameters and statistics do.

        Undone by :meth:`drop_packed` and all that drops the pack: ``train()``, ``load_state_dict``, ``to``, a call with
        gradients. Compiled and exported graphs fold the parameters themselves.

        Raises:
            RuntimeError: in training mode.
        """
        if self.training:
            raise RuntimeError("SkipBlock.freeze_pack: needs eval mode")
        self._packed = self._pack(_UNKNOWN)
        self._frozen = True

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if isinstance(value, nn.Module) or name == "transforms":
            self.drop_packed()

    def train(self, mode: bool = True) -> SkipBlock:
        self.drop_packed()
        super().train(mode)
        return self

    def _apply(self, fn: Callable, recurse: bool = True) -> SkipBlock:
        self.drop_packed()
        super()._apply(fn, recurse)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.drop_packed()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None, "_stores": None, "_frozen": False}

    def macs(self, input_shape: torch.Size, output_shape: torch.Size) -> float:
        """Multiply-adds for a batch of this shape if every sample keeps the block."""
        return float(input_shape[0] * sum(self.block_macs(input_shape[2], input_shape[3])))


_UNKNOWN = ("unknown",)


def _transforms_of(conv: nn.Conv2d) -> int:
    return with_transforms(conv.weight, conv.groups, conv.stride, conv.dilation)


@dataclass(frozen=True)
class _Run:
    """The packs of blocks that run in one call, and what says that they are true: one look instead of one a block."""

    packs: list[_Packed | None]
    stores: list[dict[str, Any]]
    state: bytes | None  # of the stores; None: frozen
    weights: list[Tensor]
    biases: list[Tensor]
    stage: object | None  # the same for :mod:`effkern.ops._direct`

    def holds(self, blocks: Sequence[SkipBlock], x: Tensor) -> bool:
        pack = self.packs[0]
        return (
            self.packs == [block._packed for block in blocks]
            and pack is not None
            and x.dtype is pack.dtype
            and (self.state is None or _direct.state_of(self.stores) == self.state)
        )


class SkipStage(ResidualStage):
    """A stage of :class:`SkipBlock`: in eval mode its identity blocks run in one call of
    :func:`effkern.ops.skip_stage`.

    The first block of a stage, which changes the map or the channels, runs by itself on its shortcut. The state dict is
    that of the plain sequence of blocks.
    """

    def __init__(self, *blocks: Any) -> None:
        super().__init__(*blocks)
        for block in self:
            if not isinstance(block, SkipBlock):
                raise TypeError(f"blocks must be SkipBlock, got {type(block).__name__}")
        self._runs: dict[tuple[int, int], _Run] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_runs": {}}

    @classmethod
    def from_stage(cls, stage: nn.Sequential) -> SkipStage:
        """The same stage in this form. Parameters and statistics are shared with ``stage``."""
        skip = cls(*[SkipBlock.from_block(block) for block in stage])
        skip.training = stage.training
        return skip

    def forward(  # type: ignore[override]
        self, x: Tensor, keep: Tensor | None = None, start: int = 0, stop: int | None = None
    ) -> Tensor:
        """As :meth:`ResidualStage.forward`."""
        if self.training:
            return super().forward(x, keep, start, stop)
        start, stop = span(start, stop, len(self))
        if keep is None:
            keep = x.new_ones((x.shape[0], len(self)), dtype=torch.bool)
        blocks = list(self)
        k = start
        while k < stop:
            end = k
            while end < stop and blocks[end].is_identity and blocks[end].kind == blocks[k].kind:
                end += 1
            if end == k:
                x, k = blocks[k](x, keep[:, k]), k + 1
                continue
            x, k = self._run(x, keep, k, blocks[k:end]), end
        return x

    def macs(self, input_shape: torch.Size, output_shape: torch.Size) -> float:
        """Multiply-adds for a batch of this shape if every sample keeps every block."""
        total, (height, width) = 0, input_shape[2:]
        for block in self:
            total += sum(block.block_macs(height, width))
            height, width = -(-height // block.stride), -(-width // block.stride)
        return float(input_shape[0] * total)

    def _run(self, x: Tensor, keep: Tensor, first: int, blocks: Sequence[SkipBlock]) -> Tensor:
        """The identity blocks from ``first`` on. What they are folded to is remembered as a whole for inference."""
        mask, kind = keep[:, first : first + len(blocks)], blocks[0].kind
        state, stores, remembers = None, [], False
        if not torch.compiler.is_compiling() and not torch.is_grad_enabled():
            run = self._runs.get((first, len(blocks)))
            if run is not None and run.holds(blocks, x):
                y = None if run.stage is None else _direct.skip_stage(run.stage, x, mask)
                return skip_stage(x, mask, run.weights, run.biases, kind) if y is None else y
            remembers = all(block._frozen for block in blocks)
            if not remembers:
                stores = [store for block in blocks for store in block._source_stores()]
                state = _direct.state_of(stores)  # before packing: a change meanwhile is then seen by the next call
                remembers = state is not None
        folded = [block.folded(x, keep) for block in blocks]
        weights, biases = ([t for pair in folded for t in pair[i]] for i in (0, 1))
        if remembers:
            packs = [block._packed for block in blocks]
            if all(pack is not None and pack.dtype == x.dtype for pack in packs):
                stage = _direct.stage(tuple(weights), tuple(biases), len(blocks), x, kind, "relu", "auto")
                self._runs[first, len(blocks)] = _Run(packs, stores, state, weights, biases, stage)
        return skip_stage(x, mask, weights, biases, kind)


def skip_form(model: nn.Module) -> nn.Module:
    """A copy of a network with every residual stage and block in its skipping form, in eval mode.

    Any network built of :class:`~effkern.nn.residual.ResidualStage` and :class:`~effkern.nn.residual.ResidualBlock`
    will do, the policy network included. The state dict stays the same.

    Raises:
        ValueError: if the network has no residual block.
    """
    model = copy.deepcopy(model)
    count = _convert(model)
    if isinstance(model, ResidualBlock):
        model, count = SkipBlock.from_block(model), 1
    elif isinstance(model, ResidualStage):
        model, count = SkipStage.from_stage(model), len(model)
    if count == 0:
        raise ValueError(f"skip_form: {type(model).__name__} has no residual block")
    return model.eval()


def _convert(module: nn.Module) -> int:
    count = 0
    for name, child in module.named_children():
        if isinstance(child, ResidualStage):
            setattr(module, name, SkipStage.from_stage(child))
            count += len(child)
        elif isinstance(child, ResidualBlock):
            setattr(module, name, SkipBlock.from_block(child))
            count += 1
        else:
            count += _convert(child)
    return count
