"""Every kernel compiled for every target, and what the compiler made of it held to rules and to a table.

`python -m tests.gpu.proof_static` from the root rewrites the table (resources.json) after a deliberate change.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.gpu import toolkit
from tests.gpu.counts import COUNTS
from tests.gpu.harness import WORKERS, build
from tests.gpu.sass import LOCAL, Function, disassemble
from tests.native.package import CHECKOUT

RESOURCES = Path(__file__).with_name("resources.json")
TABLE = CHECKOUT / "build" / "gpu-proof" / "resources.md"
CUBINS = TABLE.with_name("cubin")
#: Every file of kernels, so that none is forgotten.
SOURCES = tuple(sorted(str(p.relative_to(CHECKOUT / "csrc").with_suffix("")) for p in CHECKOUT.glob("csrc/*/*.cu")))
#: Least share of multiplying instructions in a turn of the main loop. The project's rule is 40 % in 16 bits; a
#: convolution's tile of 128 x 128 met it and lost to 128 x 64 wherever an H100 timed both, so the bounds are what the
#: tiles reach. A 32-bit product is half as much work an instruction and its operands are rounded first, and the
#: smaller tiles load more for each product. In the weight's gradient each copy has a tap of its own to be checked
#: against the map, and with lists its samples' width as well.
SHARES = {
    ("F16", "128x64"): 0.31, ("BF16", "128x64"): 0.31, ("F32", "128x64"): 0.60,
    ("F16", "32x32"): 0.07, ("BF16", "32x32"): 0.07, ("TF32", "32x32"): 0.04,
}  # fmt: skip
WGRAD_SHARES = SHARES | {("F16", "128x128"): 0.39, ("BF16", "128x128"): 0.39}
LISTED_SHARES = SHARES | {("F16", "128x128"): 0.36, ("BF16", "128x128"): 0.36}
#: Kernels without a main loop that access maps 16 bytes at a time.
OVER_ROWS = (
    "act_grad<", "block_grad<", "ragged_grad<", "depthwise_wgrad<", "bn_statistics<", "bn_apply<", "bn_gradient_sums<",
    "bn_gradient_apply<",
)  # fmt: skip
LEAST_SHARE = {"F16": 0.17, "BF16": 0.17, "TF32": 0.10, "F32": 0.50}
STAGE_SHARES = {"F16": 0.40, "BF16": 0.40, "TF32": 0.14, "F32": 0.60}
#: Its 32-bit fragments are loaded word by word, since ldmatrix transposes 16-bit elements alone.
WGRAD_LEAST_SHARE = LEAST_SHARE | {"TF32": 0.07}
LISTED_LEAST_SHARE = WGRAD_LEAST_SHARE | {"F16": 0.15, "BF16": 0.15}
#: By what the kernel's name begins with.
BOUNDS = {"wgrad": (WGRAD_SHARES, WGRAD_LEAST_SHARE), "listed": (LISTED_SHARES, LISTED_LEAST_SHARE)}
#: Shared memory of a multiprocessor (CUDA programming guide, technical specifications).
SHARED_KIB = {80: 164, 86: 100, 89: 100, 90: 228, 100: 228, 120: 100}
MATHS = ("F16", "BF16", "TF32", "F32")
#: Targets for which ptxas, the same build of it, made other code of the same source on another machine: in 12 of 138
#: kernels up to 10 registers more than 38, and a tenth more instructions. And how far numbers may be apart there.
UNSTEADY, APART = ("100",), 0.35

HOME, CUOBJDUMP = toolkit.home(), toolkit.cuobjdump()
pytestmark = [
    pytest.mark.skipif(HOME is None, reason="no nvcc: not in CUDA_HOME, /usr/local/cuda or PATH"),
    pytest.mark.skipif(
        CUOBJDUMP is None, reason="no cuobjdump: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"
    ),
]


def key(mangled: str) -> str:
    """F16 128x128 64x64 3 for a convolution of that product, tile, warp's tile and number of stages, u where it is
    unaligned, behind wgrad for the gradient in the weight, and listed wgrad where that takes lists of samples; stage
    F16 16 for a stage of blocks of that product and as many channels; else the name of the kernel and what it is made
    for, as compact<unsigned int>."""
    if found := re.search(r"5stageILNS\w*?MathE(\d)E.*?Li(\d+)E", mangled):
        return f"stage {MATHS[int(found[1])]} {found[2]}"
    if not multiplies(mangled):
        name = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout
        return re.search(r"(?:\w+::)*(\w+(?:<[\w ,:]+>)?)\(", name)[1]
    found = re.search(r"MathE(\d)E.*?((?:Li\d+E)+)Lb(\d)E(Lb1E)?", mangled)
    numbers = [int(n) for n in re.findall(r"Li(\d+)E", found[2])]
    name = "{} {}x{} {}x{} {}".format(MATHS[int(found[1])], *numbers[:5]) + ("" if found[3] == "1" else "u")
    return f"{'listed ' * bool(found[4])}wgrad {name}" if "wgrad_kernel" in mangled else name


def multiplies(mangled: str) -> bool:
    """Whether the kernel is an implicit GEMM, with a main loop to look at."""
    return "conv_kernel" in mangled or "wgrad_kernel" in mangled


def included(path: Path, found: set[Path]) -> set[Path]:
    """The file and everything of ours it includes."""
    path = path.resolve()
    if path not in found and path.exists():
        found.add(path)
        for name in re.findall(r'#include "(.+)"', path.read_text()):
            included(path.parent / name, found)
    return found


def fingerprint(source: str) -> str:
    """Of everything a file of kernels is compiled from."""
    files = sorted(p for p in included(CHECKOUT / "csrc" / f"{source}.cu", set()) if "tests" not in p.parts)
    contents = b"".join(p.name.encode() + p.read_bytes() for p in files)
    return hashlib.sha256(toolkit.version(HOME).encode() + contents).hexdigest()[:12]


def compile_one(source: str, arch: int) -> tuple[dict, list[Function]]:
    """Resources and code of the kernels of one file for one target; kept in build/ until a source changes."""
    cubin = CUBINS / f"{Path(source).name}_{arch}_{fingerprint(source)}.cubin"
    said = cubin.with_suffix(".txt")
    if not said.exists():
        command = [HOME / "bin" / "nvcc", "-cubin", f"-arch=sm_{arch}", "-O3", "-std=c++20", "-Werror", "all-warnings"]
        command += ["-Xptxas", "-v", CHECKOUT / "csrc" / f"{source}.cu", "-o", cubin]
        run = subprocess.run(command, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        said.write_text(run.stderr)
    found = {}
    for part in said.read_text().split("Compiling entry function '")[1:]:
        stack, stores, loads = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill", part
        ).groups()
        found[part.split("'")[0]] = {
            "registers": int(re.search(r"Used (\d+) registers", part)[1]),
            "spills": int(stores) + int(loads),
            "stack": int(stack),
        }
    return found, disassemble(CUOBJDUMP, cubin)


def occupancy(folder: Path, questions: list[tuple[int, int, int, int]]) -> list[int]:
    program, source = folder / "occupancy", CHECKOUT / "csrc" / "tests" / "gpu" / "occupancy.cpp"
    subprocess.run(["g++", "-std=c++20", "-I", HOME / "include", source, "-o", program], check=True)
    lines = "\n".join(" ".join(map(str, q)) for q in questions)
    answers = subprocess.run([program], input=lines, capture_output=True, text=True, check=True).stdout
    return [int(a) for a in answers.split()]


def plans(folder: Path) -> dict[str, dict]:
    """Threads, shared memory and planned blocks of every kernel, as the source says."""
    program = build(folder, ("test_plans",), "-O1")
    lines = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"plan (.*): (\d+) threads (\d+) bytes (\d+) blocks", lines)
    return {name: {"threads": int(t), "shared": int(s), "blocks": int(b)} for name, t, s, b in found}


def measure(folder: Path) -> dict[str, dict]:
    """Kernel -> its plan and, by target, what was compiled."""
    kernels = {name: plan | {"targets": {}} for name, plan in plans(folder).items()}
    CUBINS.mkdir(parents=True, exist_ok=True)
    jobs = [(source, arch) for arch in toolkit.known_archs(HOME) for source in SOURCES]
    with ThreadPoolExecutor(WORKERS) as pool:
        results = list(pool.map(lambda job: compile_one(*job), jobs))
    for (_, arch), (resources, functions) in zip(jobs, results, strict=True):
        for function in functions:
            wide = {i.op for i in function.code}
            name = key(function.name)
            assert name in kernels, f"test_plans.cpp prints no plan of {name}"
            kernels[name]["targets"][str(arch)] = resources[function.name] | {
                "instructions": len(function.code),
                **(main_loop(function) if multiplies(function.name) else {}),
                **(stage_loop(function) if "5stage" in function.name else {}),
                "local": function.count(*LOCAL),
                "wide_loads": any(op.startswith("LDG.E.128") for op in wide),
                "wide_stores": any(op.startswith("STG.E.128") for op in wide),
                "wide_copies": any(op.startswith("LDGSTS") and ".128" in op for op in wide),
            }
    asked = [(k, a) for k, kernel in kernels.items() for a in kernel["targets"]]
    questions = [
        (int(a), kernels[k]["targets"][a]["registers"], kernels[k]["threads"], kernels[k]["shared"]) for k, a in asked
    ]
    for (k, a), blocks in zip(asked, occupancy(folder, questions), strict=True):
        kernels[k]["targets"][a]["blocks"] = blocks
    return kernels


@pytest.fixture(scope="module")
def kernels(tmp_path_factory) -> dict[str, dict]:
    found = measure(tmp_path_factory.mktemp("static"))
    TABLE.parent.mkdir(parents=True, exist_ok=True)
    TABLE.write_text(markdown(found))
    print("\n" + TABLE.read_text())
    return found


@pytest.fixture(scope="module")
def kept() -> dict[str, dict]:
    """The table, for its compiler alone: how it schedules, another one need not."""
    table = json.loads(RESOURCES.read_text())
    if toolkit.version(HOME) != table["nvcc"]:
        pytest.skip(f"the table was made by nvcc {table['nvcc']}, this is {toolkit.version(HOME)}")
    return table["kernels"]


def main_loop(function: Function) -> dict:
    turn = len(function.turn())
    return {"turn": turn, "padding": len(function.hot_path()) - turn, "share": round(function.share(), 3)}


def stage_loop(function: Function) -> dict:
    """Of a stage: a turn of the loop that brings weights and multiplies; without tensor cores the loop inside of it."""
    if not function.count("HMMA"):
        return {"stage_share": round(function.inner_share(), 3)}
    turn = function.longest_turn()
    return {"turn": len(turn), "stage_share": round(sum(i.name == "HMMA" for i in turn) / len(turn), 3)}


def markdown(kernels: dict[str, dict]) -> str:
    rows = [
        "| kernel | target | registers | spills | shared | threads | blocks an SM | turn | multiplying |",
        "|---|" * 1 + "---|" * 8,
    ]
    for name, kernel in kernels.items():
        for arch, t in kernel["targets"].items():
            rows.append(
                f"| {name} | sm_{arch} | {t['registers']} | {t['spills']} | {kernel['shared']} | {kernel['threads']} "
                f"| {t['blocks']} | {t.get('turn', '')} | {percent(t.get('share', t.get('stage_share')))} |"
            )
    return "\n".join([*rows, ""])


def percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def each(kernels: dict[str, dict]):
    for name, kernel in kernels.items():
        for arch, target in kernel["targets"].items():
            yield name, arch, kernel, target


def test_every_target_is_compiled(kernels):
    known = toolkit.known_archs(HOME)
    assert {tuple(map(int, kernel["targets"])) for kernel in kernels.values()} == {tuple(known)}
    COUNTS["compiled"] = f"{len(kernels)} kernels compiled for {len(known)} targets"
    if known != list(toolkit.ARCHS):
        pytest.skip(f"nvcc {toolkit.version(HOME)} knows no other targets than {known}")


def test_nothing_spills(kernels):
    assert not [(n, a) for n, a, _, t in each(kernels) if t["spills"] or t["stack"] or t["local"]]


def test_global_accesses_are_16_bytes_wide(kernels):
    wide = [(n, a, t) for n, a, _, t in each(kernels) if "share" in t]
    # The weight's gradient reads by asynchronous copies alone.
    assert not [(n, a) for n, a, t in wide if not (t["wide_stores"] and (t["wide_loads"] or "wgrad " in n))]
    assert all(t["wide_loads"] for n, _, _, t in each(kernels) if n.startswith(OVER_ROWS))
    assert not [(n, a) for n, a, t in wide if t["wide_copies"] == n.endswith("u")]
    # Codes and entries: a lane's 16 bytes of codes, entries and what is made of them in chunks of 16.
    coded = [(n, a, t) for n, a, _, t in each(kernels) if n.startswith(("dots", "decode<", "lookup<"))]
    assert not [(n, a) for n, a, t in coded if n.startswith("dots") and not t["wide_loads"]]
    assert not [(n, a) for n, a, t in coded if n.endswith("true>") and not (t["wide_loads"] and t["wide_stores"])]
    assert not [(n, a) for n, a, t in coded if re.match(r"decode<.*[84], false>", n) and not t["wide_stores"]]


@pytest.mark.usefixtures("kept")
def test_the_main_loop_multiplies(kernels):
    for name, arch, _, target in each(kernels):
        if name.endswith("u") or "share" not in target:
            continue  # gathers element by element: not for speed
        shares, least = BOUNDS.get(name.split()[0], (SHARES, LEAST_SHARE))
        math, tile = name.split()[-4:-2]
        assert target["share"] >= shares.get((math, tile), least[math]), (name, arch, target["share"])


@pytest.mark.usefixtures("kept")
def test_stages_multiply(kernels):
    """16 bits by the project's rule, copies of weights, waits and barriers among the instructions."""
    stages = [(name, arch, t["stage_share"]) for name, arch, _, t in each(kernels) if "stage_share" in t]
    assert len(stages) == 12 * len(toolkit.known_archs(HOME))
    for name, arch, share in stages:
        assert share >= STAGE_SHARES[name.split()[1]], (name, arch, share)


def test_blocks_fit_as_planned(kernels):
    """Registers never keep a multiprocessor from holding the blocks that are planned and fit its shared memory."""
    for name, arch, kernel, target in each(kernels):
        fit = (SHARED_KIB[int(arch)] << 10) // (kernel["shared"] + 1024)  # a KiB of each block is the system's
        assert target["blocks"] >= min(kernel["blocks"], fit), (name, arch, target["blocks"])


def test_resources_are_those_of_the_table(kernels, kept):
    assert kernels.keys() == kept.keys(), "rewrite the table by `python -m tests.gpu.proof_static` if this is meant"
    other = [
        f"{name} for sm_{arch}: {field} {now}, not {then}"
        for name, arch, _, target in each(kernels)
        for field, now in target.items()
        if not alike(arch, now, then := kept[name]["targets"].get(arch, {}).get(field))
    ]
    plans = [n for n in kernels if any(kernels[n][f] != kept[n][f] for f in ("threads", "shared", "blocks"))]
    assert not other and not plans, "rewrite the table by `python -m tests.gpu.proof_static` if this is meant"


def alike(arch: str, now: float, then: float | None) -> bool:
    if now == then or then is None or isinstance(now, bool) or arch not in UNSTEADY:
        return now == then
    return abs(now - then) <= APART * max(now, then)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        table = {"nvcc": toolkit.version(HOME), "kernels": measure(Path(folder))}
    RESOURCES.write_text(json.dumps(table, indent=1) + "\n")
    print(markdown(table["kernels"]), file=sys.stderr)


if __name__ == "__main__":
    main()
