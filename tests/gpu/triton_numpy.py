"""Triton's interpreter up to 3.6 on NumPy from 2.5 on."""

from __future__ import annotations

from typing import Any

from triton.runtime import interpreter


def mend() -> None:
    """The bounds of a kernel's loops are arrays of one number, of which the former asks ``int()``, which the latter
    refuses. Later ones squeeze the array first."""
    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, *scope: Any) -> None:
        patch(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = patched
