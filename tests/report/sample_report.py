"""A report with everything a run can hold, made up, for the tests of what is drawn from it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from effkern.demo.context import Row
from effkern.report import build


def row(stage: str, name: str, *, gain: float = 1.5, left: float | None = None, **changes: Any) -> dict[str, Any]:
    """A row whose eager form takes 1 ms at batch 1 and 0.5 ms an image at batch 64."""
    values: dict[str, Any] = {
        "stage": stage,
        "name": name,
        "top1": 91.25,
        "params": 272_000,
        "bytes_on_disk": 1_101_000,
        "macs": 8_050_000.0 * (left or 1.0),
        "ms_b1": 1.0 / gain,
        "ms_b64": 0.5 / gain,
        "eager_ms_b1": 1.0,
        "eager_ms_b64": 0.5,
        "ms_b1_min": 0.9 / gain,
        "ms_b64_min": 0.45 / gain,
        "eager_ms_b1_min": 0.9,
        "eager_ms_b64_min": 0.45,
        "eager_form_b1": "nchw",
        "eager_form_b64": "channels_last",
        "repetitions": 40,
        "macs_left": left,
        "time_left_b1": None if left is None else left + 0.05,
        "time_left_b64": None if left is None else left + 0.02,
        "relative_to": None if left is None else "all blocks",
    }
    return asdict(Row(**{**values, **changes}))


def sample_report(name: str = "Fashion-MNIST", **changes: Any) -> dict[str, Any]:
    """All stages; ``name`` is that of the data set."""
    blocks = 15
    samples = [
        {"index": i, "predicted": 0 if i == 3 else i % 10, "keep": [int((i + k) % 3 > 0) for k in range(blocks)]}
        for i in range(12)
    ]
    stages = {
        "baseline": ("a dense ResNet", [row("baseline", "ResNet-20, dense", gain=1, eager_only=True)], {}),
        "rep_conv": (
            "folded and run fused",
            [
                row("rep_conv", "RepVGG, three branches", gain=1, eager_only=True),
                row("rep_conv", "RepVGG, folded", gain=2.4, top1=91.9),
            ],
            {},
        ),
        "block_skip": (
            "a policy that skips blocks",
            [
                row("block_skip", "all blocks", gain=1.3, left=1.0, top1=91.8),
                row("block_skip", "policy", gain=1.7, left=0.72, top1=91.1, disagreeing=0.002),
            ],
            {
                "blocks": {
                    "usage": [1 - 0.04 * (k % 7) for k in range(blocks)],
                    "patterns": 31,
                    "samples": samples,
                },
                "curves": [
                    {
                        "title": "accuracy while the policy learns",
                        "x": "step",
                        "y": "top-1, %",
                        "series": {
                            "learned": [[0, 40], [100, 80], [200, 90]],
                            "random, $same$ budget": [[0, 40], [200, 51]],
                        },
                    }
                ],
            },
        ),
        "sliced_conv": (
            "four widths",
            [
                row("sliced_conv", f"width {w}", gain=g, left=w**2, top1=86 + 5 * w, relative_to="width 1.0")
                for w, g in ((0.25, 0.8), (0.5, 1.1), (0.75, 1.4), (1.0, 1.5))
            ],
            {},
        ),
        "pq": (
            "weights as codes",
            [
                row(
                    "pq",
                    "ResNet-20, 8 bits a code",
                    gain=0.9,
                    top1=90.4,
                    bytes_on_disk=96_000,
                    note="Codes are decoded.",
                )
            ],
            {},
        ),
    }
    arguments: dict[str, Any] = {
        "run": {
            "quick": False,
            "seed": 0,
            "threads": 2,
            "seconds": 640.0,
            "data": {"name": name, "source": "/data", "train": 55000, "val": 5000, "test": 10000},
        },
        "machine": {
            "cpu": "A processor",
            "cores": 2,
            "isa": "avx2",
            "platform": "Linux-6",
            "python": "3.11.7",
            "torch": "2.13.0",
            "effkern": "0.1.0",
            "commit": "0123456789",
        },
        "classes": [f"class {i}" for i in range(10)],
        "stages": {
            key: {"title": title, "seconds": 100.0, "rows": rows, "notes": [], "extra": extra}
            for key, (title, rows, extra) in stages.items()
        },
        "failed": {},
    }
    return build(**{**arguments, **changes})
