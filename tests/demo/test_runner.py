"""The demo as a user sees it: finished stages are kept, interrupts are clean, failures are shown."""

from __future__ import annotations

import json
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from effkern import report
from effkern.data import DataError, load_digits
from effkern.demo import context, runner, store
from effkern.demo.context import DemoContext, StageResult, Subject
from effkern.demo.measuring import measure_rows
from effkern.demo.runner import Options, Stage, run_demo

STAGES = (Stage("baseline", "dense", 5, 1), Stage("rep_conv", "folded", 5, 1), Stage("pq", "codes", 5, 1))


class Demo:
    """The demo with stages that only count how often they ran; the baseline is the real one where asked for."""

    def __init__(self, out: Path, monkeypatch) -> None:
        self.options = Options(out=out, quick=True, threads=1)
        self.ran: list[str] = []
        self.behaviour = {}
        self.data = load_digits()
        self.data = replace(self.data, test=self.data.test[:64])
        monkeypatch.setattr(runner, "code_fingerprint", lambda: "code")
        monkeypatch.setattr(report, "_pictures", lambda *arguments: [])  # drawn in tests/report; slow
        for stage in STAGES:
            module = types.ModuleType(stage.name)
            module.run = lambda ctx, name=stage.name: self.stage(name, ctx)
            monkeypatch.setitem(sys.modules, f"effkern.demo.{stage.name}", module)

    def stage(self, name: str, ctx: DemoContext) -> StageResult:
        self.ran.append(name)
        if problem := self.behaviour.get(name):
            raise problem
        subject = Subject(f"{name} net", 90.0, 10, 40, 100.0, eager={"nchw": lambda x: x.flatten(1)[:, :10]})
        extra = {"loaded": float(ctx.load_state("baseline", "model")["w"][0]) if name == "pq" else None}
        return StageResult(
            measure_rows(ctx, name, [subject]), extra, {"model": {"w": torch.ones(2)}}, [f"note of {name}"]
        )

    def __call__(self, **changes) -> int:
        return run_demo(replace(self.options, **changes), STAGES, self.data)

    def report(self) -> dict:
        return json.loads((self.options.out / "report.json").read_text())


@pytest.fixture
def demo(tmp_path, monkeypatch):
    return Demo(tmp_path / "run", monkeypatch)


def test_runs_all_stages_in_order_and_reports_them(demo, capsys):
    assert demo() == 0
    assert demo.ran == ["baseline", "rep_conv", "pq"]
    written = demo.report()
    assert [row["name"] for row in written["rows"]] == ["baseline net", "rep_conv net", "pq net"]
    assert written["stages"]["pq"]["extra"] == {"loaded": 1.0}
    out = capsys.readouterr().out
    assert "baseline net" in out and "report.html" in out and "note of pq" in out
    assert "rep_conv net" in (demo.options.out / "report.html").read_text()


def test_an_interrupt_keeps_what_is_finished_and_the_next_start_goes_on(demo, capsys):
    demo.behaviour["pq"] = KeyboardInterrupt()
    assert demo() == 130
    said = capsys.readouterr()
    assert "Finished and kept: baseline, rep_conv" in said.out and "goes on with pq" in said.out
    assert "Traceback" not in said.out + said.err
    assert not (demo.options.out / "report.html").exists()

    demo.behaviour.clear()
    demo.ran.clear()
    assert demo() == 0
    assert demo.ran == ["pq"]
    assert len(demo.report()["rows"]) == 3


def test_a_finished_run_only_writes_its_report_again(demo):
    demo()
    rows = demo.report()["rows"]
    demo.ran.clear()
    (demo.options.out / "report.json").unlink()
    assert demo() == 0
    assert demo.ran == [] and demo.report()["rows"] == rows


@pytest.mark.parametrize("change", [{"seed": 1}, {"threads": 2}, {"fresh": True}], ids=str)
def test_another_configuration_starts_over(demo, change):
    demo()
    demo.ran.clear()
    assert demo(**change) == 0
    assert demo.ran == ["baseline", "rep_conv", "pq"]


def test_other_code_starts_over(demo, monkeypatch):
    demo()
    demo.ran.clear()
    monkeypatch.setattr(runner, "code_fingerprint", lambda: "changed")
    demo()
    assert demo.ran == ["baseline", "rep_conv", "pq"]


def damaged_record(folder):
    path = folder / "rep_conv.json"
    path.write_text(path.read_text()[:-20])


def damaged_weights(folder):
    path = folder / "rep_conv.model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")


def missing_weights(folder):
    (folder / "rep_conv.model.safetensors").unlink()


def foreign_row(folder):
    record = json.loads((folder / "rep_conv.json").read_text())
    record["rows"][0]["colour"] = "red"
    (folder / "rep_conv.json").write_text(json.dumps(record))


@pytest.mark.parametrize("damage", [damaged_record, damaged_weights, missing_weights, foreign_row])
def test_a_damaged_stage_is_run_again_alone(demo, damage):
    demo()
    demo.ran.clear()
    damage(demo.options.out / "stages")
    assert demo() == 0
    assert demo.ran == ["rep_conv"]


def test_without_its_baseline_nothing_is_kept(demo):
    demo()
    demo.ran.clear()
    (demo.options.out / "stages" / "baseline.model.safetensors").unlink()
    demo()
    assert demo.ran == ["baseline", "rep_conv", "pq"]


def test_a_new_baseline_voids_stages_that_were_not_asked_for(demo):
    demo()
    demo(stages=("rep_conv",), fresh=True)
    demo.ran.clear()
    demo()
    assert demo.ran == ["pq"]


def test_chosen_stages_come_with_the_baseline(demo):
    assert demo(stages=("pq",)) == 0
    assert demo.ran == ["baseline", "pq"]
    assert list(demo.report()["stages"]) == ["baseline", "pq"]


def test_a_failed_stage_is_shown_and_the_others_go_on(demo, capsys):
    demo.behaviour["rep_conv"] = RuntimeError("the kernel <broke>")
    assert demo() == 1
    assert demo.ran == ["baseline", "rep_conv", "pq"]
    assert demo.report()["failed"] == {"rep_conv": "RuntimeError: the kernel <broke>"}
    assert "FAILED: rep_conv: RuntimeError: the kernel <broke>" in capsys.readouterr().out
    assert "the kernel &lt;broke&gt;" in (demo.options.out / "report.html").read_text()
    demo.behaviour.clear()
    demo.ran.clear()
    assert demo() == 0
    assert demo.ran == ["rep_conv"]


def test_a_failed_baseline_stops_the_rest(demo):
    demo.behaviour["baseline"] = RuntimeError("no")
    assert demo() == 1
    assert demo.ran == ["baseline"] and demo.report()["failed"]["pq"] == "needs the baseline"


def test_threads_are_put_back(demo):
    before = torch.get_num_threads()
    demo(threads=3)
    assert demo.report()["run"]["threads"] == 3 and torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("stages", ("pq", "qp"), "stages: must be among baseline, .*, got qp"),
        ("threads", -1, "threads: must be at least 0, got -1"),
        ("seed", -5, "seed: must be at least 0, got -5"),
    ],
)
def test_options_are_checked(name, value, message):
    with pytest.raises(ValueError, match=message):
        Options(**{name: value})


def test_unusable_data_never_reaches_a_stage(tmp_path, monkeypatch):
    def corrupt():
        raise DataError("train-images: expected this, found that")

    monkeypatch.setattr(runner, "load_fashion_mnist", corrupt)
    with pytest.raises(DataError, match="expected this, found that"):
        run_demo(Options(out=tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_the_code_fingerprint_follows_the_package():
    first = store.code_fingerprint()
    assert first == store.code_fingerprint() and len(first) == 16


def test_time_left_counts_down_from_the_stages_begin(tmp_path, monkeypatch):
    now = 1000.0
    monkeypatch.setattr(context.time, "monotonic", lambda: now)
    ctx = DemoContext(load_digits(), tmp_path, budget_s={"pq": 100.0}, begun=now)
    assert ctx.time_left("pq") == 100 and ctx.time_left("other") == float("inf")
    now += 30
    assert ctx.time_left("pq") == 70
    now += 1000
    assert ctx.time_left("pq") == 1


def test_a_late_demo_gives_the_rest_less_time(demo, monkeypatch):
    budgets = {}
    real = demo.stage

    def stage(name, ctx):
        budgets[name] = ctx.budget_s[name]
        return real(name, ctx)

    monkeypatch.setattr(demo, "stage", stage)
    monkeypatch.setattr(runner.time, "monotonic", lambda: 0.0)  # the stages themselves take no time here
    demo()
    assert budgets == {"baseline": 5, "rep_conv": 5, "pq": 5}
    monkeypatch.setattr(runner, "LIMIT_S", 10.5)  # of which measuring takes 3
    demo(fresh=True)
    assert budgets["baseline"] == pytest.approx(2.5)
    monkeypatch.setattr(runner, "LIMIT_S", 0.0)
    demo(fresh=True)
    assert budgets == {"baseline": 1.5, "rep_conv": 1.5, "pq": 1.5}


def test_cores_allowed_follow_the_quota(monkeypatch):
    monkeypatch.setattr(runner.os, "sched_getaffinity", lambda process: set(range(16)))
    for content, cores in (("max 100000\n", 16), ("150000 100000\n", 2), ("99 100000\n", 1), ("9900000 100000", 16)):
        monkeypatch.setattr(runner.Path, "read_text", lambda path, content=content: content)
        assert runner._cores_allowed() == cores


def test_random_streams_depend_on_seed_and_stream(tmp_path):
    def draw(seed, stream):
        return torch.rand(3, generator=DemoContext(load_digits(), tmp_path, seed=seed).generator(stream)).tolist()

    assert draw(0, 1) == draw(0, 1) and draw(0, 1) != draw(0, 2) and draw(0, 1) != draw(1, 1)
