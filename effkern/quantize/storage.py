"""The file of a quantized model: codes packed to the bit, codebooks in 16 bits, everything else as it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save as serialize
from torch import Tensor, nn

from effkern.nn.pq import PQLayer
from effkern.training.checkpoint import load_weights, plain_tensors, write_atomically

try:
    import effkern._host as _host
except ImportError:  # not built: the same bytes by NumPy
    _host = None  # type: ignore[assignment]

BOOK_DTYPE = torch.float16  # 11 significant bits; a codebook's rounding is far below the error of quantizing


@dataclass(frozen=True)
class Size:
    """Bytes of a saved model by what they hold; ``total`` is the length of the file."""

    codes: int
    codebooks: int
    rest: int
    header: int

    @property
    def total(self) -> int:
        """Length of the file."""
        return self.codes + self.codebooks + self.rest + self.header


def bits_of(entries: int) -> int:
    """Bits a code needs, at least 1."""
    return max(1, (entries - 1).bit_length())


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes of any shape as bytes, ``bits`` each, least significant first, without gaps."""
    flat = codes.long().flatten().cpu().numpy()
    if _host is not None:
        return torch.from_numpy(_host.pack_codes(flat, bits))
    spread = (flat[:, None] >> np.arange(bits)) & 1
    return torch.from_numpy(np.packbits(spread.astype(np.uint8).ravel(), bitorder="little"))


def unpack(packed: Tensor, bits: int, shape: torch.Size) -> Tensor:
    """The codes behind :func:`pack`, int64.

    Raises:
        ValueError: if the number of bytes is not what ``shape`` needs.
    """
    count = shape.numel()
    if packed.dtype != torch.uint8 or packed.dim() != 1 or packed.numel() != -(-count * bits // 8):
        raise ValueError(
            f"packed: must be {-(-count * bits // 8)} bytes for {count} codes of {bits} bits, "
            f"got {packed.dtype} of shape {list(packed.shape)}"
        )
    if _host is not None:
        return torch.from_numpy(_host.unpack_codes(packed.numpy(), bits, count)).reshape(shape)
    spread = np.unpackbits(packed.numpy(), bitorder="little", count=count * bits).reshape(count, bits)
    return torch.from_numpy((spread.astype(np.int64) << np.arange(bits)).sum(1)).reshape(shape)


def _layers(model: nn.Module) -> dict[str, PQLayer]:
    """PQ layers by the prefix of their entries in the state dict."""
    found = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, PQLayer):
            found[f"{name}." if name else ""] = module
    return found


def packed_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict as it is stored: ``codes`` (packed) instead of ``code_bytes``, codebooks in float16."""
    state = plain_tensors(model.state_dict())
    for prefix, layer in _layers(model).items():
        del state[f"{prefix}code_bytes"]
        state[f"{prefix}codes"] = pack(layer.codes, bits_of(layer.entries))
        book = state[f"{prefix}codebook"]
        state[f"{prefix}codebook"] = book if book.dtype == torch.bfloat16 else book.to(BOOK_DTYPE)
    return state


def unpacked_state(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The state dict of ``model`` from what :func:`packed_state` gave.

    Raises:
        ValueError: if the codes of a layer are missing, or are not as many as it has.
    """
    full = dict(state)
    for prefix, layer in _layers(model).items():
        if f"{prefix}codes" not in full:
            raise ValueError(f"state: must hold {prefix}codes")
        codes = unpack(full.pop(f"{prefix}codes"), bits_of(layer.entries), layer.codes.shape)
        typed = codes.to(layer.codes.dtype).unsqueeze(-1)
        full[f"{prefix}code_bytes"] = typed.view(torch.uint8)
    return full


def size_of(model: nn.Module) -> Size:
    """Bytes of the file :func:`save` writes, by what they hold."""
    state = packed_state(model)
    prefixes = _layers(model)
    held = {key: tensor.numel() * tensor.element_size() for key, tensor in state.items()}
    codes = sum(held[f"{prefix}codes"] for prefix in prefixes)
    books = sum(held[f"{prefix}codebook"] for prefix in prefixes)
    everything = sum(held.values())
    return Size(codes, books, everything - codes - books, len(serialize(state)) - everything)


def size_bytes(model: nn.Module) -> int:
    """Length in bytes of the file :func:`save` writes."""
    return size_of(model).total


def save(path: str | Path, model: nn.Module) -> int:
    """Save a quantized model as one safetensors file, all of it or nothing; returns its length in bytes."""
    content = serialize(packed_state(model))
    write_atomically(Path(path), content)
    return len(content)


def load(path: str | Path, model: nn.Module) -> nn.Module:
    """Load what :func:`save` wrote into a model of the same layers; returns it.

    Raises:
        CheckpointError: if the file is missing or cut short.
        ValueError: if its codes do not fit the model's.
        RuntimeError: if other entries do not.
    """
    model.load_state_dict(unpacked_state(load_weights(Path(path)), model))
    return model
