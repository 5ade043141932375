"""Where the CUDA tools are. Nothing is fetched; a test that needs what is missing is skipped and says so."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

#: Targets of the library (setup.py).
ARCHS = (80, 86, 89, 90, 100, 120)


def home() -> Path | None:
    """The toolkit: CUDA_HOME, /usr/local/cuda, or the one whose nvcc is on PATH."""
    places = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    if nvcc := shutil.which("nvcc"):
        places.append(str(Path(nvcc).resolve().parent.parent))
    return next((Path(p) for p in places if p and (Path(p) / "bin" / "nvcc").exists()), None)


def cuobjdump() -> Path | None:
    """From the toolkit or PATH, else the copy of the PyPI packages triton or nvidia-cuda-{cuobjdump,nvdisasm}."""
    toolkit, site = home(), Path(sysconfig.get_path("purelib"))
    places = [toolkit / "bin" / "cuobjdump"] if toolkit else []
    if found := shutil.which("cuobjdump"):
        places.append(Path(found))
    places += [
        site / "triton" / "backends" / "nvidia" / "bin" / "cuobjdump",
        site / "nvidia" / "cu13" / "bin" / "cuobjdump",
        site / "nvidia" / "cuda_cuobjdump" / "bin" / "cuobjdump",
    ]
    return next((p for p in places if p.exists()), None)


def version(toolkit: Path) -> str:
    """For instance 13.0.88: each build makes code of its own."""
    text = subprocess.run([toolkit / "bin" / "nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"V(\d+\.\d+\.\d+)", text)[1]


def known_archs(toolkit: Path) -> list[int]:
    text = subprocess.run([toolkit / "bin" / "nvcc", "--list-gpu-arch"], capture_output=True, text=True, check=True)
    return [arch for arch in ARCHS if f"compute_{arch}" in text.stdout.split()]
