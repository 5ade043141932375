"""The loop and its files: a run may be stopped, killed, divided among ranks and resumed, and ends the same."""

from __future__ import annotations

import itertools
import os
import re
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from effkern.data import BatchFeed
from effkern.training import (
    CheckpointError,
    Interrupted,
    Method,
    Recipe,
    Run,
    Step,
    Supervised,
    fit,
    load_snapshot,
    load_weights,
    train,
)
from effkern.training import loop as loop_module

from .small import RECIPE, Noisy, data, go, network

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def same(first, second) -> bool:
    """Whether two nested states are equal bit for bit, the time they took aside."""
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        names = first.keys() - {"seconds"}
        return first.keys() == second.keys() and all(same(first[name], second[name]) for name in names)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(same(a, b) for a, b in zip(first, second, strict=True))
    return first == second


def newest(folder: Path):
    return load_snapshot(max((folder / "checkpoints").glob("step-*.safetensors")))


def same_run(first: Path, second: Path) -> bool:
    texts = [[(folder / name).read_text() for name in ("train.csv", "eval.csv")] for folder in (first, second)]
    weights = [load_weights(folder / "best.safetensors") for folder in (first, second)]
    return same(newest(first), newest(second)) and texts[0] == texts[1] and same(*weights)


def test_a_run_leaves_its_files(tmp_path):
    method, result = go(tmp_path)
    assert (result.steps, result.planned, len(result.losses)) == (20, 20, 20) and not method.training
    lines = (tmp_path / "train.csv").read_text().splitlines()
    assert lines[0] == "step,loss,noise,grad_norm,lr"
    assert [line.split(",")[0] for line in lines[1:]] == ["3", "6", "9", "12", "15", "18", "20"]
    assert float(lines[1].split(",")[1]) == pytest.approx(sum(result.losses[:3]) / 3, rel=1e-12)
    assert float(lines[-1].split(",")[1]) == pytest.approx(sum(result.losses[18:]) / 2, rel=1e-12)
    rows = [line.split(",") for line in (tmp_path / "eval.csv").read_text().splitlines()]
    assert rows[0] == ["step", "top1"] and [row[0] for row in rows[1:]] == ["4", "8", "12", "16", "20"]
    assert result.best["top1"] == max(float(row[1]) for row in rows[1:])
    assert len(list((tmp_path / "checkpoints").iterdir())) == 3
    assert method.steps == 20
    state = newest(tmp_path)["state"]
    assert same(state["method"], dict(method.state_dict()))
    assert not same(state["method"], {name[7:]: v for name, v in state["ema"].items() if name != "updates"})


def test_killed_at_any_moment_a_run_ends_the_same(tmp_path):
    """kill -9 by a real parent at random moments, during steps, evaluations and writes."""
    done = subprocess.run(
        [sys.executable, HERE / "kill_and_resume.py", tmp_path, "1"],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    said = re.fullmatch(r"killed (\d+) times\n", done.stdout)
    assert said and int(said[1]) >= 3, done.stdout
    assert same_run(tmp_path / "whole", tmp_path / "killed")


def test_two_ranks_train_like_one_process(tmp_path):
    """Same losses and weights as one process with the same batch; with batch norm, as one that accumulates 2 parts."""
    done = subprocess.run(
        [sys.executable, HERE / "ranks.py", tmp_path], env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for norm, accumulate in ((False, 1), (True, 2)):
        alone, _ = go(
            tmp_path / f"alone-{norm}",
            Noisy(network(norm=norm, dropout=False)),
            replace(RECIPE, accumulate=accumulate, ema=0.0),
        )
        text = [(tmp_path / f"{kind}-{norm}" / "train.csv").read_text().splitlines() for kind in ("norm", "alone")]
        for ours, theirs in zip(*text, strict=True):
            if not ours.startswith("step"):
                a, b = (torch.tensor([float(v) for v in line.split(",")]) for line in (ours, theirs))
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
        weights = newest(tmp_path / f"norm-{norm}")["state"]["method"]
        for name, parameter in alone.named_parameters():
            torch.testing.assert_close(weights[name], parameter.detach(), rtol=1e-3, atol=1e-5)
    # The statistics of a step are the mean of what the ranks saw.
    images, seen = data(), []
    feed = BatchFeed(images, images.train, RECIPE.batch_size, RECIPE.seed, augment=True)
    for part in range(2):
        method = Noisy(network(dropout=False)).train()
        list(method.losses(*feed(0, part, 2), Step(0, seed=RECIPE.seed, part=part, parts=2)))
        seen.append({name: b for name, b in method.named_buffers() if "running" in name})
    left = newest(tmp_path / "step")["state"]
    assert left["step"] == 1 and seen[0] and all(not torch.equal(b, seen[1][name]) for name, b in seen[0].items())
    for name, buffer in seen[0].items():
        torch.testing.assert_close(left["method"][name], (buffer + seen[1][name]) / 2)


def test_the_average_of_the_weights_is_what_is_evaluated_and_kept(tmp_path):
    """By hand from the weights after every step; a decay that warms up from 1 / 10."""
    weights, evaluated = [], []

    class Watched(Noisy):
        def after_step(self, at: Step) -> None:
            super().after_step(at)
            weights.append(self.net[0].weight.detach().clone())

        def evaluate(self, batches) -> dict[str, float]:
            evaluated.append(self.net[0].weight.detach().clone())
            return {"top1": float(len(evaluated))}

    net = network()
    average = net[0].weight.detach().clone()
    go(tmp_path, Watched(net), replace(RECIPE, ema=0.3, epochs=0.75), evaluate_every=0.25)
    for t, weight in enumerate(weights):
        decay = min(0.3, (1 + t) / (10 + t))
        average = decay * average + (1 - decay) * weight
        torch.testing.assert_close(evaluated[t], average)
        assert not torch.equal(average, weight)
    assert len(weights) == len(evaluated) == 3
    assert torch.equal(load_weights(tmp_path / "best.safetensors")["0.weight"], evaluated[-1])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_and_saves(tmp_path, number):
    class Signalled(Noisy):
        def after_step(self, at: Step) -> None:
            super().after_step(at)
            if at.number == 6:
                os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match="stopped after 7 of 20 steps; the same command goes on from there") as stop:
        go(tmp_path / "stopped", Signalled(network()), save_every_s=1e9)
    assert stop.value.signal == number and signal.getsignal(number) is before
    assert [p.name for p in (tmp_path / "stopped" / "checkpoints").iterdir()] == ["step-00000007.safetensors"]
    go(tmp_path / "stopped")
    go(tmp_path / "whole")
    assert same_run(tmp_path / "whole", tmp_path / "stopped")


def test_a_second_ctrl_c_stops_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("effkern.training.interrupt.ECHO_S", 0.0)

    class Stubborn(Noisy):
        def losses(self, x, y, at):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            yield from super().losses(x, y, at)

    with pytest.raises(KeyboardInterrupt) as stop:
        go(tmp_path, Stubborn(network()))
    assert not isinstance(stop.value, Interrupted)


def test_outside_the_main_thread_signals_are_left_alone(tmp_path):
    results = []
    thread = threading.Thread(target=lambda: results.append(go(tmp_path)[1].steps))
    thread.start()
    thread.join(120)
    assert results == [20]


class Breaking(Noisy):
    """The loss, or the weights, become NaN in step 9."""

    def __init__(self, net: nn.Module, what: str) -> None:
        super().__init__(net)
        self.what = what

    def losses(self, x, y, at):
        for loss in super().losses(x, y, at):
            yield loss * float("nan") if self.what == "loss" and at.number == 9 else loss

    def after_step(self, at: Step) -> None:
        super().after_step(at)
        if self.what == "weights" and at.number == 9:
            nn.init.constant_(self.net[0].weight, float("inf"))


@pytest.mark.parametrize("what", ["loss", "weights"])
def test_divergence_names_the_step_and_the_last_good_checkpoint(tmp_path, what):
    last = tmp_path / "checkpoints" / "step-00000009.safetensors"
    said = "the loss became nan after 9" if what == "loss" else "net.0.weight stopped being finite after 10"
    with pytest.raises(FloatingPointError, match=f"{said} steps; the last good checkpoint is {last}"):
        go(tmp_path, Breaking(network(), what))
    assert newest(tmp_path)["state"]["step"] == 9
    assert all(bool(v.isfinite().all()) for v in newest(tmp_path)["state"]["method"].values())


@pytest.mark.parametrize("damage", ["cut", "flipped bit", "pickle", "empty"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(tmp_path, damage, capsys):
    go(tmp_path / "whole")
    folder = tmp_path / "damaged"
    with pytest.raises(FloatingPointError):
        go(folder, Breaking(network(), "loss"))
    path = folder / "checkpoints" / "step-00000009.safetensors"
    content = path.read_bytes()
    flipped = content[:-50] + bytes([content[-50] ^ 1]) + content[-49:]
    path.write_bytes({"cut": content[:-7], "flipped bit": flipped, "pickle": b"\x80\x04.", "empty": b""}[damage])
    go(folder)
    said = capsys.readouterr().out
    assert f"{path}: " in said and "trying the one before it" in said
    assert same_run(tmp_path / "whole", folder)
    assert path.with_name(f"{path.name}.damaged").exists()


def test_when_no_checkpoint_is_whole_nothing_is_overwritten(tmp_path):
    go(tmp_path)
    files = list((tmp_path / "checkpoints").iterdir())
    for path in files:
        path.write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"no checkpoint is whole: .*step-00000020"):
        go(tmp_path)
    assert all(path.read_bytes() == b"x" for path in files)


def limit_file_size(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@contextmanager
def disk_full_between(first: int, last: int, room: int) -> Iterator[Method]:
    """A method during which no file may grow beyond ``room`` bytes from the end of step ``first`` to that of ``last``.

    The limit stands for a full disk: the kernel refuses the write in the middle, as it would. It ends with the block.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)[0]

    class Filling(Noisy):
        def after_step(self, at: Step) -> None:
            super().after_step(at)
            if at.number in (first, last):
                limit_file_size(room if at.number == first else before)

    try:
        yield Filling(network())
    finally:
        limit_file_size(before)


def test_a_full_disk_costs_no_checkpoint(tmp_path, capsys):
    with disk_full_between(9, 12, 4096) as method:
        go(tmp_path / "full", method, evaluate_every=0)
        said = capsys.readouterr().out
        assert "step-00000010.safetensors: cannot be written: " in said
        assert f"the last good checkpoint is {tmp_path}/full/checkpoints/step-00000009.safetensors" in said
        assert newest(tmp_path / "full")["state"]["step"] == 20  # there was room again
        limit_file_size(4096)
        with pytest.raises(CheckpointError, match=r"step-00000020.safetensors: cannot be written: "):
            go(tmp_path / "never", evaluate_every=0)
    assert not list((tmp_path / "never").rglob("*step*")) and not list((tmp_path / "full").rglob("*.tmp"))


def test_logs_and_best_weights_wait_for_room(tmp_path, capsys):
    """Nothing at all can be written for some steps, best weights and rows of the logs included."""
    with disk_full_between(2, 13, 16) as method:
        go(tmp_path / "full", method)
    said = capsys.readouterr().out
    for name in ("train.csv", "eval.csv", "best.safetensors"):
        assert f"full/{name}: cannot be written yet: " in said
    assert said.count("train.csv: cannot") == 1 and "full: cannot be written: " in said
    assert "the last good checkpoint is " + str(tmp_path / "full/checkpoints/step-00000002.safetensors") in said
    go(tmp_path / "whole")
    assert same_run(tmp_path / "whole", tmp_path / "full")


def test_another_configuration_is_refused_by_name(tmp_path):
    go(tmp_path, config={"gamma": 5.0, "widths": (4, 8)})
    for changed, message in (
        ({"gamma": 1.0, "widths": (4, 8)}, "gamma: 5.0, now 1.0"),
        ({"gamma": 5.0, "widths": (4, 6)}, r"widths: \[4, 8\], now \[4, 6\]"),
    ):
        with pytest.raises(CheckpointError, match=f"another configuration .{message}"):
            go(tmp_path, config=changed)
    with pytest.raises(CheckpointError, match=r"recipe.lr: 0.05, now 0.5"):
        go(tmp_path, recipe=replace(RECIPE, lr=0.5), config={"gamma": 5.0, "widths": (4, 8)})


def test_an_option_that_a_checkpoint_does_not_know_has_its_default(tmp_path):
    go(tmp_path, config={"gamma": 5.0, "base": {"last": 0.5}})
    now = {"gamma": 5.0, "base": {"last": 0.5, "mode": "batch"}, "sizes": (1, 2)}
    go(tmp_path, config=now, defaults={"gamma": 1.0, "base": {"mode": "batch"}, "sizes": (1, 2)})
    with pytest.raises(CheckpointError, match=r"another configuration .base.mode: 'row', now 'batch'."):
        go(tmp_path, config=now, defaults={"base": {"mode": "row"}, "sizes": (1, 2)})
    with pytest.raises(CheckpointError, match=r"sizes: None, now \[1, 2\]"):
        go(tmp_path, config=now, defaults={"base": {"mode": "batch"}})


@pytest.mark.parametrize("clip", [None, 1e-3])
def test_norms_of_a_step(tmp_path, clip):
    """Of plain gradient descent the weights go as far as the gradient is long, times the rate; clipped, no further."""
    recipe = Recipe(
        epochs=0.5, lr=0.1, momentum=0.0, weight_decay=0.0, schedule="constant", warmup=0.0, batch_size=16, clip=clip
    )
    go(tmp_path, Noisy(network()), recipe, norms=True, log_every=1)
    heads, *rows = [line.split(",") for line in (tmp_path / "train.csv").read_text().splitlines()]
    assert {"grad_norm", "weight_change"} <= set(heads) and len(rows) == 2
    for row in rows:
        length, moved = (float(row[heads.index(name)]) for name in ("grad_norm", "weight_change"))
        assert length > 1e-2 and moved == pytest.approx(0.1 * (length if clip is None else clip), rel=1e-3)

    first = Noisy(network())
    first.train()
    images = data()
    x, y = BatchFeed(images, images.train, 16, augment=True)(0, 0, 1)
    torch.manual_seed(loop_module.stream_seed(0, 0, 0, loop_module._GLOBAL))
    sum(first.losses(x, y, Step(0))).backward()
    by_hand = sum(float(p.grad.square().sum()) for p in first.parameters()) ** 0.5
    assert float(rows[0][heads.index("grad_norm")]) == pytest.approx(by_hand, rel=1e-5)


def test_another_network_is_refused(tmp_path):
    go(tmp_path)
    other = network()
    other[8] = nn.Linear(6, 3)
    with pytest.raises(CheckpointError, match=r"checkpoints: does not fit (.|\n)*net.8.weight"):
        go(tmp_path, Noisy(other))


def test_the_best_state_is_kept_whatever_came_after(tmp_path):
    """Of equal scores the first; also where the run was stopped between."""
    weights = []

    class Scored(Noisy):
        def evaluate(self, batches) -> dict[str, float]:
            weights.append({name: tensor.clone() for name, tensor in self.net.state_dict().items()})
            return {"top1": [3.0, 9.0, 5.0, 9.0, 1.0][int(self.steps) // 4 - 1]}

    recipe = replace(RECIPE, ema=0.0)
    _, result = go(tmp_path, Scored(network()), recipe)
    assert len(weights) == 5 and result.best == {"top1": 9.0, "step": 8} and result.metrics == {"top1": 1.0}
    best = load_weights(tmp_path / "best.safetensors")
    assert same(best, weights[1]) and not same(best, weights[3])


def test_a_finished_run_only_gives_its_result(tmp_path):
    _, first = go(tmp_path)
    method, again = go(tmp_path)
    assert again.losses == [] and (again.steps, again.metrics, again.best) == (20, first.metrics, first.best)
    assert method.steps == 20


def test_a_run_whose_time_is_over_is_finished(tmp_path):
    """Time is the loop's clock, of which every look takes a second; the last step is evaluated and saved."""
    recipe = replace(RECIPE, budget_s=12.0)
    ticks = itertools.count()

    def timed():
        images, method = data(), Noisy(network())
        feed = BatchFeed(images, images.train, recipe.batch_size, recipe.seed)
        run = Run(tmp_path, save_every_s=1e9, evaluate_every=100.0)
        held_out = lambda: images.batches(images.val, 32)  # noqa: E731
        return train(method, feed, recipe, run=run, held_out=held_out, clock=lambda: float(next(ticks)))

    first = timed()
    assert first.cut_short and first.metrics and newest(tmp_path)["state"]["step"] == first.steps
    again = timed()
    assert again.losses == [] and (again.steps, again.metrics) == (first.steps, first.metrics)


def test_parts_accumulate_to_the_whole_batch():
    images = data()
    results = []
    for accumulate in (1, 2, 4):
        method = Noisy(network(norm=False, dropout=False))
        recipe = replace(RECIPE, accumulate=accumulate, ema=0.0, epochs=1)
        results.append(train(method, BatchFeed(images, images.train, 16, augment=True), recipe).losses)
    for other in results[1:]:
        assert other == pytest.approx(results[0], rel=1e-5)


def test_a_batch_that_cannot_be_divided_is_refused():
    images = data()
    with pytest.raises(ValueError, match="batch_size: must be a multiple of ranks x accumulate = 1 x 3, got 16"):
        train(Noisy(network()), BatchFeed(images, images.train, 16), replace(RECIPE, accumulate=3))


def test_bf16_runs_forward_passes_in_bf16_and_keeps_fp32_weights():
    seen = []
    net = network(norm=False)
    net[0].register_forward_hook(lambda m, i, o: seen.append(o.dtype))
    images = data()
    train(Noisy(net), BatchFeed(images, images.train, 16), replace(RECIPE, bf16=True, epochs=0.25))
    assert set(seen) == {torch.bfloat16} and net[0].weight.dtype == torch.float32
    assert net[0].weight.grad.dtype == torch.float32


def test_a_run_does_not_touch_the_global_generator_and_follows_its_seed():
    images = data()
    torch.manual_seed(5)
    want = torch.rand(3)
    losses = []
    for seed, other in ((0, 1), (0, 2), (1, 1)):
        method = Noisy(network())
        torch.manual_seed(5)
        if other == 2:
            torch.rand(77)  # what others drew before does not matter
        recipe = replace(RECIPE, seed=seed)
        losses.append(train(method, BatchFeed(images, images.train, 16, seed), recipe).losses)
        assert torch.equal(torch.rand(3), want) == (other == 1)
    assert losses[0] == losses[1] != losses[2]


def test_dropout_differs_between_parts_and_steps():
    """Ranks with the same mask would see each unit dropped or kept by all."""
    masks = []

    class Look(Method):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def losses(self, x, y, at):
            masks.append(nn.functional.dropout(torch.ones(64), 0.5))
            yield (self.weight * x.mean()).sum()

    images = data()
    train(Look(), BatchFeed(images, images.train, 16), Recipe(epochs=0.5, batch_size=16, accumulate=2, lr=0.01))
    assert len(masks) == 4 and len({tuple(m.tolist()) for m in masks}) == 4


def test_draws_of_a_step_do_not_depend_on_its_division():
    whole = Step(5, seed=3).uniform(12, 4, stream=2)
    parts = [Step(5, seed=3, part=i, parts=3).uniform(4, 4, stream=2) for i in range(3)]
    assert torch.equal(torch.cat(parts), whole)
    others = [Step(6, seed=3), Step(5, seed=4)]
    assert not any(torch.equal(step.uniform(12, 4, stream=2), whole) for step in others)
    assert not torch.equal(Step(5, seed=3).uniform(12, 4, stream=1), whole)


def test_fit_is_the_same_loop(monkeypatch):
    """What the demo trains with goes through train()."""
    seen = []
    monkeypatch.setattr(loop_module, "train", lambda method, *a, **k: seen.append(type(method).__mro__[1]))
    fit(network(), lambda: [], 1, Recipe(epochs=1))
    assert seen == [Supervised]
