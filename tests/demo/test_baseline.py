"""The first stage, and through it what the context gives to all of them."""

import pytest
import torch

from effkern.data import load_digits
from effkern.demo import baseline
from effkern.demo.context import DemoContext
from effkern.demo.store import StageStore
from effkern.training import CheckpointError, Recipe, evaluate


@pytest.fixture
def ctx(tmp_path):
    return DemoContext(load_digits(), tmp_path, quick=True, measure_s=0.0)


def test_quick_stage_gives_a_whole_row_and_can_be_loaded_again(ctx):
    result = baseline.run(ctx)
    (row,) = result.rows
    assert row.stage == "baseline" and row.eager_only and row.relative_to == row.name and row.macs_left == 1.0
    assert row.params == sum(p.numel() for p in baseline.build(ctx).parameters())
    StageStore(ctx.folder, {}).save("baseline", result, 1.0)
    model = baseline.trained(ctx)
    assert not model.training and ctx.accuracy(model) == row.top1


def test_full_network_is_the_one_described(tmp_path):
    ctx = DemoContext(load_digits(), tmp_path)
    model = baseline.build(ctx)
    assert sum(p.numel() for p in model.parameters()) == 269_434
    assert model(torch.zeros(2, *ctx.shape)).shape == (2, 10)


def test_loading_before_the_stage_finished_is_an_error(ctx):
    with pytest.raises(CheckpointError, match=r"baseline\.model\.safetensors: cannot be read"):
        baseline.trained(ctx)


def test_quick_takes_two_steps_and_a_small_set_is_gone_through_more_often(ctx, tmp_path):
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10))
    assert ctx.fit(model, Recipe(epochs=3)).steps == 2
    full = DemoContext(load_digits(), tmp_path)
    assert full.fit(model, Recipe(epochs=2, lr=0.01), batch_size=64, desc="digits").steps == 200
    assert full.accuracy(model, "val") > 70
    assert full.accuracy(model) == evaluate(model, full.batches("test", 7))
