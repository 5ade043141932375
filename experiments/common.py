"""What all experiments share: pieces that are done once, a result file after each, a page made from it alone."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor, nn

from effkern.data import DataError, Dataset, open_data
from effkern.info import machine
from effkern.nn import SkipBlock, SlicedConvBNAct
from effkern.recipes import config_path, run_recipe
from effkern.training import CheckpointError, Interrupted, load_json, save_json, say, write_atomically

__all__ = ["Context", "Experiment", "Piece", "cell", "frozen", "main", "spread", "table"]

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- made from results.json -->", "<!-- end -->"


@dataclass
class Context:
    """Where an experiment reads and writes.

    Attributes:
        name: of the experiment.
        folder: with its configurations; ``results.json``, the page and the plots are written to ``out``.
        out: see above.
        runs: folder of the trainings.
        images: data set by its name on the command line.
        weights: of a trained network to begin with, or empty.
        quick: a smoke test: digits, tiny networks, few steps.
        device: that trains.
        settings: of every training besides its own; such as change no result but by rounding.
    """

    name: str
    folder: Path
    out: Path
    runs: Path
    images: str
    weights: str = ""
    quick: bool = False
    device: str = "cpu"
    settings: tuple[str, ...] = ()

    @cached_property
    def data(self) -> Dataset:
        """The images."""
        return open_data(self.images).to(self.device)

    def config(self, name: str) -> Path:
        """A configuration of this experiment, or one of a recipe's own as ``recipe/name``."""
        recipe, _, own = name.partition("/")
        return config_path(recipe, own) if own else self.folder / f"{name}.toml"

    def train(
        self, key: str, recipe: str, config: str, settings: Sequence[str], after: str = "", phases: Sequence[str] = ()
    ) -> dict[str, Any]:
        """Run a recipe in a folder of its own; what was interrupted goes on.

        Args:
            key: names the folder.
            recipe: of `effkern.recipes`.
            config: see `config`.
            settings: single values in place of the configuration's.
            after: key of a run whose finished ``phases`` this one goes on from.
            phases: see above.
        """
        for phase in phases:
            source, target = self.runs / after / phase, self.runs / key / phase
            if not target.exists():
                shutil.copytree(source, target.with_suffix(".part"), dirs_exist_ok=True)
                target.with_suffix(".part").rename(target)
        return run_recipe(recipe, self.config(config), self.data, self.runs / key, [*settings, *self.settings])


@dataclass(frozen=True)
class Piece:
    """A part of an experiment: ``make(context, results of the pieces before)`` gives plain data.

    Attributes:
        name: unique.
        settings: what it depends on; with other settings it is done again.
        make: see above.
        images: kind of data set it is for, as ``cifar10``. One that pieces name runs those alone, another the rest.
    """

    name: str
    settings: Any
    make: Callable[[Context, Mapping[str, Any]], Any]
    images: str = ""


@dataclass(frozen=True)
class Experiment:
    """An experiment.

    Attributes:
        name: of its folders.
        title: of its page.
        images: data set, unless the command line names another.
        pieces: in order.
        headline: from the pieces' results, what stands at the top level of ``results.json``.
        page: from the content of ``results.json``, the text under the title and the plots by file name. Pieces may be
            missing.
    """

    name: str
    title: str
    images: str
    pieces: Callable[[bool], list[Piece]]
    headline: Callable[[Mapping[str, Any]], dict[str, Any]]
    page: Callable[[Mapping[str, Any]], tuple[str, dict[str, bytes]]]


def main(experiment: Experiment, arguments: Sequence[str] | None = None) -> int:
    """The command line of an experiment; returns its exit status."""
    parser = argparse.ArgumentParser(prog=f"python -m experiments.{experiment.name}", description=experiment.title)
    parser.add_argument("--data", help=f"fashion-mnist, digits or cifar10:PATH (default: {experiment.images})")
    parser.add_argument("--weights", default="", help="trained network to begin with (blockdrop)")
    parser.add_argument("--quick", action="store_true", help="smoke test in seconds on digits; tells nothing")
    parser.add_argument("--only", nargs="*", help="names of pieces, or beginnings that are none's name")
    parser.add_argument("--plan", action="store_true", help="list the pieces and what they took")
    parser.add_argument("--render", action="store_true", help="only make page and plots from results.json")
    parser.add_argument("--out", type=Path, help="default: docs/experiments/NAME, with --quick runs/quick/NAME")
    parser.add_argument("--runs", type=Path, help="folder of the trainings (default: runs/experiments/NAME)")
    parser.add_argument("--device", default="cpu", help="that trains; pieces that measure time are the processor's")
    parser.add_argument("--set", nargs="*", default=[], help="settings of all trainings, as run.skip_ops=false")
    parser.add_argument("--threads", type=int, default=0, help="threads of torch")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    folder = ROOT / "docs" / "experiments" / experiment.name
    quick = Path("runs") / "quick" / experiment.name
    context = Context(
        experiment.name,
        folder,
        options.out or (quick if options.quick else folder),
        options.runs or (quick / "runs" if options.quick else Path("runs") / "experiments" / experiment.name),
        options.data or ("digits" if options.quick else experiment.images),
        options.weights,
        options.quick,
        options.device,
        tuple(options.set),
    )
    try:
        return _run(experiment, context, options)
    except Interrupted as stopped:
        return _fail(str(stopped), 128 + stopped.signal)
    except KeyboardInterrupt:
        return _fail("interrupted; the same command goes on", 130)
    except (DataError, ValueError, CheckpointError, FloatingPointError, OSError) as error:
        return _fail(f"{experiment.name}: {error}")


def _run(experiment: Experiment, context: Context, options: argparse.Namespace) -> int:
    file = context.out / "results.json"
    results: dict[str, Any] = load_json(file) if file.is_file() else {}
    kept: dict[str, Any] = results.setdefault("pieces", {})
    pieces, kind = experiment.pieces(context.quick), context.images.partition(":")[0]
    if not context.quick:
        named = kind if any(p.images == kind for p in pieces) else ""
        pieces = [p for p in pieces if p.images == named]
    names = {piece.name for piece in pieces}
    whole, begun = ({n for n in options.only or [] if (n in names) == known} for known in (True, False))
    wanted = [p for p in pieces if not options.only or p.name in whole or any(p.name.startswith(n) for n in begun)]
    if options.plan:
        for piece in wanted:
            found = kept.get(piece.name)
            say(f"{piece.name:40s} {'to do' if found is None else _duration(found['seconds'])}")
        return 0
    for piece in [] if options.render else wanted:
        # As it would be read back.
        settings = json.loads(json.dumps({"images": kind, "settings": piece.settings}))
        found = kept.get(piece.name)
        if found is not None and found["settings"] == settings:
            continue
        say(f"{experiment.name}: {piece.name}")
        begin = time.monotonic()
        done = piece.make(context, {name: other["result"] for name, other in kept.items()})
        seconds = round(time.monotonic() - begin, 1)
        place = {**machine(), **({} if context.device == "cpu" else {"device": torch.cuda.get_device_name()})}
        kept[piece.name] = {"settings": settings, "seconds": seconds, "machine": place, "result": done}
        _write(experiment, context, results)
    _write(experiment, context, results)
    return 0


def _write(experiment: Experiment, context: Context, results: dict[str, Any]) -> None:
    """Result file first; page and plots follow from what stands in it."""
    made = {name: piece["result"] for name, piece in results["pieces"].items()}
    content = {**experiment.headline(made), "quick": context.quick, "pieces": results["pieces"]}
    context.out.mkdir(parents=True, exist_ok=True)
    save_json(context.out / "results.json", content)
    text, plots = experiment.page(json.loads((context.out / "results.json").read_text()))
    for name, picture in plots.items():
        write_atomically(context.out / name, picture)
    hours = sum(piece["seconds"] for piece in results["pieces"].values()) / 3600
    places = sorted({_place(piece["machine"]) for piece in results["pieces"].values()})
    images = " and ".join(sorted({piece["settings"]["images"] for piece in results["pieces"].values()}))
    foot = f"Images: {images or 'none yet'}. {hours:.1f} hours in all, on {'; '.join(places) or 'no machine yet'}."
    if context.quick:
        foot += " A smoke test on tiny networks: its numbers mean nothing."
    page = f"# {experiment.title}\n\n{BEGIN}\n\n{text.strip()}\n\n{foot}\n\n{END}\n"
    write_atomically(context.out / "README.md", page.encode())


def _place(machine: Mapping[str, Any]) -> str:
    return machine.get("device") or f"{machine['cpu']}, {machine['cores']} cores"


def _fail(message: str, status: int = 1) -> int:
    print(f"experiments: {message}", file=sys.stderr)
    return status


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.2f} h" if seconds >= 360 else f"{seconds:.0f} s"


def table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; numbers to the right."""
    lines = [heads, [":--" if i == 0 else "--:" for i in range(len(heads))], *rows]
    return "\n".join("| " + " | ".join(cell(value) for value in line) + " |" for line in lines)


def cell(value: Any) -> str:
    """Text of a table's cell: floats with two digits, nothing as a dash."""
    if value is None:
        return "-"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def spread(values: Sequence[float]) -> str:
    """Mean and, of several seeds, the standard deviation."""
    if not values:
        return "-"
    return f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


def frozen(net: nn.Module) -> nn.Module:
    """``net`` in eval mode as it is deployed: batch norm folded, weights packed, nothing looked at again."""
    net.eval()
    for module in net.modules():
        if isinstance(module, SkipBlock):
            module.freeze_pack()
        elif isinstance(module, SlicedConvBNAct):
            module.fold()
    return net


def keep_memory() -> None:
    """Have glibc keep what is freed, for all that is measured from here on in this process.

    By default it gives large maps back and gets them as new pages, 1 to 3 us each: 5 of 30 ms of a call with maps of
    4 MB, or none, as memory happens to lie. Elsewhere than under glibc this does nothing.
    """
    trim_threshold, mmap_threshold = -1, -3  # malloc.h
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        if mallopt(mmap_threshold, 1 << 30) or mallopt(mmap_threshold, 32 << 20):  # the most before glibc 2.35
            mallopt(trim_threshold, 1 << 30)


@dataclass
class Cycle:
    """Calls a network on one batch after the other, so that a time is that of many images."""

    net: Callable[[Tensor], Any]
    batches: Sequence[Tensor]
    at: int = field(default=0)

    def __call__(self) -> Any:
        self.at = (self.at + 1) % len(self.batches)
        return self.net(self.batches[self.at])


def batches_of(images: Tensor, size: int, count: int = 64) -> list[Tensor]:
    """Up to ``count`` batches of ``size`` images in the engine's layout."""
    whole = [part for part in images[: size * count].split(size) if len(part) == size]
    return [part.to(memory_format=torch.channels_last) for part in whole]
