"""The stage that trains a slimmable network."""

import pytest
import torch

from effkern.data import load_digits
from effkern.demo import sliced_conv
from effkern.demo.context import DemoContext
from effkern.models.slimmable import SlimmableCNN


def test_quick_stage_has_a_row_a_width_and_one_mixed(tmp_path):
    ctx = DemoContext(load_digits(), tmp_path, quick=True, measure_s=0.0)
    result = sliced_conv.run(ctx)
    *uniform, mixed = result.rows
    assert [row.name for row in uniform] == [f"slimmable, {c} channels" for c in reversed(sliced_conv.WIDTHS)]
    assert [row.macs for row in uniform] == result.extra["macs"][::-1]
    assert uniform[0].macs_left == 1 and all(row.macs_left < 1 and row.time_left_b64 > 0 for row in result.rows[1:])
    images = result.extra["images_per_width"]
    assert sum(images) == len(ctx.data.test) and min(images) > 0
    expected = sum(n * m for n, m in zip(images, result.extra["macs"], strict=True)) / sum(images)
    assert mixed.macs == pytest.approx(expected)
    assert all(row.relative_to == uniform[0].name and row.disagreeing == 0 for row in result.rows)
    restored = SlimmableCNN(sliced_conv.WIDTHS, sliced_conv.BLOCKS, num_classes=ctx.classes)
    restored.load_state_dict(result.state["model"])


def test_eager_runs_the_same_function(tmp_path):
    ctx = DemoContext(load_digits(), tmp_path, quick=True)
    torch.manual_seed(0)
    model = SlimmableCNN((4, 6), (1, 1), num_classes=10)
    x = ctx.data.normalize(ctx.data.test.images[:40])
    for i in range(2):
        model(x, i)
    model.eval()
    rule = sliced_conv.InkRule(ctx, 2)
    assert 10 < int(rule(x).sum()) < 30
    with torch.no_grad():
        for i in range(2):
            torch.testing.assert_close(sliced_conv.narrow_network(model, i)(x), model(x, i), rtol=1e-4, atol=1e-4)
        expected = sliced_conv.Mixed(model, rule)(x)
        for form in sliced_conv.eager_mixed_forms(model, rule).values():
            torch.testing.assert_close(form(x), expected, rtol=1e-4, atol=1e-4)
