"""The measurement phase: every form interleaved, checked before it is timed, on the same images."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from effkern.data import load_digits
from effkern.demo import measuring
from effkern.demo.context import BATCH, SINGLES, DemoContext, Subject
from effkern.demo.measuring import measure_rows
from effkern.training import Timing


@pytest.fixture
def ctx(tmp_path):
    return DemoContext(load_digits(), tmp_path, quick=True, measure_s=0.0)


def scores(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(1)[:, 300:310].clone()


def subject(name: str = "net", **changes) -> Subject:
    values = {"top1": 90.0, "params": 10, "bytes_on_disk": 40, "macs": 100.0, "eager": {"nchw": scores}, "run": scores}
    return Subject(name, **{**values, **changes})


def test_all_forms_see_the_same_images_in_turn(ctx):
    seen: dict[str, list] = {}

    def watch(name):
        def call(x):
            seen.setdefault(name, []).append((len(x), float(x.sum())))
            return scores(x)

        return call

    subjects = [subject("a", run=watch("a"), eager={"x": watch("ax"), "y": watch("ay")}), subject("b", run=watch("b"))]
    measure_rows(ctx, "stage", subjects)
    assert seen["a"] == seen["ax"] == seen["ay"] == seen["b"]
    sizes = [size for size, _ in seen["a"]]
    assert sizes.count(1) % SINGLES == 0 and sizes.count(1) >= 10 * SINGLES and sizes.count(BATCH) >= 10
    assert len({total for size, total in seen["a"] if size == 1}) >= 40  # different images


def test_rows_are_per_image_and_name_the_fastest_eager_form(ctx, monkeypatch):
    times = {
        ("net", None): (8.0, 64.0),
        ("net", "nchw"): (16.0, 128.0),
        ("net", "channels_last"): (24.0, 96.0),
        ("half", None): (4.0, 48.0),
        ("half", "nchw"): (8.0, 64.0),
    }

    def measure(self, functions, seconds):
        turn = next(turns)
        return {key: Timing(times[key][turn], times[key][turn] / 2, 10 + turn) for key in functions}

    turns = iter((0, 1))
    monkeypatch.setattr(DemoContext, "measure", measure)
    both = {"nchw": scores, "channels_last": scores}
    full, half = measure_rows(
        ctx, "stage", [subject(eager=both), subject("half", macs=25.0, relative_to="net", note="a note")]
    )
    assert (full.ms_b1, full.ms_b64, full.ms_b1_min, full.ms_b64_min) == (1.0, 1.0, 0.5, 0.5)
    assert (full.eager_ms_b1, full.eager_form_b1) == (2.0, "nchw")
    assert (full.eager_ms_b64, full.eager_form_b64, full.eager_ms_b64_min) == (1.5, "channels_last", 0.75)
    assert full.macs_left is None and full.repetitions == 10 and not full.eager_only
    assert (half.macs_left, half.time_left_b1, half.time_left_b64) == (0.25, 0.5, 0.75)
    assert half.note == "a note" and half.stage == "stage" and half.relative_to == "net"


def test_without_own_form_the_row_is_eagers(ctx):
    (row,) = measure_rows(ctx, "baseline", [subject(run=None)])
    assert row.eager_only and row.ms_b1 == row.eager_ms_b1 > 0 and row.ms_b64_min == row.eager_ms_b64_min > 0


def test_wrong_scores_have_no_time(ctx):
    def wrong(x):
        return scores(x) * (1 + 1e-2)

    with pytest.raises(
        RuntimeError, match=r"stage, net: 'nchw' and 'effkern' must agree, but differ on \d+\.\d % of the images"
    ):
        measure_rows(ctx, "stage", [subject(run=wrong)])

    def not_a_number(x):
        return torch.where(torch.arange(len(x))[:, None] == 0, float("nan"), scores(x))

    with pytest.raises(RuntimeError, match="must agree"):
        measure_rows(ctx, "stage", [subject(eager={"nchw": scores, "nan": not_a_number})])


def test_nan_in_the_first_form_is_not_taken_for_agreement(ctx):
    with pytest.raises(RuntimeError, match="must agree"):
        measure_rows(ctx, "stage", [subject(run=lambda x: scores(x) * float("nan"))])


def test_rounding_agrees_and_a_tipped_decision_is_counted(ctx):
    def rounded(x):
        return scores(x) * (1 + 1e-6)

    def one_tipped(x):
        return torch.where(torch.tensor(float(x.sum()) == first) & (torch.arange(len(x))[:, None] == 0), 9.0, scores(x))

    images = ctx.data.normalize(ctx.data.test.images)
    first = float(images[:BATCH].sum())
    fine, tipped = measure_rows(ctx, "stage", [subject(run=rounded), subject("tipped", run=one_tipped)])
    assert fine.disagreeing == 0
    assert tipped.disagreeing == pytest.approx(1 / len(images))


@pytest.mark.parametrize(
    ("subjects", "message"),
    [
        ([subject(), subject()], r"names must differ, got \['net', 'net'\]"),
        ([subject(eager={})], r"subjects\['net'\].eager: must hold at least one form"),
        ([subject(relative_to="other")], r"subjects\['net'\].relative_to: must be one of \['net'\], got 'other'"),
    ],
)
def test_wrong_use_is_refused(ctx, subjects, message):
    with pytest.raises(ValueError, match=message):
        measure_rows(ctx, "stage", subjects)


def test_too_few_images_are_refused(tmp_path):
    data = load_digits()
    ctx = DemoContext(replace(data, test=data.test[:63]), tmp_path)
    with pytest.raises(ValueError, match=r"data\.test: must hold at least 64 images"):
        measure_rows(ctx, "stage", [subject()])


def test_eager_forms_are_copies_in_both_layouts():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    forms = measuring.eager_forms(model)
    assert list(forms) == ["nchw", "channels_last"]
    assert forms["channels_last"][0].weight.is_contiguous(memory_format=torch.channels_last)
    assert model[0].weight.is_contiguous() and model.training and not forms["nchw"].training
    assert forms["nchw"][0].weight.data_ptr() != model[0].weight.data_ptr()


class Named(torch.nn.Module):
    """Pairs told by their names, registered in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = torch.nn.Conv2d(1, 4, 3), torch.nn.Conv2d(4, 4, 3)
        self.bn1, self.bn2 = torch.nn.BatchNorm2d(4), torch.nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))


def test_folding_norms_keeps_the_function_and_the_original():
    torch.manual_seed(0)
    model = torch.nn.Sequential(Named(), torch.nn.Conv2d(4, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Conv2d(4, 2, 1))
    model(torch.randn(50, 1, 9, 9))  # statistics worth folding
    forms = measuring.eager_forms(model.eval(), fold=True)
    assert list(forms) == ["nchw", "channels_last", "nchw, norms folded", "channels_last, norms folded"]
    norms = {name: sum(isinstance(m, torch.nn.BatchNorm2d) for m in form.modules()) for name, form in forms.items()}
    assert list(norms.values()) == [3, 3, 0, 0]
    x = torch.randn(3, 1, 9, 9)
    for form in forms.values():
        torch.testing.assert_close(form(x), model(x), rtol=1e-5, atol=1e-5)
