"""Every CUDA op and gradient a few times on small ragged shapes, and nothing else: something to watch for
``compute-sanitizer --tool memcheck --kernel-name kns=effkern python -m tests.gpu.sanitize`` (racecheck, synccheck,
initcheck likewise; older ones call the filter, which leaves torch's own kernels alone, ``--kernel-regex``).

Arguments are substrings of the samples to run; ``/`` is in all of them. Every tensor is an allocation of its own, so
that an access outside of one is seen.
"""

from __future__ import annotations

import os
import sys
import time
from collections import defaultdict

import torch
from torch import Tensor

from effkern.testing import Sample
from tests.gpu.device import DEVICE, there
from tests.gpu.proof_host import results
from tests.ops.catalog import every_sample
from tests.ops.test_every_op import gradients

#: Samples of an op: the first ones reach its kernels, a tail and a second algorithm.
EACH = 3


def chosen(dtype: torch.dtype, names: list[str]) -> dict[str, Sample]:
    """Some samples of each op with a kernel of its own; all that were named."""
    kept: dict[str, Sample] = {}
    count: dict[str, int] = defaultdict(int)
    for key, sample in every_sample(dtype).items():
        if sample.op.backends[DEVICE] != "native":
            continue
        if any(name in key for name in names) or (not names and count[sample.op.name] < EACH):
            kept[key] = sample
            count[sample.op.name] += 1
    return kept


def run(sample: Sample) -> bool:
    """A call and its gradients; whether it was one the GPU takes."""
    args = there(sample.args)
    outputs = results(sample.op, args)
    if outputs is None:
        return False
    incoming = tuple(torch.ones_like(y) for y in outputs if isinstance(y, Tensor) and y.is_floating_point())
    if sample.requires_grad:
        gradients(sample.op, sample, args, incoming)
    return True


def main(names: list[str]) -> int:
    if DEVICE == "cuda" and not torch.cuda.is_available():
        print("no GPU was found: nothing was run")
        return 0
    os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")  # torch reads it at the first allocation
    started, calls = time.monotonic(), 0
    for dtype in (torch.float16, torch.float32):
        for key, sample in chosen(dtype, names).items():
            print(f"{key} {dtype}", flush=True)  # who was at it when the sanitizer speaks
            calls += run(sample)
            if DEVICE == "cuda":
                torch.cuda.synchronize()
    print(f"{calls} calls, {time.monotonic() - started:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
