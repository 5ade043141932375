"""A file is the old one or the new one, never half of either."""

import os
import stat

import pytest
import torch
from torch import nn

from effkern.training import CheckpointError, checkpoint, load_json, load_weights, save_json, save_weights


class PowerCut(BaseException):
    """What no handler for ordinary errors sees."""


class HalfFile:
    """Writes half of what it is given, then the power is gone."""

    def __init__(self, handle, mode) -> None:
        self.handle = handle

    def __enter__(self):
        return self

    def __exit__(self, *error):
        os.close(self.handle)

    def write(self, content):
        os.write(self.handle, content[: len(content) // 2])
        raise PowerCut


def die(*arguments, **options):
    raise PowerCut


STEPS = {"write": ("fdopen", HalfFile), "fsync": ("fsync", die), "rename": ("replace", die)}
KINDS = {
    "json": (save_json, {"a": 1}, {"a": 2}),
    "weights": (save_weights, {"a": torch.ones(3)}, {"a": torch.zeros(3)}),
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_crash_leaves_what_was_there(tmp_path, monkeypatch, step, kind):
    save, old, new = KINDS[kind]
    save(tmp_path / "file", old)
    content = (tmp_path / "file").read_bytes()
    monkeypatch.setattr(checkpoint.os, *STEPS[step])
    for path in (tmp_path / "file", tmp_path / "deep" / "file"):
        with pytest.raises(PowerCut):
            save(path, new)
    assert (tmp_path / "file").read_bytes() == content
    assert sorted(os.listdir(tmp_path)) == ["deep", "file"] and os.listdir(tmp_path / "deep") == []


def test_a_full_disk_names_the_file(tmp_path, monkeypatch):
    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*/a\.json'"):
        save_json(tmp_path / "a.json", {})
    assert os.listdir(tmp_path) == []


def test_weights_come_back_whatever_their_layout(tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(memory_format=torch.channels_last).bfloat16()
    state = {**net.state_dict(), "view": torch.arange(10)[2:8:2], "codes": torch.arange(3, dtype=torch.uint8)}
    size = save_weights(tmp_path / "w.safetensors", state)
    assert size == (tmp_path / "w.safetensors").stat().st_size
    got = load_weights(tmp_path / "w.safetensors")
    assert got.keys() == state.keys()
    assert all(torch.equal(got[name], state[name]) and got[name].dtype == state[name].dtype for name in state)


def test_a_saved_file_is_as_readable_as_any_other(tmp_path):
    save_json(tmp_path / "a", 1)
    (tmp_path / "b").write_text("1")
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == stat.S_IMODE((tmp_path / "b").stat().st_mode)


def test_json_has_no_nan(tmp_path):
    save_json(tmp_path / "a.json", {"x": [1, 2.5, None, "ü"]})
    assert load_json(tmp_path / "a.json") == {"x": [1, 2.5, None, "ü"]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        save_json(tmp_path / "a.json", {"x": float("nan")})
    with pytest.raises(TypeError):
        save_json(tmp_path / "a.json", {"x": torch.zeros(1)})
    assert load_json(tmp_path / "a.json")["x"][0] == 1


def test_missing_short_and_wrong_files_are_named(tmp_path):
    weights, text = tmp_path / "w.safetensors", tmp_path / "t.json"
    save_weights(weights, {"a": torch.ones(100)})
    save_json(text, {"a": [1, 2, 3]})
    for path, load in ((weights, load_weights), (text, load_json)):
        whole = path.read_bytes()
        for content in (whole[:-3], whole[:5], b"", b"\x80\x04pickle"):
            path.write_bytes(content)
            with pytest.raises(CheckpointError, match=f"{path}: cannot be read"):
                load(path)
        path.unlink()
        with pytest.raises(CheckpointError, match=f"{path}: cannot be read"):
            load(path)
