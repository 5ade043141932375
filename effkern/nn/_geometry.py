"""Kernel sizes, strides, paddings and dilations as layers take them."""

from __future__ import annotations

from collections.abc import Sequence

from effkern.ops._checks import LIMIT, pair


def ints(value: int | Sequence[int], name: str, least: int = 1) -> tuple[int, int]:
    """An int, or one for rows and one for columns, as two.

    Raises:
        TypeError: if they are no ints.
        ValueError: for another number of them, and for values below ``least``.
    """
    rows, columns = pair(value, name)
    for number in (rows, columns):
        if not isinstance(number, int):
            raise TypeError(f"{name} must be an int or 2 ints, got {value!r}")
        if not least <= number < LIMIT:
            raise ValueError(f"{name} must be at least {least}, got {value!r}")
    return rows, columns
