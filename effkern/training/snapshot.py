"""The whole state of a run in one safetensors file: tensors of any nesting, plain data, and a checksum.

No pickle: what is read is tensors and JSON, so a file of unknown origin can execute nothing.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .checkpoint import CheckpointError, write_atomically

__all__ = ["load_snapshot", "save_snapshot"]

FORMAT = "effkern snapshot 1"


def save_snapshot(path: Path, state: Any) -> None:
    """Write ``state`` atomically: nested dicts (keys of str or int), lists, tuples, tensors, numbers, strings, None.

    Raises:
        TypeError: if it holds anything else.
        OSError: if it cannot be written; a file that was there is as it was.
    """
    tensors: dict[str, Tensor] = {}
    plain = json.dumps(_encode(state, "", tensors))
    digest = _digest(plain, tensors)
    write_atomically(path, save(tensors, {"format": FORMAT, "state": plain, "sha256": digest}))


def load_snapshot(path: Path) -> Any:
    """Read what :func:`save_snapshot` wrote, every tensor in the memory layout it had.

    Raises:
        CheckpointError: naming the file, if it is missing, cut short, changed in any bit or something else.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise CheckpointError(f"{path}: is no checkpoint of a run ({FORMAT})")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, no mapping
        if _digest(metadata["state"], tensors) != metadata["sha256"]:
            raise CheckpointError(f"{path}: is damaged: its checksum does not fit its content")
        return _decode(json.loads(metadata["state"]), tensors)
    except CheckpointError:
        raise
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path}: cannot be read as a checkpoint: {error}") from error


def _digest(plain: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(plain.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\0{name} {tensor.dtype} {list(tensor.shape)}\0".encode())
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _encode(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Plain data with a mark for each tensor, which goes to ``tensors`` under its path."""
    if isinstance(value, Tensor):
        name = f"{name}#{len(tensors)}" if name in tensors else name
        mark: dict[str, Any] = {"tensor": name}
        # safetensors knows one layout. Others are noted, as arithmetic on other strides may differ in the last bit.
        if not value.is_contiguous() and _is_dense(value):
            mark["strides"] = list(value.stride())
        tensors[name] = value.detach().cpu().contiguous().clone()
        return mark
    if isinstance(value, dict):
        return {"dict": [[key, _encode(item, f"{name}/{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_encode(item, f"{name}/{i}", tensors) for i, item in enumerate(value)]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"state{name}: must be a tensor or plain data, got {type(value).__name__}")


def _decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        tensor = tensors[value["tensor"]]
        if "strides" not in value:
            return tensor
        return torch.empty_strided(tensor.shape, value["strides"], dtype=tensor.dtype).copy_(tensor)
    if "dict" in value:
        return {key: _decode(item, tensors) for key, item in value["dict"]}
    items = [_decode(item, tensors) for item in value["list" if "list" in value else "tuple"]]
    return items if "list" in value else tuple(items)


def _is_dense(tensor: Tensor) -> bool:
    """Whether the strides are a permutation of contiguous ones."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True
