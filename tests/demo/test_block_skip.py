"""The stage that learns which blocks an image needs, in its smoke-test form."""

from __future__ import annotations

import json

import pytest
import torch

from effkern.blockdrop import Usage
from effkern.data import load_digits
from effkern.demo import baseline, block_skip
from effkern.demo.context import DemoContext
from effkern.demo.store import StageStore
from effkern.models import create_model


@pytest.fixture
def ctx(tmp_path):
    return DemoContext(load_digits(), tmp_path, quick=True, measure_s=0.0)


def test_quick_stage_gives_rows_numbers_and_pictures(ctx):
    StageStore(ctx.folder, {}).save("baseline", baseline.run(ctx), 1.0)
    result = block_skip.run(ctx)
    everything, policy = result.rows
    assert (everything.name, policy.name) == (block_skip.ALL, block_skip.POLICY)
    macs = result.extra["macs"]
    assert policy.macs_left == pytest.approx(macs["left_with_policy"])
    assert macs["left_with_policy"] > macs["left_without_policy"] > 0
    assert policy.params > everything.params
    assert policy.time_left_b1 > 0 and policy.time_left_b64 > 0
    blocks = result.extra["blocks"]
    assert len(blocks["usage"]) == 3 and blocks["patterns"] >= 1
    for sample in blocks["samples"]:
        assert len(sample["keep"]) == 3 and 0 <= sample["predicted"] < ctx.classes
    assert set(result.extra["same_budget"]) == {"random", "fixed"}
    assert set(result.extra["blocks_by_class"]) == set(ctx.data.classes)
    assert all(series for curve in result.extra["curves"] for series in curve["series"].values())
    json.dumps(result.plain())
    assert any(name.startswith("policy.") for name in result.state["model"])


def test_curriculum_is_over_before_phase_a_is(ctx):
    net = create_model("resnet20", in_channels=1, blocks=(1, 1, 1), widths=(4, 4, 4))
    loss = block_skip.PolicyGradient(net, curriculum=block_skip.Curriculum(3))
    frees = []
    ctx.fit = lambda model, recipe, after_step, **_: [
        (after_step(step), frees.append(loss.curriculum.free_blocks)) for step in range(1, 13)
    ]
    block_skip.train_policy(ctx, block_skip.build_policy(ctx, 3), loss, seconds=1e6)
    planned = round(block_skip.EPOCHS["policy"] * len(ctx.data.train) / 256)
    assert frees[0] == 1 + int(1 / planned / block_skip.RAMP * 3)
    assert frees == sorted(frees)
    assert frees[planned - 1] == 3


def test_decisions_that_do_not_look_run_as_many_blocks(ctx):
    net = create_model("resnet20", in_channels=1, blocks=(1, 1, 1), widths=(4, 4, 4)).eval()
    keep = torch.zeros(len(ctx.data.test), 3, dtype=torch.bool)
    keep[:, 2], keep[::2, 0] = True, True
    used = Usage(50.0, float(keep.sum(1).double().mean()), 2, [0.5, 0.0, 1.0], [1.5] * 10, keep)
    result = block_skip.static_policies(ctx, net, used)
    assert result["random"]["blocks"] == pytest.approx(1.5, abs=0.15)
    assert result["fixed"]["blocks"] == 2
