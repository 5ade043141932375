"""The floors of the house: imports point down only, and nothing but a folder is needed to add an op."""

from __future__ import annotations

import ast
import re
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "effkern"
FAMILIES = frozenset({"blockdrop", "dsnet", "reparam", "quantize", "stochastic_depth"})
TOP = frozenset({"demo", "report", "recipes", "cli", "__main__"})
#: Room -> rooms it may import besides itself.
BASE = frozenset({"_version", "_library", "testing"})
OPS = BASE | {"ops", "_host"}
NN = OPS | {"nn"}
MODELS = NN | {"models"}
NEUTRAL = frozenset({"data", "training", "info"})
ALLOWED: dict[str, frozenset[str]] = {
    "__init__": NN | {"inference"},  # effkern.optimize, imported on first use
    "_version": frozenset(),
    "_library": frozenset({"_version"}),
    "testing": frozenset({"_version"}),
    "ops": OPS,
    "nn": NN,
    "models": MODELS,
    "info": OPS,
    "data": frozenset({"_version", "training"}),
    "training": NN | {"info"},
    **{family: NN | NEUTRAL | {family} for family in FAMILIES},
    "inference": MODELS | FAMILIES,
    **{room: MODELS | NEUTRAL | FAMILIES | {"inference"} | TOP for room in TOP},
}
FILES = sorted(p for p in PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Rooms of the package that a file imports, wherever in the file it does."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = ("effkern", *path.relative_to(PACKAGE).parts[:-1])
            base = [*package[: len(package) - node.level + 1]] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("effkern.")}
    return {name for name in found if not name.startswith("__")}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path):
    here = room(path)
    assert here in ALLOWED, f"effkern/{here} has no floor: give it one here and in docs/design.md"
    too_high = imports(path) - ALLOWED[here] - {here}
    assert not too_high, f"{here} must not import {sorted(too_high)}"


def test_ops_use_one_another_only_through_shared_files():
    families = {p.parent.name for p in PACKAGE.glob("ops/[a-z]*/__init__.py")}
    for path in PACKAGE.glob("ops/*/*.py"):
        if path.name == "samples.py":  # inputs of one family may be made by another: packed weights
            continue
        # One packer serves all families that take packed weights.
        text = path.read_text().replace("from effkern.ops.rep_conv import pack_conv_weight\n", "")
        others = families - {path.parent.name}
        used = {f for f in others if re.search(rf"effkern\.ops\.{f}\b", text)}
        assert not used, f"{path.relative_to(ROOT)} imports {sorted(used)}"


def test_every_op_family_has_its_files():
    for folder in PACKAGE.glob("ops/[a-z]*/__init__.py"):
        names = {p.name for p in folder.parent.iterdir()}
        assert {"reference.py", "samples.py"} <= names, f"{folder.parent.name}: {sorted(names)}"
        family = folder.parent.name
        assert list((ROOT / "csrc" / family).glob(f"{family}_cpu.cpp")), f"csrc/{family}/{family}_cpu.cpp"
        assert (ROOT / "benchmarks" / f"bench_{family}.py").exists(), f"benchmarks/bench_{family}.py"
        assert (ROOT / "docs" / "ops" / f"{family}.md").exists(), f"docs/ops/{family}.md"


def test_only_the_host_module_includes_python():
    for path in (ROOT / "csrc").rglob("*"):
        if path.suffix in (".h", ".cpp", ".cu", ".cuh") and path.parent.name not in ("host", "runtime"):  # a test's
            assert not re.search(r'#include\s*[<"](Python\.h|pybind11|torch/extension\.h|ATen/)', path.read_text()), (
                path
            )


def test_every_switch_is_documented():
    table = (ROOT / "docs" / "environment.md").read_text()
    sources = [*PACKAGE.rglob("*.py"), *(ROOT / "csrc").rglob("*.cpp"), ROOT / "setup.py"]
    text = "\n".join(p.read_text() for p in sources if "tests" not in p.parts)
    read = set(re.findall(r"""(?:environ\.get\(|getenv\(|environ\[)\s*["'](EFFKERN_[A-Z_]+)""", text))
    assert read, "no switch found: the pattern above is out of date"
    assert not {name for name in read if f"`{name}" not in table}


def test_pytest_looks_into_every_folder_of_tests(pytestconfig):
    """It passes over folders with names such as ``build`` unless told otherwise."""
    skipped = pytestconfig.getini("norecursedirs")
    folders = {path.parent for path in (ROOT / "tests").rglob("test_*.py")}
    passed_over = {f for f in folders for part in f.relative_to(ROOT).parts if any(fnmatch(part, s) for s in skipped)}
    assert not passed_over
