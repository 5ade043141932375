"""Stochastic depth: what it costs and gives in accuracy, and that a block that does not run takes no time."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from functools import partial
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effkern.models import create_model
from effkern.report.plots import curves
from effkern.stochastic_depth import convert, survival_schedule
from effkern.training import measure
from experiments.common import Context, Experiment, Piece, main, spread, table

SEEDS = (0, 1, 2)
#: Name, settings.
FORMS = {
    "none": ["depth.last=1.0"],
    "linear, batch": ["depth.form=linear", "depth.mode=batch"],
    "linear, row": ["depth.form=linear", "depth.mode=row"],
    "linear, subset": ["depth.form=linear", "depth.mode=subset"],
    "uniform, batch": ["depth.form=uniform", "depth.mode=batch"],
}
LENGTHS = (6, 18)
SURVIVAL = (1.0, 0.9, 0.75, 0.5, 0.25)
QUICK = [
    "network.options={widths=[4,4,4],blocks=[1,1,1],stem_stride=2,shortcut='pool'}",
    "train.batch_size=64",
]


def pieces(quick: bool) -> list[Piece]:
    """Trainings, then step times."""
    seeds, lengths = (SEEDS[:1], (0.2,)) if quick else (SEEDS, LENGTHS)
    result = [
        Piece(f"{name}, {epochs} epochs, seed {seed}", settings, partial(trained, settings=settings))
        for epochs, seed, (name, form) in itertools.product(lengths, seeds, FORMS.items())
        for settings in [[*form, f"train.epochs={epochs}", f"train.seed={seed}", *(QUICK if quick else [])]]
    ]
    network = {"widths": (4, 4, 4), "blocks": (1, 1, 1)} if quick else {}
    options: dict[str, Any] = {"network": network, "batch": 16 if quick else 128, "seconds": 0.2 if quick else 240.0}
    return [*result, Piece("step time", options, partial(step_times, **options))]


def trained(context: Context, before: Mapping[str, Any], settings: list[str]) -> dict[str, Any]:
    """One training."""
    key = "-".join(part.rpartition(".")[2].replace("=", "_") for part in settings if "{" not in part)
    phase = context.train(key, "stochastic-depth", "config", settings)["phases"]["train"]
    return {"top1": phase["test"]["top1"], "seconds": phase["seconds"], "steps": phase["steps"]}


def step_times(
    context: Context, before: Mapping[str, Any], network: dict[str, Any], batch: int, seconds: float
) -> list[dict[str, Any]]:
    """Forward, backward and update of one step against the share of blocks it runs; all forms interleaved.

    The share is that of the block's multiply-adds. In batch mode steps differ, so many are averaged.
    """
    base = create_model("resnet32", shortcut="pool", **network).to(memory_format=torch.channels_last)
    side = 8 if context.quick else 32
    x = torch.randn(batch, 3, side, side).to(memory_format=torch.channels_last)
    y = torch.randint(10, (batch,))
    always, blocks = base.block_macs((3, side, side))  # type: ignore[operator]
    functions, usage = {}, {}
    for last in SURVIVAL:
        survival = survival_schedule(len(blocks), last, "uniform")
        share = (always + sum(p * m for p, m in zip(survival.tolist(), blocks, strict=True))) / (always + sum(blocks))
        for mode in ("batch", "row", "subset") if last < 1 else ("dense",):
            net = base if mode == "dense" else convert(base, survival, mode)  # type: ignore[arg-type]
            functions[f"{mode} {last}"] = partial(_step, net.train(), torch.optim.SGD(net.parameters(), 1e-3), x, y)
            usage[f"{mode} {last}"] = share
    functions["masked 0.5"] = partial(_masked, base, torch.optim.SGD(base.parameters(), 1e-3), x, y, 0.5)
    usage["masked 0.5"] = usage["row 0.5"]
    rounds = measure(functions, seconds=seconds, min_reps=10 if context.quick else 20, max_reps=10_000)
    dense = rounds["dense 1.0"].median_ms
    return [
        {"form": name, "usage": usage[name], "ms": time.median_ms, "time_left": time.median_ms / dense}
        for name, time in rounds.items()
    ]


def _step(net: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    with torch.inference_mode(False), torch.enable_grad():
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()


def _masked(net: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, survival: float) -> None:
    """What everybody else does: compute all, multiply by the draw."""
    with torch.inference_mode(False), torch.enable_grad():
        keep = (torch.rand(len(x), net.num_blocks) < survival).float()  # type: ignore[call-overload]
        optimizer.zero_grad()
        F.cross_entropy(net(x, keep), y).backward()
        optimizer.step()


def headline(made: Mapping[str, Any]) -> dict[str, Any]:
    """Means over seeds."""
    rows = []
    groups: dict[str, list[Any]] = {}
    for name, result in made.items():
        if ", seed " in name:
            groups.setdefault(name.rpartition(", seed ")[0], []).append(result)
    for name, group in groups.items():
        top1 = [one["top1"] for one in group]
        rows.append({"name": name, "top1": mean(top1), "top1_of_seeds": top1})
    return {"trainings": rows, "step_time": made.get("step time", [])}


def page(results: Mapping[str, Any]) -> tuple[str, dict[str, bytes]]:
    """Two tables and a plot.

    The seconds of whole trainings are not shown: the machine did other work meanwhile. Steps are timed interleaved.
    """
    trainings = [[row["name"], len(row["top1_of_seeds"]), spread(row["top1_of_seeds"])] for row in results["trainings"]]
    text = (
        "Accuracy on the test images, mean and deviation over the seeds, for a survival of 0.5 in the last block "
        "(linear) or in every one (uniform):\n\n" + table(["survival, mode", "seeds", "top-1 %"], trainings)
    )
    if not results["step_time"]:
        return text, {}
    steps = [
        [row["form"], row["usage"], row["time_left"], row["time_left"] - row["usage"], row["ms"]]
        for row in results["step_time"]
    ]
    text += (
        "\n\nA training step of ResNet-32 at batch 128 with uniform survival: forward, backward, update. Usage is "
        "the share of multiply-adds that is expected to run; the difference is to be at most +0.08 in the modes `row` "
        "and `subset`. In `batch` mode steps differ and the median is that of a typical one. `masked` computes every "
        "block and multiplies.\n\n" + table(["mode, survival", "usage", "time left", "difference", "ms"], steps)
    )
    series: dict[str, list[list[float]]] = {}
    for row in results["step_time"]:
        series.setdefault(row["form"].split()[0], []).append([row["usage"], row["time_left"]])
    series["all saved"] = [[0, 0], [1, 1]]
    plot = curves({"x": "share of multiply-adds", "y": "share of the dense step's time", "series": series})
    return text + "\n\n![step time](step_time.png)", {"step_time.png": plot}


EXPERIMENT = Experiment(
    "stochastic_depth", "Stochastic depth: accuracy and the time of a step", "fashion-mnist", pieces, headline, page
)

if __name__ == "__main__":
    raise SystemExit(main(EXPERIMENT))
