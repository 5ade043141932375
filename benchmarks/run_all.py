"""Runs every ``bench_*.py`` of this folder, each in a process of its own, then draws the plots.

All options go to every benchmark: ``python -m benchmarks.run_all --quick``, ``--threads 1 2``, ``--peers ...``.
A process each keeps one benchmark's thread pools and compiled code out of the next one's numbers.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from benchmarks import plot

FOLDER = Path(__file__).parent


def main(options: list[str]) -> int:
    """Run all, go on after a failure, return how many failed."""
    failed = []
    for path in sorted(FOLDER.glob("bench_*.py")):
        print(f"== {path.stem} ==", flush=True)
        if subprocess.run([sys.executable, "-m", f"benchmarks.{path.stem}", *options], cwd=FOLDER.parent).returncode:
            failed.append(path.stem)
    if "--quick" not in options:
        plot.main([])
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return len(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
