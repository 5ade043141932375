"""What the documents say can be typed: the examples of docstrings, of the README and of the pages."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import re
import textwrap
from pathlib import Path

import pytest
import torch

from effkern.models import create_model

ROOT = Path(__file__).resolve().parents[1]
PAGES = {str(p.relative_to(ROOT)): p.read_text() for p in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))}
FILES = sorted(p.relative_to(ROOT) for p in (ROOT / "effkern").rglob("*.py") if p.name != "__main__.py")
MODULES = [".".join(p.with_suffix("").parts).removesuffix(".__init__") for p in FILES]
IMPORT = re.compile(r"^ *(from effkern\S* import .+)$", re.MULTILINE)

#: Page -> what its examples take for granted: networks and data small enough for a test.
GIVEN = {
    "README.md": "",
    "docs/optimize.md": "",
    "docs/ops/block_skip.md": "",
    "docs/ops/pq.md": """
        model = create_model("resnet20", widths=(8, 8, 8), blocks=(1, 1, 1))
        images = torch.randn(4, 3, 8, 8)
        batches = [images]
    """,
    "docs/ops/rep_conv.md": """
        x = torch.randn(2, 3, 32, 32)
    """,
    "docs/ops/sliced_conv.md": """
        x = torch.randn(3, 64, 5, 5)  # more channels than a width has are not read
        model = create_model("slimmable_cnn", widths=(2, 3, 4, 5), blocks=(1, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        batches = [(torch.randn(4, 1, 28, 28), torch.arange(4)) for _ in range(2)]
        images = [x for x, _ in batches]
    """,
}


def test_examples_of_docstrings():
    finder, runner = doctest.DocTestFinder(exclude_empty=True), doctest.DocTestRunner()
    for name in MODULES:
        if "triton" in name and importlib.util.find_spec("triton") is None:
            continue  # kernels, for which tests/gpu/test_triton.py says what is missing
        for test in finder.find(importlib.import_module(name)):
            runner.run(test)
    assert runner.failures == 0, "see the captured output"
    assert runner.tries > 20


@pytest.mark.parametrize("page", PAGES)
def test_names_that_a_page_imports_exist(page):
    for line in IMPORT.findall(PAGES[page]):
        exec(line, {})


@pytest.mark.parametrize("page", GIVEN)
def test_examples_of_a_page_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGES[page], re.DOTALL)
    assert blocks
    names = {"torch": torch, "create_model": create_model}
    for code in (*IMPORT.findall(PAGES[page]), textwrap.dedent(GIVEN[page]), *blocks):
        exec(code, names)


def test_every_page_with_examples_is_run():
    templates = {"docs/add_an_op.md"}  # pieces of an op that does not exist
    assert {page for page, text in PAGES.items() if "```python" in text} == set(GIVEN) | templates


def test_links_between_pages_lead_somewhere():
    for page, text in PAGES.items():
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", text):
            assert ((ROOT / page).parent / target).exists(), f"{page}: {target}"
