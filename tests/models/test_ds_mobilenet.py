"""The DS-Net supernet: its published costs, and widths that are networks of their own."""

import torch
import torch.nn.functional as F
from torch.utils.hooks import RemovableHandle

from effkern.dsnet import mac_table
from effkern.models import create_model
from effkern.models.ds_mobilenet import ChannelAttention, SeparableBlock
from effkern.nn import SwitchableBatchNorm2d

# Million multiply-adds of the fourteen sub-networks at 224, as published with the weights (pools included).
PUBLISHED = (132.9, 152.9, 175.2, 199.6, 226.2, 255.1, 286.2, 319.4, 354.9, 392.6, 432.5, 474.6, 518.9, 565.4)


def pool_adds(model, index):
    """Additions of all average pools: the published numbers count them, our table does not."""
    total = 0

    def count(module, args):
        nonlocal total
        total += args[0][0].numel()

    hooks: list[RemovableHandle] = [
        m.register_forward_pre_hook(count) for m in model.modules() if isinstance(m, ChannelAttention)
    ]
    hooks.append(model.blocks[-1].register_forward_hook(lambda m, args, y: count(m, (y,))))
    with torch.no_grad():
        model(torch.zeros(1, 3, 224, 224), index)
    for hook in hooks:
        hook.remove()
    return total


def test_costs_are_the_published_ones():
    model = create_model("ds_mobilenet").eval()
    table = mac_table(model, (3, 224, 224), model.num_widths).tolist()
    # The pools of the stages in front do not depend on the width, those behind grow in step: two ends give all.
    first, last = pool_adds(model, 0), pool_adds(model, 13)
    costs = [macs + first + (last - first) * i // 13 for i, macs in enumerate(table[:14])]
    assert costs[0] == 132_890_144
    assert [round(cost / 1e6, 1) for cost in costs] == list(PUBLISHED)
    assert round((table[14] + pool_adds(model, 14)) / 1e6) == 820


def test_a_block_by_hand():
    """Depthwise, batch norm, swish, attention, pointwise, batch norm, swish, and no residual."""
    torch.manual_seed(0)
    block = SeparableBlock([3, 4], [4, 5], 2).eval()
    for bn in (block.depthwise.bn, block.pointwise.bn):
        for tensor in (bn.weight.data, bn.bias.data, bn.running_mean):
            tensor.normal_()
        bn.running_var.uniform_(0.5, 2)
    for i, (c, d) in enumerate(((3, 4), (4, 5))):

        def norm(bn, x, i=i):
            c = x.size(1)
            y = (x - bn.running_mean[i, :c, None, None]) / (bn.running_var[i, :c, None, None] + bn.eps).sqrt()
            y = y * bn.weight[:c, None, None] + bn.bias[:c, None, None]
            return y * y.sigmoid()

        x = torch.randn(2, c, 7, 7)
        y = norm(block.depthwise.bn, F.conv2d(x, block.depthwise.conv.weight[:c], stride=2, padding=1, groups=c))
        y = block.attention(y, i)
        y = norm(block.pointwise.bn, F.conv2d(y, block.pointwise.conv.weight[:d, :c]))
        with torch.no_grad():
            torch.testing.assert_close(block(x, i), y)


def trained(widths, **options):
    """A network with statistics at some widths: without, an untrained one shrinks its signal to nothing."""
    model = create_model("ds_mobilenet", num_classes=4, **options)
    for norm in (m for m in model.modules() if isinstance(m, SwitchableBatchNorm2d)):
        norm.momentum = 1.0
    with torch.no_grad():
        for width in widths:
            model(torch.randn(4, 3, 64, 64), width)
    return model.eval()


def test_a_mixed_batch_is_every_image_at_its_width():
    model = trained((14, 0, 5))
    x, width = torch.randn(3, 3, 64, 64), torch.tensor([14, 0, 5])
    with torch.no_grad():
        mixed = model(x, width)
        for n, i in enumerate(width.tolist()):
            torch.testing.assert_close(mixed[n], model(x[n : n + 1], i)[0], rtol=1e-4, atol=1e-5)
    assert (mixed[0] - mixed[1]).abs().max() > 1e-2


def test_only_the_largest_network_drops_out():
    model = trained((13, 14), dropout=0.5)
    model.dropout.train()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(x, 13), model(x, 13))
        assert not torch.equal(model(x, -1), model(x, 14))
