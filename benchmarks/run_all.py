"""All families, each in a process of its own, into one file of results; then the plots and the table on the terminal.

    python -m benchmarks.run_all --plan            what would be run, and for how long
    python -m benchmarks.run_all --only pq,cifar   these families; the others' rows stay in the file
    python -m benchmarks.run_all --quick           a smoke test in a minute or two; its numbers mean nothing

A process each keeps one family's thread pools and compiled code out of the next one's numbers. A family's rows are
written when it ends, all or nothing: a run that is interrupted keeps the finished ones. Other options go on to every
family: ``--peers``, ``--threads``, ``--seconds``, ``--out``.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import plot, results, tables
from benchmarks.common import QUICK_OUT

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Family:
    """One ``bench_<name>.py``.

    Attributes:
        name: of the family.
        minutes: it takes on two cores with all peers; past them, its contests have only a few rounds.
        about: what is measured.
    """

    name: str
    minutes: float
    about: str

    @property
    def path(self) -> Path:
        return FOLDER / f"bench_{self.name}.py"


#: In the order of running; 40 minutes are the most they may take together.
PLAN = (
    Family("networks", 11.0, "RepVGG-A0 and B1, ResNet-50, MobileNetV2 through effkern.optimize"),
    Family("cifar", 4.5, "ResNet-32 and ResNet-110 for CIFAR, dense"),
    Family("block_skip", 3.5, "BlockDrop: bodies and blocks over keep ratios"),
    Family("supernet", 4.0, "whole slimmable supernets: mixed widths, every width"),
    Family("rep_conv", 6.4, "single layers, and depthwise and pointwise ones in one pass"),
    Family("sliced_conv", 2.5, "single layers at a part of their width"),
    Family("pq", 3.5, "layers run from codes, and a network's memory"),
    Family("multi_branch_bn", 1.5, "batch norm of several branches, sum and ReLU, forward and backward"),
    Family("backward", 1.5, "gradients of convolutions"),
    Family("overhead", 0.3, "what a call costs beside its work"),
)


def present() -> list[Family]:
    """The families there are: those planned, then whatever else has a file."""
    planned = [family for family in PLAN if family.path.exists()]
    names = {family.name for family in PLAN}
    others = (path.stem.removeprefix("bench_") for path in sorted(FOLDER.glob("bench_*.py")))
    return planned + [Family(name, 3.0, "(not in the plan)") for name in others if name not in names]


def chosen(only: str | None) -> list[Family]:
    """The families ``only`` names, comma separated; all without it.

    Raises:
        SystemExit: for a name that is no family.
    """
    families = present()
    if only is None:
        return families
    wanted = only.split(",")
    unknown = sorted(set(wanted) - {family.name for family in families})
    if unknown:
        raise SystemExit(f"--only: no family {', '.join(unknown)}; there are {', '.join(f.name for f in families)}")
    return [family for family in families if family.name in wanted]


def print_plan(families: Sequence[Family]) -> None:
    """Families, minutes, and the sum."""
    for family in families:
        print(f"{family.name:<18}{family.minutes:>6.1f} min  {family.about}")
    print(f"{'together':<18}{sum(family.minutes for family in families):>6.1f} min")


def main(argv: Sequence[str]) -> int:
    """Run what is asked for; go on after a failure; return how many families failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run_all")
    parser.add_argument("--plan", action="store_true", help="print families and minutes, run nothing")
    parser.add_argument("--only", metavar="FAMILY[,FAMILY]", help="only these")
    parser.add_argument("--quick", action="store_true", help="smallest cases, three rounds")
    parser.add_argument("--out", type=Path, help=f"file of results (default: {results.CPU.name}, quick: {QUICK_OUT})")
    options, others = parser.parse_known_args(argv)
    families = chosen(options.only)
    if options.plan:
        print_plan(families)
        return 0
    out: Path = options.out or (QUICK_OUT if options.quick else results.CPU)
    results.load(out)
    failed: list[str] = []
    start = time.perf_counter()
    for i, family in enumerate(families):
        left = 60 * sum(f.minutes for f in families[i:])
        if not options.quick:
            until = time.strftime("%H:%M", time.localtime(time.time() + left))
            passed = (time.perf_counter() - start) / 60
            head = f"[{i + 1}/{len(families)}] {family.name}, about {family.minutes:g} min"
            print(f"== {head}; {passed:.1f} min passed, all done about {until} ==", flush=True)
        command = [sys.executable, "-m", f"benchmarks.{family.path.stem}", "--out", str(out), *others]
        command += ["--quick"] if options.quick else ["--budget", str(60 * family.minutes)]
        try:
            if subprocess.run(command, cwd=FOLDER.parent).returncode:
                failed.append(family.name)
        except KeyboardInterrupt:
            rest = ",".join(f.name for f in families[i:])
            print(f"\ninterrupted; what was finished is in {out}. To go on: --only {rest}", file=sys.stderr)
            return 130
    plot.main([str(out)])
    print(tables.terminal(results.load(out)))
    print(f"{(time.perf_counter() - start) / 60:.1f} min in all")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return len(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
