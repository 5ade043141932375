"""setup.py: metadata without torch, plain words when something is missing, one line about CUDA."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.native.package import CHECKOUT, python


@pytest.fixture
def no_torch(tmp_path: Path) -> Path:
    """A module path on which importing torch fails as if it were not installed."""
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "torch.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')\n"
    )
    return tmp_path / "path"


def setup_py(*words: str, path: Path, **environment: str):
    return python("setup.py", *words, path=path, cwd=CHECKOUT, **environment)


def test_metadata_needs_no_torch(no_torch, tmp_path):
    run = setup_py("-q", "egg_info", "--egg-base", str(tmp_path), path=no_torch)
    assert run.returncode == 0, run.stderr
    metadata = (tmp_path / "effkern.egg-info" / "PKG-INFO").read_text()
    assert "Name: effkern" in metadata and "Requires-Dist: torch>=2.10" in metadata


def test_a_build_without_torch_ends_in_plain_words(no_torch):
    run = setup_py("build_ext", path=no_torch)
    assert run.returncode != 0
    assert "pip install torch" in run.stderr and "Traceback" not in run.stderr


def test_a_build_without_pybind11_ends_in_plain_words(tmp_path):
    (tmp_path / "pybind11.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'pybind11'\", name='pybind11')\n"
    )
    run = setup_py("build_ext", path=tmp_path)
    assert run.returncode != 0
    assert "pip install 'pybind11" in run.stderr and "Traceback" not in run.stderr


@pytest.mark.parametrize(("wish", "words"), [("0", "EFFKERN_CUDA=0"), ("maybe", "must be auto, 0 or 1, got 'maybe'")])
def test_one_line_tells_what_becomes_of_cuda(wish, words, tmp_path):
    run = setup_py("build", "--help", path=tmp_path, EFFKERN_CUDA=wish)
    lines = [line for line in (run.stdout + run.stderr).splitlines() if words in line]
    assert len(lines) == 1 and "Traceback" not in run.stderr
    assert (run.returncode == 0) == (wish == "0")
