"""Finds a recipe and its configuration, and runs its phases one after the other."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from effkern.data import BatchFeed, Dataset, ImageFolder, Split
from effkern.recipes._shared import DataConfig, RunConfig
from effkern.training import (
    Method,
    Recipe,
    Run,
    defaults_of,
    load_config,
    load_weights,
    save_json,
    save_weights,
    say,
    train,
)
from effkern.training.parallel import world

__all__ = ["Phase", "RecipeError", "config_path", "names", "run_recipe"]

FOLDER = Path(__file__).parent


class RecipeError(ValueError):
    """There is no recipe or configuration of that name."""


@dataclass(frozen=True)
class Phase:
    """One training of a run.

    Attributes:
        name: of its folder.
        recipe: how long and how.
        build: makes the method; called when the phases before it are done.
        depends: tables of the configuration that it depends on, those of the phases before it included.
        keep_best: whether the best state on held-out images is the outcome, or the last one.
        finish: done to the method when its training is over, before the outcome is kept.
        images: trained on; default: all training images.
        also: further networks to keep beside the outcome, by the names of their files.
    """

    name: str
    recipe: Recipe
    build: Callable[[], Method]
    depends: Sequence[str]
    keep_best: bool = False
    finish: Callable[[Method], None] | None = None
    images: Split | None = None
    also: Callable[[Method], Mapping[str, nn.Module]] | None = None


class Config(Protocol):
    """What every recipe's configuration has."""

    data: DataConfig
    run: RunConfig


def names() -> list[str]:
    """The recipes there are, as the command line writes them."""
    return sorted(path.parent.name.replace("_", "-") for path in FOLDER.glob("[a-z]*/__init__.py"))


def config_path(name: str, config: str) -> Path:
    """The file of a configuration: one of the recipe's own by name, or a path.

    Raises:
        RecipeError: if there is none, naming those there are.
    """
    folder = FOLDER / name.replace("-", "_")
    if name not in names():
        raise RecipeError(f"{name!r}: must be one of {', '.join(names())}")
    known = {path.stem: path for path in sorted(folder.glob("*.toml"))}
    if config in known:
        return known[config]
    if Path(config).is_file():
        return Path(config)
    raise RecipeError(f"config: must be one of {', '.join(known)} or a TOML file, got {config!r}")


def run_recipe(
    name: str, config: Path, data: Dataset, folder: Path, settings: Sequence[str] = (), fresh: bool = False
) -> dict[str, Any]:
    """Run all phases of a recipe in ``folder`` and evaluate the outcome on the test images.

    A phase that is finished is not run again; the one that was interrupted goes on. Under ``torchrun`` every process
    calls this.

    Args:
        name: one of :func:`names`.
        config: a TOML file.
        data: images; the run takes place on the device they are on.
        folder: of the run.
        settings: single values in place of the file's, as ``train.lr=0.1``.
        fresh: forget what is in ``folder``.

    Returns:
        What is also written to ``result.json``: of every phase its steps, seconds, held-out and test metrics.

    Raises:
        ConfigError: if the configuration is wrong.
        CheckpointError: if ``folder`` holds a run of another configuration, or a file in it is damaged.
    """
    module = importlib.import_module(f"effkern.recipes.{name.replace('-', '_')}")
    chosen: Config = load_config(module.Config, config, settings)
    if isinstance(data, ImageFolder) and chosen.data.files is not None:
        data = data.with_options(chosen.data.files)
    first = world().is_first
    if fresh and first and folder.exists():
        for part in [*folder.glob("*/checkpoints/.."), folder / "result.json"]:
            shutil.rmtree(part.resolve()) if part.is_dir() else part.unlink(missing_ok=True)
    world().wait()

    def outcome(phase: str) -> dict[str, Tensor]:
        """The weights a finished phase left."""
        return load_weights(folder / phase / "final.safetensors")

    plain = asdict(chosen)  # type: ignore[call-overload]
    result: dict[str, Any] = {"recipe": name, "data": data.name, "config": plain, "phases": {}}
    phases: Sequence[Phase] = module.phases(chosen, data, outcome)
    for phase in phases:
        _feed(phase, chosen, data)  # images too few for a batch are said now, and not when the phases before are over
    for phase in phases:
        shared = {"images": data.name, **{table: plain[table] for table in (*phase.depends, "data")}}
        result["phases"][phase.name] = _run_phase(phase, chosen, data, folder / phase.name, shared)
    if first:
        save_json(folder / "result.json", result)
    return result


def _run_phase(phase: Phase, config: Config, data: Dataset, folder: Path, plain: Mapping[str, Any]) -> dict[str, Any]:
    method, recipe = phase.build().to(data.device), phase.recipe
    feed = _feed(phase, config, data)
    settings = {name: value for name, value in asdict(config.run).items() if name not in ("cache_gb", "skip_ops")}
    run = Run(folder, plain, defaults_of(config), **settings)
    done = train(method, feed, recipe, run=run, held_out=lambda: _batches(data, "val"), desc=phase.name)
    best = folder / "best.safetensors"
    if (phase.keep_best or recipe.ema) and best.is_file():
        method.result().load_state_dict(load_weights(best))
    elif (phase.keep_best or recipe.ema) and done.best and world().is_first:
        say(f"{best}: is missing; the last state is the outcome, and not the best one.")
    if phase.finish is not None:
        phase.finish(method)
    test = {key: float(value) for key, value in method.evaluate(_batches(data, "test")).items()}
    if world().is_first:
        kept = {"final": method.result(), **(phase.also(method) if phase.also else {})}
        for name, network in kept.items():
            save_weights(folder / f"{name}.safetensors", network.state_dict())
        say(f"{phase.name}: {_text(done.metrics)} on held-out images, {_text(test)} on test images")
    world().wait()
    length = {"steps": done.steps, "planned": done.planned, "seconds": round(done.seconds, 2)}
    return {**length, "held_out": done.metrics, "best": done.best, "test": test, **method.report()}


def _feed(phase: Phase, config: Config, data: Dataset) -> BatchFeed:
    images = data.train if phase.images is None else phase.images
    return data.feed(images, phase.recipe.batch_size, phase.recipe.seed, config.data.augment, config.data.shift)


def _batches(data: Dataset, split: str) -> Iterable[tuple[Tensor, Tensor]]:
    # A device that is not the processor is waited for less with larger ones.
    return data.batches(getattr(data, split), 250 if data.device.type == "cpu" else 1000)


def _text(metrics: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
