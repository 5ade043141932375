"""``python -m effkern.info``: what is installed, what was loaded, what this machine can do; for bug reports."""

from __future__ import annotations

import importlib
import os
import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from effkern import _library
from effkern._version import __version__
from effkern.ops._registry import OPS

_ROOT = Path(__file__).resolve().parent
_INSTRUCTION_SETS = {
    "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq"},
    "avx2": {"avx2", "fma", "f16c"},
    "scalar": set(),
}


def machine() -> dict[str, Any]:
    """What a measurement has to be read with: processor, instruction set, versions, commit. JSON-able."""
    cpu, flags = _cpu()
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "isa": os.environ.get("EFFKERN_ISA") or _instruction_sets(flags)[0],
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


def _cpu() -> tuple[str, set[str]]:
    """Name and feature flags of the first processor, as the kernel tells them."""
    fields: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    except OSError:
        pass
    return fields.get("model name") or platform.machine(), set(fields.get("flags", "").split())


def _instruction_sets(flags: set[str]) -> list[str]:
    """The sets this processor has, widest first."""
    return [name for name, needed in _INSTRUCTION_SETS.items() if needed <= flags]


def libraries() -> dict[str, str]:
    """Native library to ``"loaded"`` or the reason why it is not."""
    state = {name: _library.missing.get(name, "loaded") for name in ("_C", "_C_cuda")}
    try:
        importlib.import_module("effkern._host")
        state["_host"] = "loaded"
    except ImportError as error:
        built = any(_ROOT.glob("_host.*.so"))
        state["_host"] = f"built, but this Python could not load it: {error}" if built else "not built"
    return state


def backends() -> dict[str, dict[str, str]]:
    """Operator to device to ``"native"``, ``"composed"`` (calls of others) or ``"reference"`` (in plain PyTorch)."""
    return {name: dict(OPS[name].backends) for name in sorted(OPS)}


def _lines() -> Iterator[str]:
    here = machine()
    flags = _cpu()[1]
    yield f"effkern          {here['effkern']}" + (f" (commit {here['commit']})" if here["commit"] else "")
    yield f"torch            {here['torch']}"
    yield f"python           {here['python']}, {here['platform']}"
    yield f"processor        {here['cpu']}, {here['cores']} cores usable, {torch.get_num_threads()} threads in torch"
    has = _instruction_sets(flags)
    refused = "" if here["isa"] in has else "; EFFKERN_ISA asks for another, so every kernel refuses to run"
    yield f"instruction set  {here['isa']} (this processor has {', '.join(has)}{refused})"
    yield f"GPU              {torch.cuda.get_device_name() if torch.cuda.is_available() else 'none usable by torch'}"
    yield ""
    for name, state in libraries().items():
        yield f"{name:<17}{state}"
    if "not built" in libraries().values():
        yield "                 build what is missing: pip install --no-build-isolation -e . (see docs/install.md)"
    yield ""
    width = 2 + max(map(len, OPS))
    yield f"{'operator':<{width}}{'CPU':<12}CUDA"
    for name, where in backends().items():
        yield f"{name:<{width}}{where['cpu']:<12}{where['cuda']}"


if __name__ == "__main__":
    print("\n".join(_lines()))
