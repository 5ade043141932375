"""Files that are either the old one or the new one, never half of either: weights as safetensors, the rest as JSON."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from .counting import plain_tensors

__all__ = [
    "CheckpointError",
    "in_a_line",
    "load_json",
    "load_weights",
    "save_json",
    "save_weights",
    "write_atomically",
]


class CheckpointError(RuntimeError):
    """A saved file is missing, cut short or not what it should be."""


def in_a_line(error: Exception, limit: int = 400) -> str:
    """The message of an error as one line; what is beyond ``limit`` characters, as long lists of names, is left out."""
    text = " ".join(str(error).split())
    return text if len(text) <= limit else f"{text[:limit].rstrip()} ..."


def write_atomically(path: Path, content: bytes) -> None:
    """Write ``content`` under a temporary name in the same folder, then rename it to ``path``.

    A crash at any moment leaves ``path`` as it was; an exception also removes the temporary file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # else a power cut can leave the new name with no content
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp is private; a result should be readable like any other file
        os.replace(temporary, path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a write that fails for want of room does not say where
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def save_weights(path: Path, state: Mapping[str, Tensor]) -> int:
    """Save a state dict; returns the size of the file in bytes."""
    content = save(plain_tensors(state))
    write_atomically(path, content)
    return len(content)


def load_weights(path: Path) -> dict[str, Tensor]:
    """Load what :func:`save_weights` wrote.

    Raises:
        CheckpointError: if the file is missing, cut short or no safetensors file.
    """
    try:
        return load(path.read_bytes())
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read as safetensors: {error}") from error


def save_json(path: Path, value: Any) -> None:
    """Save plain data. NaN and infinity are refused, since JSON has neither.

    Raises:
        ValueError: if a number is not finite.
        TypeError: if a value is no plain data.
    """
    write_atomically(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def load_json(path: Path) -> Any:
    """Load what :func:`save_json` wrote.

    Raises:
        CheckpointError: if the file is missing, cut short or no JSON.
    """
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from error
