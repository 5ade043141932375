"""The command line: ``effkern demo | train | info | bench | report``."""

from __future__ import annotations

import argparse
import runpy
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from effkern._version import __version__

__all__ = ["main"]

OK, FAILED, WRONG_USE = 0, 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status. Errors a user can do something about are one line, not a traceback."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # `bench` and `info` hand everything on, options included.
    if arguments[:1] == ["bench"]:
        return _bench(arguments[1:])
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except BrokenPipeError:
        return OK  # `effkern report ... | head`
    except KeyboardInterrupt:
        return _fail("interrupted", 128 + signal.SIGINT)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="effkern", description="Efficient convolutional networks on kernels that save the time they promise."
    )
    parser.add_argument("--version", action="version", version=f"effkern {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    demo = commands.add_parser(
        "demo",
        help="train on real images and take one network through every kind of op",
        description="Trains on Fashion-MNIST and measures every kind of op against eager PyTorch, in about 12 minutes "
        "on 2 cores. Ctrl-C keeps the finished stages; the same command goes on.",
    )
    demo.add_argument("--out", type=Path, help="folder of the run (default: runs/demo, with --quick runs/demo-quick)")
    demo.add_argument("--stages", type=_names, help="comma-separated stages to run besides the baseline (default: all)")
    demo.add_argument("--seed", type=int, default=0, help="of everything random (default: 0)")
    demo.add_argument("--threads", type=int, default=0, help="threads of torch (default: its own choice)")
    demo.add_argument("--fresh", action="store_true", help="forget the finished stages of an earlier start")
    demo.add_argument("--quick", action="store_true", help="smoke test in seconds, on scikit-learn's digits")
    demo.set_defaults(run=_demo)

    train = commands.add_parser(
        "train",
        help="train a network by one of the methods, on data of yours",
        description="Runs a recipe of effkern.recipes with one of its configurations or a file of yours. Ctrl-C saves "
        "first; the same command goes on. Several processes: torchrun --nproc-per-node 2 -m effkern train ...",
    )
    train.add_argument(
        "recipe", metavar="RECIPE", help="blockdrop, dsnet, stochastic-depth, ...; a wrong one lists all"
    )
    train.add_argument("--data", required=True, help="fashion-mnist, digits, cifar10:PATH or imagefolder:PATH")
    train.add_argument("--config", default="small", help="small, paper or a TOML file (default: %(default)s)")
    train.add_argument("--out", type=Path, help="folder of the run (default: runs/RECIPE)")
    train.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="e.g. train.lr=0.1; may repeat")
    train.add_argument("--fresh", action="store_true", help="forget what an earlier start left in the folder")
    train.add_argument("--threads", type=int, default=0, help="threads of torch (default: its own choice)")
    train.add_argument("--workers", type=int, help="processes that decode image files (default: one a processor)")
    train.set_defaults(run=_train)

    info = commands.add_parser("info", help="versions, libraries, instruction set: what a bug report needs")
    info.set_defaults(run=_info)

    # Only for the list of commands; main() has handed `bench` on before.
    commands.add_parser("bench", help="time every op against PyTorch and other engines (in a source checkout)")

    report = commands.add_parser("report", help="print the table of a finished run")
    report.add_argument("format", choices=("table", "markdown"), help="aligned text, or Markdown for a README")
    report.add_argument(
        "file", type=Path, nargs="?", default=Path("runs/demo/report.json"), help="default: %(default)s"
    )
    report.add_argument("--into", type=Path, help="with markdown: write it between the table's marks in this file")
    report.set_defaults(run=_report)
    return parser


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _demo(options: argparse.Namespace) -> int:
    from effkern.data import DataError
    from effkern.demo.runner import STAGES, Options, run_demo

    try:
        chosen = Options(
            out=options.out or Path("runs/demo-quick" if options.quick else "runs/demo"),
            stages=tuple(stage.name for stage in STAGES) if options.stages is None else options.stages,
            seed=options.seed,
            threads=options.threads,
            quick=options.quick,
            fresh=options.fresh,
        )
    except ValueError as error:
        return _fail(f"demo: {error}", WRONG_USE)
    try:
        return run_demo(chosen)
    except DataError as error:
        return _fail(f"demo: {error}")
    except OSError as error:
        return _fail(f"demo: cannot write the run: {error}")


def _train(options: argparse.Namespace) -> int:
    import torch

    from effkern.data import DataError, open_data
    from effkern.recipes import RecipeError, config_path, run_recipe
    from effkern.training import CheckpointError, Interrupted

    if options.threads < 0:
        return _fail(f"train: threads: must be at least 0, got {options.threads}", WRONG_USE)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        config = config_path(options.recipe, options.config)
    except RecipeError as error:
        return _fail(f"train: {error}", WRONG_USE)
    try:
        out = options.out or Path("runs") / options.recipe
        data = open_data(options.data, options.workers)
        run_recipe(options.recipe, config, data, out, options.set, options.fresh)
    except Interrupted as stopped:
        return _fail(f"train: {stopped}", 128 + stopped.signal)
    except (DataError, ValueError, CheckpointError, FloatingPointError, ModuleNotFoundError) as error:
        return _fail(f"train: {error}")
    except OSError as error:
        return _fail(f"train: cannot read or write: {error}")
    return OK


def _info(options: argparse.Namespace) -> int:
    runpy.run_module("effkern.info", run_name="__main__")
    return OK


def _bench(arguments: Sequence[str]) -> int:
    checkout = Path(__file__).resolve().parents[1]
    for root in (checkout, Path.cwd()):
        if (root / "benchmarks" / "run_all.py").is_file():
            sys.path.insert(0, str(root))
            sys.argv = ["effkern bench", *arguments]
            runpy.run_module("benchmarks.run_all", run_name="__main__", alter_sys=True)
            return OK
    return _fail("bench: the benchmarks are not part of an installed package; run this in a source checkout of effkern")


def _report(options: argparse.Namespace) -> int:
    from effkern.report import load_report, table
    from effkern.training import CheckpointError, write_atomically

    if options.into and options.format != "markdown":
        return _fail("report: --into goes with markdown only", WRONG_USE)
    try:
        report = load_report(options.file)
        text = table.section(report) if options.format == "markdown" else table.terminal(report["rows"])
    except CheckpointError as error:
        return _fail(f"report: {error}")
    except (KeyError, TypeError) as error:
        return _fail(f"report: {options.file}: incomplete or not of this version: {error!r}")
    if options.into is None:
        sys.stdout.write(text)
        return OK
    try:
        write_atomically(options.into, table.insert(options.into.read_text(), text).encode())
    except (OSError, ValueError) as error:
        return _fail(f"report: {options.into}: {error}")
    return OK


def _fail(message: str, status: int = FAILED) -> int:
    sys.stdout.flush()
    print(f"effkern: {message}", file=sys.stderr)
    return status
