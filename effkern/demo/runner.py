"""Runs the stages in order, keeps what is finished, writes the report."""

from __future__ import annotations

import importlib
import math
import os
import platform
import time
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from effkern._version import __version__
from effkern.data import Dataset, load_digits, load_fashion_mnist
from effkern.info import machine
from effkern.report import build, write_report
from effkern.training import also_on_draw, say

from .context import DemoContext, StageResult
from .store import StageStore, code_fingerprint

__all__ = ["STAGES", "Options", "Stage", "run_demo"]


@dataclass(frozen=True)
class Stage:
    """A stage: its module ``effkern.demo.<name>``, what it shows, seconds for training and for measuring on 2 cores."""

    name: str
    title: str
    budget_s: float
    measuring_s: float


STAGES = (
    Stage("baseline", "a dense ResNet, trained in plain PyTorch", 130, 10),
    Stage("rep_conv", "a RepVGG-style net, folded and run fused", 105, 15),
    Stage("block_skip", "a BlockDrop policy that skips blocks image by image", 165, 40),
    Stage("sliced_conv", "a slimmable net, run at four widths and mixed ones", 120, 35),
    Stage("pq", "the baseline's weights as codes, run without decompressing", 45, 20),
)
LIMIT_S = 700.0  # of all stages; with loading and the report the demo stays below 12 minutes
LEAST = 0.3  # of its training budget a stage always gets, however late it is


@dataclass(frozen=True)
class Options:
    """What a user may choose.

    Attributes:
        out: folder of the run.
        stages: names of the stages to run; the baseline always is, since the others are held against it.
        seed: of everything random.
        threads: of torch; 0 for as many as torch takes by itself, which OMP_NUM_THREADS sets, within the cores allowed.
        quick: smoke test on the digits: tiny nets, few steps, short measurements; its numbers mean nothing.
        fresh: forget finished stages.
    """

    out: Path = Path("runs/demo")
    stages: tuple[str, ...] = tuple(stage.name for stage in STAGES)
    seed: int = 0
    threads: int = 0
    quick: bool = False
    fresh: bool = False

    def __post_init__(self) -> None:
        known = [stage.name for stage in STAGES]
        if unknown := [name for name in self.stages if name not in known]:
            raise ValueError(f"stages: must be among {', '.join(known)}, got {', '.join(unknown)}")
        if self.threads < 0:
            raise ValueError(f"threads: must be at least 0, got {self.threads}")
        if self.seed < 0:
            raise ValueError(f"seed: must be at least 0, got {self.seed}")


def run_demo(options: Options, stages: Sequence[Stage] = STAGES, data: Dataset | None = None) -> int:
    """Run the demo.

    Args:
        options: see :class:`Options`.
        stages: all stages there are.
        data: images to use instead of looking for Fashion-MNIST.

    Returns:
        Exit status: 0, 1 if a stage failed (the report then says so), 130 if interrupted.

    Raises:
        DataError: if there are no sound images.
        OSError: if the folder cannot be written.
    """
    threads_before = torch.get_num_threads()
    torch.set_num_threads(options.threads or min(threads_before, _cores_allowed()))
    try:
        return _Run(options, stages, data).go()
    finally:
        torch.set_num_threads(threads_before)


class _Run:
    def __init__(self, options: Options, stages: Sequence[Stage], data: Dataset | None) -> None:
        self.options = options
        self.stages = [stage for stage in stages if stage.name == "baseline" or stage.name in options.stages]
        self.data = data
        self.finished: list[str] = []
        self.failed: dict[str, str] = {}

    def go(self) -> int:
        begin = time.monotonic()
        try:
            self._prepare()
            self._run_stages()
            page = self._report(time.monotonic() - begin)
        except KeyboardInterrupt:
            self._say_how_to_go_on()
            return 130
        say(f"\nPage: {page}")
        for name, reason in self.failed.items():
            say(f"FAILED: {name}: {reason}")
        return 1 if self.failed else 0

    def _prepare(self) -> None:
        options = self.options
        if self.data is None:
            self.data = load_digits() if options.quick else load_fashion_mnist()
        self.ctx = DemoContext(
            data=self.data,
            folder=options.out,
            seed=options.seed,
            quick=options.quick,
            threads=torch.get_num_threads(),
            measure_s=0.02 if options.quick else 1.5,
        )
        self.machine = machine()
        config = {
            "seed": options.seed,
            "quick": options.quick,
            "threads": self.ctx.threads,
            "data": self.data.name,
            "code": code_fingerprint(),
            "cpu": self.machine["cpu"],
            "isa": self.machine["isa"],
            "torch": torch.__version__,
            "python": platform.python_version(),
            "effkern": __version__,
        }
        self.store = StageStore(options.out, config)
        self.store.folder.mkdir(parents=True, exist_ok=True)  # now, not after minutes of training
        say(f"Data: {self.data.name} from {self.data.source}: {len(self.data.train)} images to train on, ")
        say(f"      {len(self.data.val)} held out, {len(self.data.test)} to test. Threads: {self.ctx.threads}.")
        if options.quick:
            say("Quick run: tiny nets and few steps. It shows that everything works; its numbers mean nothing.")

    def _run_stages(self) -> None:
        kept = [] if self.options.fresh else self._kept()
        waiting = [stage for stage in self.stages if stage.name not in kept]
        spent = 0.0
        for name in kept:
            say(f"{name}: finished earlier, kept (--fresh starts over).")
            self.finished.append(name)
            spent += record["seconds"] if (record := self.store.load(name)) else 0.0
        # A new baseline voids every stage, those that were not asked for too.
        for stage in STAGES if "baseline" not in kept else waiting:
            self.store.drop(stage.name)
        whole = sum(map(_seconds, waiting))
        layout = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}" + (
            "" if self.options.quick else f" of about {_clock(whole)}"
        )
        # disable=None: only on a terminal; a log has the lines below. A plain tqdm, since the inner bars move it.
        with tqdm(total=whole, desc="demo", leave=False, dynamic_ncols=True, disable=None, bar_format=layout) as bar:
            begin = time.monotonic() - spent
            for number, stage in enumerate(waiting):
                self._give_budget(stage, waiting[number:], time.monotonic() - begin)
                if "baseline" in self.failed:
                    self.failed[stage.name] = "needs the baseline"
                    continue
                place = f"{self.stages.index(stage) + 1}/{len(self.stages)}"
                bar.set_description_str(f"demo {place}")
                say(f"\n[{place}] {stage.name}: {stage.title}")
                done = bar.n

                def move(done: float = done, stage: Stage = stage) -> None:
                    bar.n = done + min(_seconds(stage), time.monotonic() - self.ctx.begun)
                    bar.refresh()

                with also_on_draw(move):
                    self._run_stage(stage)
                bar.n = done + _seconds(stage)
                bar.refresh()

    def _give_budget(self, stage: Stage, left: Sequence[Stage], spent: float) -> None:
        """Time for training: as planned, or a fair share of what is left when earlier stages took longer."""
        share = (LIMIT_S - spent - sum(s.measuring_s for s in left)) / sum(s.budget_s for s in left)
        self.ctx.budget_s[stage.name] = stage.budget_s * min(1.0, max(LEAST, share))

    def _kept(self) -> list[str]:
        """Finished stages of an earlier start that still hold. All of them rest on the baseline."""
        kept = [stage.name for stage in self.stages if self.store.load(stage.name)]
        return kept if "baseline" in kept else []

    def _run_stage(self, stage: Stage) -> None:
        begin = self.ctx.begun = time.monotonic()
        torch.manual_seed(self.options.seed)
        try:
            module = importlib.import_module(f"{__package__}.{stage.name}")
            result: StageResult = module.run(self.ctx)
            seconds = time.monotonic() - begin
            self.store.save(stage.name, result, seconds)
        except OSError:
            raise  # the disk, not the stage: nothing later would fare better
        except Exception as error:
            # The other stages are still worth showing; the report and the exit status say what is missing.
            say(traceback.format_exc())
            self.failed[stage.name] = f"{type(error).__name__}: {error}"
            return
        self.finished.append(stage.name)
        say(f"{stage.name}: done in {_clock(seconds)}")
        for note in result.notes:
            say(f"  {note}")

    def _report(self, seconds: float) -> Path:
        data = self.data
        assert data is not None
        records = {stage: self.store.load(stage.name) for stage in self.stages}
        report = build(
            run={
                "quick": self.options.quick,
                "seed": self.options.seed,
                "threads": self.ctx.threads,
                "seconds": round(seconds, 1),
                "data": {
                    "name": data.name,
                    "source": data.source,
                    "train": len(data.train),
                    "val": len(data.val),
                    "test": len(data.test),
                },
            },
            machine=self.machine,
            classes=data.classes,
            stages={stage.name: {**record, "title": stage.title} for stage, record in records.items() if record},
            failed=self.failed,
        )
        return write_report(self.options.out, report, data.test.images, data.test.labels)

    def _say_how_to_go_on(self) -> None:
        done = ", ".join(self.finished) or "no stage"
        say(f"\nInterrupted. Finished and kept: {done}.")
        left = self._first_unfinished([stage.name for stage in self.stages])
        if left:
            say(f"The same command goes on with {left}.")

    def _first_unfinished(self, names: Iterable[str]) -> str | None:
        return next((name for name in names if name not in self.finished), None)


def _cores_allowed() -> int:
    """Cores this process may use: those it may run on, within the quota of its control group (containers)."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(cores, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # no such file, or "max"
        return cores


def _seconds(stage: Stage) -> float:
    return stage.budget_s + stage.measuring_s


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d} min"
