"""The tables of docs/gpu.md that go kernel by kernel: where it is, what runs it in the harness, how many faults were
seeded into it, and what the compiler made of it. `python -m tests.gpu.kernel_table` prints them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable

from tests.gpu.mutants import MUTANTS
from tests.gpu.proof_mutants import TESTS
from tests.gpu.proof_static import RESOURCES, included
from tests.native.package import CHECKOUT

CSRC = CHECKOUT / "csrc"
TRITON = RESOURCES.with_name("triton_resources.json")
#: All tiles of these run in a file of tests of its own, beside the one that mutants must fail.
WHOLE = {"conv": "test_conv", "wgrad": "test_wgrad"}


def sources() -> dict[str, str]:
    """Kernel -> the file that holds it."""
    found = {}
    for path in sorted(CSRC.glob("*/*.cuh")):
        for name in re.findall(r"__global__ void __launch_bounds__\(.*?\)\s+(\w+)\(", path.read_text()):
            found[name.removesuffix("_kernel")] = str(path.relative_to(CSRC))
    return found


def kernel_of(form: str) -> str:
    """Of a row of resources.json: tiles of the convolution are named by their product alone."""
    name = re.match(r"(?:listed )?(\w+)", form)
    assert name is not None
    return "conv" if name[1] in ("F16", "BF16", "TF32", "F32") else name[1]


def forms() -> dict[str, list[dict]]:
    """Kernel -> what resources.json holds of each of its forms."""
    found: dict[str, list[dict]] = {}
    for form, facts in json.loads(RESOURCES.read_text())["kernels"].items():
        found.setdefault(kernel_of(form), []).append(facts)
    return found


def faults(source: str) -> int:
    """Seeded into a file and into what it includes, as far as the same tests must catch them."""
    files = {str(path.relative_to(CSRC)) for path in included(CSRC / source, set()) if path.is_relative_to(CSRC)}
    return sum(mutant.file in files and TESTS[mutant.file] == TESTS[source] for mutant in MUTANTS)


def span(numbers: Iterable[float]) -> str:
    """The least and the greatest of them."""
    least, *_, most = (f"{n:.4g}" for n in sorted([*numbers] * 2))
    return least if least == most else f"{least} to {most}"


def table() -> str:
    rows = [
        "| kernel | in `csrc/` | in the harness | faults | forms | registers | KiB shared | threads | blocks an SM |",
        "|---|---|---|---:|---:|---|---|---|---|",
    ]
    compiled = forms()
    for name, source in sorted(sources().items()):
        tests = [TESTS[source], *([WHOLE[name]] if name in WHOLE else [])]
        targets = [target for form in compiled[name] for target in form["targets"].values()]
        cells = [
            f"`{name}`", f"`{source}`", ", ".join(f"`{test}`" for test in tests), str(faults(source)),
            str(len(compiled[name])), span(t["registers"] for t in targets),
            span(form["shared"] / 1024 for form in compiled[name]), span(form["threads"] for form in compiled[name]),
            span(t["blocks"] for t in targets),
        ]  # fmt: skip
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def triton() -> str:
    """Of the Triton kernels, over the calls that are compiled ahead of time and their targets."""
    found: dict[str, list[dict]] = {}
    for call, targets in json.loads(TRITON.read_text())["kernels"].items():
        found.setdefault(call.partition(":")[0], []).extend(targets.values())
    rows = ["| kernel | compiled | registers | KiB shared | spilled |", "|---|---:|---|---|---:|"]
    for name, facts in sorted(found.items()):
        cells = [f"`{name}`", str(len(facts)), span(f["registers"] for f in facts),
                 span(f["shared"] / 1024 for f in facts), str(sum(f["local"] for f in facts))]  # fmt: skip
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(table(), triton(), sep="\n\n")
