"""Small networks with gates, one and two of them, of both kinds."""

from __future__ import annotations

import torch
from torch import nn

from effkern.data import load_digits
from effkern.dsnet import all_ways, calibrate
from effkern.models import create_model

DATA = load_digits()
IMAGE = (1, 8, 8)
ONE = {
    "ds_mobilenet": {"stem": (4, 6), "front": [[[8, 12], 1, 1]], "stages": [[[8, 12, 16], 2, 1]]},
    "ds_resnet": {"stem": 4, "front": [[8, 1, 1]], "stages": [[[8, 12, 16], 2, 2]]},
}
TWO = {
    "ds_mobilenet": {
        "stem": 4,
        "front": [[8, 1, 1]],
        "stages": [[[8, 12, 16], 2, 1], [[12, 12, 20], 1, 2]],
        "gated": [0, 1],
    },
    "ds_resnet": {
        "kind": "bottleneck",
        "stem": 4,
        "front": [[4, 1, 1]],
        "stages": [[[4, 6, 8], 2, 2], [[4, 8, 8], 1, 2]],
        "space": [[0, 2], [0, 1, 2]],
        "gated": [0, 1],
    },
}
WAYS = [(name, {**options, "statistics": "way"}) for name, options in TWO.items()]
CASES = [(name, options) for table in (ONE, TWO) for name, options in table.items()] + WAYS


def network(name: str = "ds_resnet", options: dict | None = None, calibrated: bool = True) -> nn.Module:
    torch.manual_seed(0)
    options = {"space": [0, 1, 2], **(ONE[name] if options is None else options)}
    net = create_model(name, in_channels=1, num_classes=10, **options)
    if calibrated:
        ways = all_ways(net) if options.get("statistics") == "way" else ()
        calibrate(net, [batch(64)[0]], range(net.num_widths), ways)
        spread(net.eval(), batch(64)[0])
    return net


@torch.no_grad()
def spread(net: nn.Module, x: torch.Tensor) -> None:
    """Let the gates of a fresh network answer differently from image to image."""
    before: int | torch.Tensor = 0
    y = net.segment(0, x, before)
    for k, gate in enumerate(net.gates):
        gate.slim.weight.normal_()
        y, z = gate.decide(y, before)
        gate.offset.copy_(-z.mean(0))
        width = torch.tensor(gate.space)[gate.choose(z)]
        at = net.configuration(k + 1, width, before)
        y, before = net.segment(k + 1, y, at, before), at


def batch(n: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    return DATA.normalize(DATA.val.images[:n]), DATA.val.labels[:n]
