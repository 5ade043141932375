"""Importing: silent, light, and possible without any native library."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import effkern
from tests.native.package import PACKAGE, python


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A folder with the Python files of the package and nothing compiled."""
    shutil.copytree(PACKAGE, tmp_path / "effkern", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return tmp_path


def test_import_prints_nothing_and_leaves_triton_alone(tmp_path):
    run = python("-c", "import sys, effkern; sys.exit('triton' in sys.modules)", cwd=tmp_path)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_without_native_libraries_the_reference_serves(bare):
    code = """
import torch, effkern
assert effkern._library.missing["_C"] == "not built", effkern._library.missing
x, w = torch.randn(2, 4, 5, 5), torch.randn(6, 4, 3, 3)
y = effkern.ops.sliced_conv2d(x, w, padding=1)
torch.testing.assert_close(y, torch.nn.functional.conv2d(x, w, padding=1))
try:
    effkern.ops.sliced_conv2d(x, w.double())
except TypeError as error:
    assert "weight" in str(error)
else:
    raise SystemExit("a wrong dtype was accepted")
"""
    run = python("-c", code, path=bare, cwd=bare)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_a_library_that_cannot_be_loaded_is_reported_not_raised(bare):
    (bare / "effkern" / "_C.so").write_bytes(b"not a library")
    run = python("-c", "import effkern; print(effkern._library.missing['_C'])", path=bare, cwd=bare)
    assert run.returncode == 0, run.stderr
    assert "could not load it" in run.stdout


def test_the_package_is_typed_and_versioned():
    assert (PACKAGE / "py.typed").exists()
    assert effkern.__version__.count(".") == 2


def test_info_names_versions_libraries_and_every_op(tmp_path):
    run = python("-m", "effkern.info", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    for word in (effkern.__version__, "torch", "_C ", "_C_cuda", "_host", "instruction set", "sliced_conv2d", "native"):
        assert word in run.stdout, word


def test_info_says_that_an_instruction_set_is_refused(tmp_path):
    run = python("-m", "effkern.info", cwd=tmp_path, EFFKERN_ISA="avx1024")
    assert run.returncode == 0, run.stderr
    assert "instruction set  avx1024 " in run.stdout and "every kernel refuses to run" in run.stdout
    assert "refuses" not in python("-m", "effkern.info", cwd=tmp_path).stdout


def test_info_says_why_a_library_is_missing(bare):
    run = python("-m", "effkern.info", path=bare, cwd=bare)
    assert run.returncode == 0, run.stderr
    assert "not built" in run.stdout and "reference" in run.stdout
