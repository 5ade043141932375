"""The stage that runs the baseline from codes."""

import pytest
import torch

from effkern.data import load_digits
from effkern.demo import baseline, pq
from effkern.demo.context import DemoContext
from effkern.demo.store import StageStore
from effkern.nn.pq import PQConv2d, PQLinear
from effkern.nn.residual import ResidualBlock
from effkern.quantize import Rule, quantize


@pytest.mark.slow
def test_quick_stage_shows_both_ways_eager_could_run_it(tmp_path):
    ctx = DemoContext(load_digits(), tmp_path, quick=True, measure_s=0.0)
    StageStore(ctx.folder, {}).save("baseline", baseline.run(ctx), 1.0)
    result = pq.run(ctx)
    dense, resident, per_call = result.rows
    assert dense.eager_only and not resident.eager_only and resident.top1 == per_call.top1
    assert resident.bytes_on_disk < dense.bytes_on_disk and resident.macs == dense.macs
    assert sum(result.extra["bytes"].values()) == resident.bytes_on_disk
    assert all(row.relative_to == dense.name and row.disagreeing == 0 for row in result.rows)


@pytest.mark.parametrize(
    "layer", [PQConv2d(4, 6, 3, d=9, entries=5, scale=True, act="relu"), PQLinear(8, 4, d=4, entries=5)]
)
def test_eager_stand_ins_compute_the_same(layer):
    x = torch.randn(2, 4, 5, 5) if isinstance(layer, PQConv2d) else torch.randn(3, 8)
    for stand_in in (pq.DecodingLayer(layer), pq.DenseLayer(layer)):
        torch.testing.assert_close(stand_in(x), layer(x), rtol=1e-4, atol=1e-5)


def test_fused_block_is_the_block():
    block = ResidualBlock(8, 16, stride=2, shortcut="subsample").eval()
    coded, report = quantize(block, Rule(9, 8), fold_batch_norm=True)
    assert len(report.folded) == 2
    x = torch.randn(2, 8, 6, 6)
    want = coded(x)
    torch.testing.assert_close(pq.FusedBlock(coded)(x), want, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="block"):
        pq.FusedBlock(block)
