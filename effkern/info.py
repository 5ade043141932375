"""``python -m effkern.info``: what is installed, what was loaded, what this machine can do; for bug reports."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from effkern._version import __version__

_ROOT = Path(__file__).resolve().parent
_INSTRUCTION_SETS = {"avx512": ("avx512f", "avx512bw", "avx512vl", "avx512dq"), "avx2": ("avx2", "fma", "f16c")}


def machine() -> dict[str, Any]:
    """What a measurement has to be read with: processor, instruction set, versions, commit. JSON-able."""
    cpu, flags = _cpu()
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "isa": os.environ.get("EFFKERN_ISA") or _widest(flags),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "effkern": __version__,
        "commit": commit(),
    }


def commit() -> str:
    """Short id of the checkout this package runs from, with ``+`` when it was changed; ``""`` for an installed copy."""
    if not (_ROOT.parent / ".git").exists():
        return ""
    try:
        head = _git("rev-parse", "--short=10", "HEAD")
        return head + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=_ROOT, check=True, capture_output=True, text=True).stdout.strip()


def _cpu() -> tuple[str, frozenset[str]]:
    fields: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    except OSError:
        pass
    return fields.get("model name") or platform.machine(), frozenset(fields.get("flags", "").split())


def _widest(flags: frozenset[str]) -> str:
    return next((name for name, needed in _INSTRUCTION_SETS.items() if flags.issuperset(needed)), "scalar")


if __name__ == "__main__":
    sys.stdout.write("\n".join(f"{key:<12}{value}" for key, value in machine().items()) + "\n")
