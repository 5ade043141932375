"""What a run of the proof counted, for the line that closes it (conftest.py)."""

from __future__ import annotations

#: Part of the proof -> what it says of itself.
COUNTS: dict[str, str] = {}

#: The parts, in the order in which the line names them.
PARTS = ("compiled", "schedules", "mutants", "operators", "triton", "interpreter")


def line() -> str:
    return "; ".join(COUNTS.get(part, f"{part}: not run") for part in PARTS)
