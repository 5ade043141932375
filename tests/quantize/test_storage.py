"""The file of a quantized model: its size is what is claimed, and it comes back."""

import numpy as np
import pytest
import torch
from torch import nn

from effkern.nn.pq import PQConv2d, PQEmbedding, PQLinear
from effkern.quantize import load, packed_state, save, size_bytes, size_of
from effkern.quantize.storage import bits_of, pack, unpack
from effkern.training import CheckpointError


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(
        PQConv2d(4, 8, 3, d=9, entries=5, padding=1, scale=True),
        nn.BatchNorm2d(8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        PQLinear(8, 12, d=3, entries=300, stages=2, books=2),
        nn.Linear(12, 3),
    ).eval()


def test_size_is_that_of_the_file(tmp_path):
    model = make_model()
    size = size_of(model)
    path = tmp_path / "model.safetensors"
    assert save(path, model) == size.total == size_bytes(model) == path.stat().st_size
    # 8 x 4 codes of 3 bits; 12 x 3 x 2 codes of 9 bits
    assert size.codes == 8 * 4 * 3 // 8 + 12 * 3 * 2 * 9 // 8
    assert size.codebooks == 2 * (5 * 9 + 2 * 300 * 3)
    # scale and bias, batch norm with its statistics and its counter, bias, the dense layer
    assert size.rest == 4 * (8 + 8) + 4 * 4 * 8 + 8 + 4 * 12 + 4 * (36 + 3)


def test_a_published_size():
    """128x128x3x3 with 256 entries of 9: 16384 bytes of codes and 4608 of codebook."""
    size = size_of(PQConv2d(128, 128, 3, d=9, entries=256, bias=False))
    assert (size.codes, size.codebooks, size.rest) == (16384, 4608, 0)


def test_comes_back_the_same_but_for_the_rounding_of_the_codebooks(tmp_path):
    model, other = make_model(), make_model()
    x = torch.randn(2, 4, 6, 6)
    save(tmp_path / "m", model)
    for layer in (other[0], other[4]):
        layer.reset_parameters()
    assert load(tmp_path / "m", other) is other
    for a, b in ((model[0], other[0]), (model[4], other[4])):
        assert torch.equal(a.codes, b.codes)
        assert torch.equal(a.codebook.half().float(), b.codebook)
    torch.testing.assert_close(other(x), model(x), rtol=1e-2, atol=1e-2)
    again = tmp_path / "again"
    save(again, other)
    assert again.read_bytes() == (tmp_path / "m").read_bytes()


def test_a_layer_alone_and_a_shared_one(tmp_path):
    for make in (
        lambda: PQEmbedding(20, 8, d=4, entries=7),
        lambda: nn.Sequential(*[PQLinear(8, 8, d=4, entries=7)] * 2),
    ):
        model, other = make(), make()
        save(tmp_path / "m", model)
        load(tmp_path / "m", other)
        for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("native", [True, False])
def test_packing(monkeypatch, native):
    import effkern.quantize.storage as storage

    if not native:
        monkeypatch.setattr(storage, "_host", None)
    rng = np.random.default_rng(0)
    for entries in (1, 2, 3, 16, 17, 256, 257, 65536):
        bits = bits_of(entries)
        assert 2**bits >= entries and (bits == 1 or 2 ** (bits - 1) < entries)
        codes = torch.from_numpy(rng.integers(0, entries, (7, 3)))
        packed = pack(codes, bits)
        assert packed.numel() == -(-21 * bits // 8)
        assert torch.equal(unpack(packed, bits, codes.shape), codes)
    assert pack(torch.tensor([1, 2, 3]), 4).tolist() == [0x21, 0x03]


def test_damaged_files_are_refused(tmp_path):
    model = make_model()
    path = tmp_path / "m"
    save(path, model)
    content = path.read_bytes()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for damaged in (content[:100], content[:-1], b"", b"garbage" * 50):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="m: cannot be read"):
            load(path, model)
    with pytest.raises(CheckpointError):
        load(tmp_path / "absent", model)
    state = packed_state(model)
    from effkern.quantize.storage import unpacked_state

    with pytest.raises(ValueError, match=r"must hold 0\.codes"):
        unpacked_state({k: v for k, v in state.items() if k != "0.codes"}, model)
    with pytest.raises(ValueError, match="packed: must be 12 bytes"):
        unpacked_state({**state, "0.codes": state["0.codes"][:-1]}, model)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
