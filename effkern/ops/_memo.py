"""When may a packed weight be used again? Stamps tell, and the memo keeps packs for eager inference.

PyTorch's version counter does not see every change of a weight: fused optimizers, ``.data`` arithmetic and NumPy
aliases leave it alone. A :class:`Stamp` therefore also samples the bits. :class:`Memo` is a byte-bounded store of
packs keyed by such stamps; layers keep one stamp next to the one pack they hold.

Three tiers, from always right to fastest:

1. a functional op packs its weight on every call,
2. the caller holds an explicit handle and passes it to a ``*_packed`` op,
3. under eager inference the functional op finds the pack of last time in the memo of this file.

Environment:
    EFFKERN_CACHE: ``on`` (default, sampled fingerprint), ``full`` (every byte is hashed) or ``off``.
    EFFKERN_CACHE_LIMIT: bytes the memo may hold, 268435456 (256 MiB) unless told; ``k``, ``M``, ``G`` are understood.
"""

from __future__ import annotations

import functools
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

from effkern import _library
from effkern.ops import _direct

try:
    from effkern import _host
except ImportError:  # an install without native code: nothing is packed, so nothing needs a fingerprint
    _host = None  # type: ignore[assignment]

_MODES = ("on", "off", "full")
_DEFAULT_LIMIT = 256 << 20
_SWEEP_EVERY = 256  # look-ups between two searches for packs whose weight is gone
_MOST_QUICK = 4096
_PLAIN_TYPES = (Tensor, torch.nn.Parameter)
_PLAIN_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class _Source:
    """One tensor as it was: which memory, seen how, holding what."""

    __slots__ = ("bits", "dtype", "item", "pointer", "ref", "shape", "span", "stride", "version")

    def __init__(self, tensor: Tensor, full: bool) -> None:
        self.ref = StorageWeakRef(tensor.untyped_storage())
        self.pointer, self.item, self.dtype = tensor.data_ptr(), tensor.element_size(), tensor.dtype
        self.shape, self.stride, self.version = tensor.shape, tensor.stride(), tensor._version
        self.span = _span(tensor)
        self.bits = _host.fingerprint(self.pointer, self.span, self.item, full)

    def is_still(self, tensor: Tensor, full: bool) -> bool:
        """Whether ``tensor`` is this one, unchanged; runs before every use of a pack, so the cheap looks come first."""
        return (
            tensor._version == self.version
            and tensor.data_ptr() == self.pointer
            and tensor.untyped_storage()._cdata == self.ref.cdata
            and tensor.dtype is self.dtype
            and tensor.shape == self.shape
            and tensor.stride() == self.stride
            and _host.fingerprint(self.pointer, self.span, self.item, full) == self.bits
        )


class Stamp:
    """What some tensors were when a pack was made of them.

    Weak references keep the storage objects' addresses from being used again, so an equal address is the same storage.
    They do not keep the data alive.

    Args:
        tensors: their stamp is taken now. Take it *before* packing, so that a change meanwhile is noticed.
        full: hash every byte instead of a sample; default: as ``EFFKERN_CACHE`` says.
    """

    def __init__(self, tensors: Sequence[Tensor | None], full: bool | None = None) -> None:
        self._full = memo().mode == "full" if full is None else full
        self._sources = tuple(None if t is None else _Source(t, self._full) for t in tensors)
        self._epoch = memo().epoch
        #: The same for :mod:`effkern.ops._direct`, where that can be used.
        self.direct = _direct.stamp(tuple(tensors), self._full)

    def holds(self, tensors: Sequence[Tensor | None]) -> bool:
        """Whether ``tensors`` are the same memory with the same content, as far as the fingerprint sees."""
        if self.direct is not None:
            return _direct.stamp_holds(self.direct, tuple(tensors))
        for source, tensor in zip(self._sources, tensors, strict=True):
            if source is None or tensor is None:
                if source is not tensor:
                    return False
            elif not source.is_still(tensor, self._full):
                return False
        return True

    def invalidated(self) -> bool:
        """Whether :func:`invalidate` was called since, for whatever tensor: a layer's pack is quickly made anew."""
        return self._epoch != memo().epoch

    def expired(self) -> bool:
        """Whether the memory of any of the tensors was given back."""
        return any(source is not None and source.ref.expired() for source in self._sources)

    def concerns(self, cdata: int) -> bool:
        """Whether one of the tensors lives in this storage."""
        return any(source is not None and source.ref.cdata == cdata for source in self._sources)


def _view(tensor: Tensor | None) -> Hashable:
    if tensor is None:
        return None
    return tensor.untyped_storage()._cdata, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _span(tensor: Tensor) -> int:
    """Elements from the first to the last one in memory."""
    if tensor.numel() == 0:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def fingerprint(tensor: Tensor, full: bool = False) -> int:
    """Hash the bit patterns of a CPU tensor's memory, sampled or in full.

    The sample is 256 elements at an odd stride over the memory the tensor spans, plus its first and last 64 bytes: a
    bulk change is seen, a change of a single element may not be. Bits are compared, not values: NaN equals itself.
    For a tensor with gaps between its elements the gaps count too, which can only cost a needless repacking.
    """
    return _host.fingerprint(tensor.data_ptr(), _span(tensor), tensor.element_size(), full)


def available() -> bool:
    """Whether packs can be used at all: the native CPU kernels are loaded, and so is the host module that hashes."""
    return _host is not None and _library.loaded("_C")


def packable(*tensors: Tensor | None) -> bool:
    """Whether a pack of these tensors may be remembered at all: plain CPU tensors in plain eager mode."""
    if (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0  # FakeTensorMode, make_fx and other modes that see every op
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0  # a pack would hide a weight's tangent from the op
    ):
        return False
    return all(
        t is None
        or (
            type(t) in _PLAIN_TYPES
            and t.is_cpu
            and t.layout is torch.strided
            and t.dtype in _PLAIN_DTYPES
            and not t.is_inference()  # has no version counter to read
            and not t.is_neg()
        )
        for t in tensors
    )


class Memo:
    """Packs of weights seen before, dropped when the weight changes or dies, or when they outgrow ``limit`` bytes.

    Thread-safe. A pack in use stays alive when it is evicted: it is a tensor, the caller holds a reference.

    Args:
        mode: ``"on"``, ``"full"`` or ``"off"``.
        limit: the most bytes of packs to hold; the pack used longest ago goes first.
    """

    def __init__(self, mode: str = "on", limit: int = _DEFAULT_LIMIT) -> None:
        if mode not in _MODES:
            raise ValueError(f"EFFKERN_CACHE: must be one of {', '.join(_MODES)}, got {mode!r}")
        if limit < 0:
            raise ValueError(f"EFFKERN_CACHE_LIMIT: must not be negative, got {limit}")
        self.mode, self.limit = mode, limit
        self.bytes = self.hits = self.misses = self.epoch = 0
        self._entries: OrderedDict[Hashable, tuple[Stamp, Tensor]] = OrderedDict()
        #: (*ids of the tensors, *tag) -> stamp and pack, for calls past the dispatcher. The stamp decides; an id is
        #: only where to look. Empty while more than half of the bytes are used: such a look-up counts as no use of a
        #: pack.
        self.quick: dict[Hashable, tuple[object, Tensor]] = {}
        self._lookups = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def packed(
        self,
        tensors: Sequence[Tensor | None],
        tag: tuple[Hashable, ...],
        pack: Callable[[], Tensor],
        inputs: Sequence[Tensor | None] = (),
    ) -> Tensor | None:
        """Return the pack of ``tensors``, from memory where it is still true; ``None`` where the memo must stay out.

        Args:
            tensors: what the pack is made of (weight, bias, ...).
            tag: all else it depends on: op, groups, algorithm.
            pack: makes the pack, called without gradient recording.
            inputs: further tensors of the call. If a gradient is wanted for any of them, or for ``tensors``, the memo
                stays out: it serves inference.
        """
        if self.mode == "off" or not available() or torch.is_autocast_enabled("cpu"):
            return None
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (*tensors, *inputs)):
            return None
        if not packable(*tensors):
            return None
        key = (tag, *map(_view, tensors))  # not the instruction set: the layout of packs does not depend on it
        with self._lock:
            self._lookups += 1
            if self._lookups % _SWEEP_EVERY == 0:
                self._sweep()
            found = self._entries.get(key)
            if found is not None:
                self._entries.move_to_end(key)
        if found is not None and found[0].holds(tensors):
            self.hits += 1
            self._remember(tensors, tag, *found)
            return found[1]
        self.misses += 1
        stamp = Stamp(tensors, self.mode == "full")
        with torch.inference_mode(False), torch.no_grad():
            handle = pack()
        with self._lock:
            self._drop(key)
            self._sweep()
            # Not kept if another thread changed the weight while it was packed.
            if handle.nbytes <= self.limit and stamp.holds(tensors):
                self._entries[key] = (stamp, handle)
                self.bytes += handle.nbytes
                if 2 * self.bytes > self.limit:
                    self.quick.clear()
                while self.bytes > self.limit:
                    self._drop(next(iter(self._entries)))
        return handle

    def _remember(
        self, tensors: Sequence[Tensor | None], tag: tuple[Hashable, ...], stamp: Stamp, pack: Tensor
    ) -> None:
        if stamp.direct is not None and 2 * self.bytes <= self.limit:
            if len(self.quick) >= _MOST_QUICK:
                self.quick.clear()
            key = (*map(id, tensors), *tag)
            self.quick[key] = (stamp.direct, pack)

    def invalidate(self, tensor: Tensor | None = None) -> int:
        """Forget the packs made from ``tensor``'s storage, or all packs; returns how many there were."""
        cdata = None if tensor is None else tensor.untyped_storage()._cdata
        with self._lock:
            self.epoch += 1
            doomed = [key for key, (stamp, _) in self._entries.items() if cdata is None or stamp.concerns(cdata)]
            for key in doomed:
                self._drop(key)
        return len(doomed)

    def _drop(self, key: Hashable) -> None:
        entry = self._entries.pop(key, None)
        self.quick.clear()
        if entry is not None:
            self.bytes -= entry[1].nbytes

    def _sweep(self) -> None:
        for key in [key for key, (stamp, _) in self._entries.items() if stamp.expired()]:
            self._drop(key)


def parse_bytes(text: str) -> int:
    """Read a number of bytes such as ``"1048576"``, ``"512k"``, ``"64M"`` or ``"2G"``.

    >>> parse_bytes("64M")
    67108864
    """
    text = text.strip()
    unit = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30}.get(text[-1:].lower(), 1)
    digits = text[:-1] if unit > 1 else text
    if not digits.isdigit():
        raise ValueError(f"EFFKERN_CACHE_LIMIT: must be a number of bytes such as 1048576 or 64M, got {text!r}")
    return int(digits) * unit


@functools.cache
def memo() -> Memo:
    """The memo of this process, made from the environment at its first use."""
    return Memo(os.environ.get("EFFKERN_CACHE", "on"), parse_bytes(os.environ.get("EFFKERN_CACHE_LIMIT", "256M")))


def invalidate(tensor: Tensor | None = None) -> int:
    """Forget what was packed from a weight, or everything; needed only after edits no fingerprint can see.

    Version counters and a sampled fingerprint notice optimizer steps (fused ones too), loading, casting, moving and
    bulk edits through ``.data``. Writing *single elements* behind PyTorch's back (NumPy alias, ``w.data[0] = 1``) can
    go unnoticed: call this after it, or set ``EFFKERN_CACHE=full`` or ``off``.

    Args:
        tensor: the weight that was edited, or ``None`` for all.

    Returns:
        The number of packs forgotten.
    """
    for holder in _told():
        holder.drop_packed()
    return memo().invalidate(tensor)


_holders: weakref.WeakSet[Any] = weakref.WeakSet()
_holders_lock = threading.Lock()


def tell(holder: Any) -> None:
    """Have ``holder.drop_packed()`` called by :func:`invalidate` and when an optimizer steps on its parameters.

    For layers of so many tensors that a fingerprint of each, at every call, would cost more than their work: they go by
    version counters, which fused optimizers leave alone.

    Args:
        holder: a module; held weakly. To be told once more, it has to ask again.
    """
    _hook_into_optimizers()
    with _holders_lock:
        _holders.add(holder)


def _told() -> list[Any]:
    with _holders_lock:
        return list(_holders)


@functools.cache
def _hook_into_optimizers() -> None:
    register_optimizer_step_post_hook(_after_step)


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for holder in _told():
        if any(id(p) in stepped for p in holder.parameters()):
            holder.drop_packed()
            with _holders_lock:
                _holders.discard(holder)
