"""Parameters, bytes and multiply-adds of networks small enough to count by hand."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from effkern.models import create_model
from effkern.nn import skip_form
from effkern.training import CountsMacs, bytes_on_disk, count_macs, count_params


def test_macs_of_convolutions_and_linear():
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),  # 8x8 -> 4x4: 8*3*9*16
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),  # depthwise: 8*9*16
        nn.Conv2d(8, 4, 1, dilation=2),  # 4*8*16
        nn.ConvTranspose2d(4, 2, 2, stride=2),  # 16 inputs meet 2*4 weights in each of 4 channels
        nn.Flatten(),
        nn.Linear(128, 10),
    )
    expected = 8 * 3 * 9 * 16 + 8 * 9 * 16 + 4 * 8 * 16 + 16 * 4 * 2 * 4 + 128 * 10
    assert count_macs(net, torch.zeros(1, 3, 8, 8)) == expected
    assert count_macs(net, torch.zeros(5, 3, 8, 8)) == expected  # per image


def test_blocks_that_run_in_one_call_are_counted_too():
    """A stage in its skipping form runs its identity blocks without calling them."""
    x = torch.zeros(2, 3, 8, 8)
    net = create_model("resnet32", widths=(4, 8, 8), blocks=(3, 2, 1)).eval()
    stem, stages = 4 * 3 * 9 * 64, (6 * 16 * 9 * 64) + (32 + 3 * 64) * 9 * 16 + 2 * 64 * 9 * 4
    assert count_macs(skip_form(net), x) == count_macs(net, x) == stem + stages + 80


def test_linear_over_tokens_counts_every_token():
    assert count_macs(nn.Linear(4, 6), torch.zeros(2, 7, 4)) == 7 * 4 * 6


class HalfConv(nn.Conv2d):
    """A convolution that says it does half the work."""

    def macs(self, input_shape: torch.Size, output_shape: torch.Size) -> float:
        return output_shape.numel() * input_shape[1] * 9 / 2


class Wrapped(nn.Module):
    """A layer that answers for its child and for a functional call."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)

    def macs(self, input_shape: torch.Size, output_shape: torch.Size) -> float:
        return 7.0 * input_shape[0]


def test_a_layer_may_answer_for_itself_and_its_children():
    assert isinstance(HalfConv(2, 2, 3), CountsMacs) and not isinstance(nn.Conv2d(2, 2, 3), CountsMacs)
    x = torch.zeros(3, 2, 4, 4)
    assert count_macs(HalfConv(2, 2, 3, padding=1), x) == 2 * 16 * 2 * 9 / 2
    assert count_macs(nn.Sequential(Wrapped(), nn.Conv2d(2, 1, 1)), x) == 7 + 2 * 16


def test_a_layer_called_twice_counts_twice():
    layer = nn.Linear(4, 4)
    assert count_macs(nn.Sequential(layer, nn.ReLU(), layer), torch.zeros(1, 4)) == 32


def test_counting_leaves_no_trace_even_after_an_error():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(5, 1))
    net[1].eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(RuntimeError):
        count_macs(net, torch.randn(1, 1, 4, 4))  # the linear layer does not fit
    assert [module.training for module in net] == [True, False, True, True]
    assert not any(module._forward_hooks for module in net.modules())
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_an_empty_batch_is_refused():
    with pytest.raises(ValueError, match=r"x: must hold at least one sample, got shape \(0, 4\)"):
        count_macs(nn.Linear(4, 4), torch.zeros(0, 4))


def test_params_count_shared_weights_once_and_no_buffers():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
    second.weight = first.weight
    assert count_params(nn.Sequential(first, second, nn.BatchNorm1d(4))) == 16 + 4 + 8


def test_bytes_are_those_of_the_file(tmp_path):
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)).to(memory_format=torch.channels_last)
    save_file({name: value.contiguous() for name, value in net.state_dict().items()}, tmp_path / "w.safetensors")
    assert bytes_on_disk(net) == bytes_on_disk(net.state_dict()) == (tmp_path / "w.safetensors").stat().st_size


def test_bytes_of_something_else_than_tensors_are_refused():
    with pytest.raises(TypeError, match=r"state\['steps'\]: must be a tensor, got int"):
        bytes_on_disk({"steps": 3})
