"""The uniform sliced convolution against its fp64 oracle."""

import pytest
import torch

from effkern.ops.sliced_conv.samples import samples
from effkern.testing import assert_within, direct_bound, layouts, to_double

SAMPLES = [pytest.param(s, id=s.name) for s in samples()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", [s.name for s in samples()])
def test_is_within_the_bound_in_every_layout(name, dtype):
    sample = next(s for s in samples(dtype) if s.name == name)
    exact = sample.reference(*to_double(sample.args))
    bound = direct_bound(sample.magnitude(*sample.args), exact, dtype)
    for layout, x in layouts(sample.args[0]).items():
        assert_within(sample.op(x, *sample.args[1:]), exact, bound, f"{name} {layout}")
