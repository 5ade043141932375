"""Where the package under test lies, and how to start another Python with it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import effkern

PACKAGE = Path(effkern.__file__).resolve().parent
ROOT = PACKAGE.parent
CHECKOUT = Path(__file__).resolve().parents[2]


def python(
    *arguments: str, path: Path = ROOT, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess:
    """Run this interpreter with ``path`` first on its module path; never raises, the test looks at the result."""
    env = (
        {k: v for k, v in os.environ.items() if not k.startswith("EFFKERN_")} | {"PYTHONPATH": str(path)} | environment
    )
    return subprocess.run([sys.executable, *arguments], env=env, cwd=cwd, capture_output=True, text=True)
