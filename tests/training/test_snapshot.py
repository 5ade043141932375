"""States of any nesting come back as they were, from files that can execute nothing."""

from __future__ import annotations

import pickle

import pytest
import torch

from effkern.training import CheckpointError, History, load_snapshot, save_snapshot

STATE = {
    "step": 7,
    0: {"momentum": torch.arange(24.0).view(1, 4, 2, 3).contiguous(memory_format=torch.channels_last)},
    "list": [1, 2.5, None, True, "x", torch.tensor(3, dtype=torch.int64)],
    "tuple": (torch.zeros(0, 3), torch.tensor([True, False]), torch.ones(2, dtype=torch.bfloat16)),
    "a": {"b/c": torch.tensor([1.0])},
    "a/b": {"c": torch.tensor([2.0])},
    "view": torch.arange(10)[2:8:2],
}


def test_everything_comes_back(tmp_path):
    save_snapshot(tmp_path / "s", STATE)
    got = load_snapshot(tmp_path / "s")
    assert list(got) == list(STATE) and got["list"][:5] == STATE["list"][:5] and isinstance(got["tuple"], tuple)
    assert got[0]["momentum"].stride() == STATE[0]["momentum"].stride() == (24, 1, 12, 4)
    pairs = [
        (got[0]["momentum"], STATE[0]["momentum"]),
        (got["view"], STATE["view"]),
        (got["list"][5], STATE["list"][5]),
    ]
    pairs += [*zip(got["tuple"], STATE["tuple"], strict=True)]
    pairs += [(got["a"]["b/c"], STATE["a"]["b/c"]), (got["a/b"]["c"], STATE["a/b"]["c"])]
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


def test_an_optimizer_goes_on_to_the_bit(tmp_path):
    weights = [torch.randn(3, 4).requires_grad_() for _ in range(2)]
    optimizers = [torch.optim.AdamW([w], lr=0.1) for w in weights]
    gradients = torch.randn(6, 3, 4)

    def steps(i, some):
        for gradient in some:
            weights[i].grad = gradient.clone()
            optimizers[i].step()

    steps(0, gradients[:3])
    save_snapshot(tmp_path / "s", {"w": weights[0].detach(), "o": optimizers[0].state_dict()})
    state = load_snapshot(tmp_path / "s")
    with torch.no_grad():
        weights[1].copy_(state["w"])
    optimizers[1].load_state_dict(state["o"])
    for i in range(2):
        steps(i, gradients[3:])
    assert torch.equal(*weights)


class Execute:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was executed",))


def test_damage_and_strangers_are_named(tmp_path):
    path = tmp_path / "s"
    save_snapshot(path, STATE)
    whole = path.read_bytes()
    for place in range(0, len(whole), 61):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
        with pytest.raises(CheckpointError, match=str(path)):
            load_snapshot(path)
    torch.save({"w": torch.ones(2)}, tmp_path / "torch")
    (tmp_path / "pickle").write_bytes(pickle.dumps(Execute()))
    for name in ("torch", "pickle", "absent"):
        with pytest.raises(CheckpointError, match=f"{tmp_path / name}"):
            load_snapshot(tmp_path / name)


def test_what_is_no_data_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"state/a/1: must be a tensor or plain data, got object"):
        save_snapshot(tmp_path / "s", {"a": [1, object()]})
    assert not list(tmp_path.iterdir())


def test_history_keeps_the_newest_and_falls_back(tmp_path):
    told = []
    history = History(tmp_path / "h", keep=2, tell=told.append)
    assert history.load() is None and history.newest is None
    for step in (1, 5, 12):
        history.save(step, {"step": step})
    assert [p.name for p in history.paths()] == ["step-00000005.safetensors", "step-00000012.safetensors"]
    assert history.load() == {"step": 12} and told == []
    history.newest.write_bytes(b"")
    assert history.load() == {"step": 5}
    assert len(told) == 1 and "step-00000012" in told[0]
    history.set_aside_after(5)
    assert history.load() == {"step": 5} and len(told) == 1
    with pytest.raises(ValueError, match="keep: must be at least 2, got 1"):
        History(tmp_path, keep=1)
