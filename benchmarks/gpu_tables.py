"""The tables of docs/gpu.md that were measured on a GPU, made from benchmarks/results/gpu.json.

python -m benchmarks.gpu_tables                      on the terminal
python -m benchmarks.gpu_tables --into docs/gpu.md   between ``<!-- gpu -->`` and ``<!-- end of gpu -->``

``<!-- gpu layers -->`` is filled from gpu_layers.json: layers timed by hand, with the first build and with a later one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.results import FOLDER
from benchmarks.tables import fill, markdown
from effkern.training import write_atomically

RESULTS = FOLDER / "gpu.json"
LAYERS = FOLDER / "gpu_layers.json"
OURS, TWIN, WHOLE = "effkern", "effkern (triton)", "all: "
KINDS = ("cold_us", "warm_us")
NETWORKS = ("networks", "supernets")
Row = dict[str, Any]
NONE = "–"  # noqa: RUF001


def load(path: Path) -> Row:
    """Results so far; empty ones if there are none."""
    return json.loads(path.read_text()) if path.exists() else {"machine": {}, "rows": []}


def save(path: Path, results: Row) -> None:
    """All or nothing, a row a line."""
    head = json.dumps({key: value for key, value in results.items() if key != "rows"}, indent=1)[:-2]
    rows = ",\n".join(json.dumps(row, separators=(",", ":")) for row in results["rows"])
    write_atomically(path, f'{head},\n "rows": [\n{rows}\n]\n}}\n'.encode())


def time_of(times: Row | None, kind: str = "cold_us") -> float | None:
    """Of one contender: of this kind, or in its place the next best there is."""
    kinds = [kind, *(k for k in KINDS if k != kind)]
    return next((times[k] for k in kinds if k in times), None) if times else None


def best(row: Row, kind: str, whole: bool = False) -> tuple[str, float] | None:
    """The fastest of the peers in a graph, of those with ours' work or with all of it."""
    found = [
        (name, us)
        for name, times in row["times"].items()
        if OURS not in name and name.startswith(WHOLE) == whole and (us := time_of(times, kind)) is not None
    ]
    return min(found, key=lambda pair: pair[1], default=None)


def bound(row: Row, results: Row) -> float | None:
    """Microseconds that its bytes or its products need at what the card was measured to do."""
    ceilings = results["machine"].get("ceilings")
    if ceilings is None:
        return None
    dtype = "float16" if row["dtype"] == "triton" else row["dtype"]
    products = 2 * row["macs"] / ceilings[f"{dtype}_tflops"] / 1e6
    return max(products, row["bytes"] / ceilings["copy_gb_s"] / 1e3)


def ratio(row: Row, kind: str, whole: bool = False) -> float | None:
    """How many times as fast as the best peer."""
    ours, peer = time_of(row["times"].get(OURS), kind), best(row, kind, whole)
    return None if ours is None or peer is None else peer[1] / ours


def _us(value: float | None) -> str:
    return NONE if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _times(value: float | None) -> str:
    return NONE if value is None else f"{value:.2f}x" if value >= 1 else f"**{value:.2f}x**"


def _part(a: float | None, b: float | None) -> str:
    return NONE if a is None or b is None else f"{a / b:.0%}"


def _name(pair: tuple[str, float] | None) -> str:
    return NONE if pair is None else pair[0].removeprefix(WHOLE)


def _twin(row: Row, results: Row) -> str:
    """How many times as fast the Triton kernels are as the library's, out of L2."""
    found = [r for r in results["rows"] if r["case"] == row["case"] and r["dtype"] == "triton" and "times" in r]
    if not found or row["dtype"] != "float16":
        return NONE
    ours, twin = (time_of(found[0]["times"].get(name)) for name in (OURS, TWIN))
    return NONE if ours is None or twin is None else f"{ours / twin:.2f}x"


OP_HEADS = (
    "case", "cold us", "warm us", "bound", "of it", "best peer", "cold us", "as fast", "warm us", "as fast",
    "eager us", "peer's", "triton",
)  # fmt: skip


def op_row(row: Row, results: Row) -> list[str]:
    """An operator: ours, the bound, the best peer out of L2 and in it, calls from Python, the Triton kernels."""
    ours, peer = row["times"].get(OURS, {}), best(row, "cold_us")
    cold, limit = time_of(ours), bound(row, results)
    eager = row["times"][peer[0]].get("eager_us") if peer else None
    warm = best(row, "warm_us")
    return [
        row["case"], _us(ours.get("cold_us")), _us(ours.get("warm_us")), _us(limit),
        _part(limit, cold), _name(peer), _us(peer and peer[1]),
        _times(ratio(row, "cold_us")), _us(warm and warm[1]), _times(ratio(row, "warm_us")), _us(ours.get("eager_us")),
        _us(eager), _twin(row, results),
    ]  # fmt: skip


NETWORK_HEADS = ("case", "us", "best peer", "us", "as fast", "eager us", "peer's", "TFLOP/s", "triton")


def network_row(row: Row, results: Row) -> list[str]:
    """A network."""
    ours, peer = row["times"].get(OURS, {}), best(row, "warm_us")
    us, eager = time_of(ours, "warm_us"), row["times"][peer[0]].get("eager_us") if peer else None
    rate = None if us is None else 2 * row["macs"] / us / 1e6
    return [
        row["case"], _us(us), _name(peer), _us(peer and peer[1]), _times(ratio(row, "warm_us")),
        _us(ours.get("eager_us")), _us(eager), _us(rate), _twin(row, results),
    ]  # fmt: skip


LEFT_HEADS = ("case", "work left", "time left", "us", "all of it us", "best peer's all", "us", "as fast")


def left_row(row: Row, results: Row) -> list[str]:
    """What leaves work out: the time left of our own whole, and against the best peer that does it all."""
    kind = "warm_us" if row["family"] in NETWORKS else "cold_us"
    us, own = (time_of(row["times"].get(name), kind) for name in (OURS, WHOLE + OURS))
    peer = best(row, kind, whole=True)
    return [
        row["case"], f"{row['share']:.0%}", _part(us, own), _us(us), _us(own), _name(peer), _us(peer and peer[1]),
        _times(ratio(row, kind, whole=True)),
    ]  # fmt: skip


DTYPE_HEADS = ("case", "dtype", "us", "bound", "of it", "best peer", "us", "as fast")


def dtype_row(row: Row, results: Row) -> list[str]:
    """A core case in another dtype, out of L2."""
    us, peer, limit = time_of(row["times"].get(OURS)), best(row, "cold_us"), bound(row, results)
    cells = [_us(us), _us(limit), _part(limit, us), _name(peer), _us(peer and peer[1]), _times(ratio(row, "cold_us"))]
    return [row["case"], row["dtype"], *cells]


Made = Callable[[Row, Row], list[str]]


def tables(results: Row) -> list[tuple[str, Sequence[str], list[list[str]], int]]:
    """Title, heads, rows and how many columns are text at the left, of every table that has rows."""
    timed = [row for row in results["rows"] if "times" in row]
    half = [row for row in timed if row["dtype"] == "float16"]
    networks = [row for row in half if row["family"] in NETWORKS]
    small = [row for row in half if row["family"] not in NETWORKS]
    left = [row for row in half if row.get("share") is not None]
    other = [row for row in timed if row["dtype"] not in ("float16", "triton")]
    parts: list[tuple[str, Sequence[str], Made, list[Row], int]] = [
        ("Networks, fp16", NETWORK_HEADS, network_row, networks, 1),
        ("Work left and time left, fp16", LEFT_HEADS, left_row, left, 1),
        ("Operators, fp16", OP_HEADS, op_row, small, 1),
        ("Operators in other dtypes", DTYPE_HEADS, dtype_row, sorted(other, key=lambda row: row["case"]), 2),
    ]
    return [(title, heads, [make(r, results) for r in rows], n) for title, heads, make, rows, n in parts if rows]


def failures(results: Row) -> list[str]:
    """What has no time, and why."""
    found = [f"{row['case']} ({row['dtype']}): {row['error']}" for row in results["rows"] if "error" in row]
    for row in results["rows"]:
        for name, times in row.get("times", {}).items():
            if "error" in times:
                found.append(f"{row['case']} ({row['dtype']}), {name}: {times['error']}")
    return found


def summary(results: Row) -> str:
    """Where, with what, what the card does at best, and how often each side was the faster."""
    text, card = ["The machine and its ceilings are not known."], results["machine"]
    if card:
        most = card["ceilings"]
        rates = ", ".join(f"{name.removesuffix('_tflops')} {v:.0f}" for name, v in most.items() if name != "copy_gb_s")
        text = [
            f"{card['device']}, {card['multiprocessors']} multiprocessors, {card['l2_mb']:.0f} MB of L2, driver "
            f"{card['driver']}; torch {card['torch']}, cuDNN {card['cudnn']}, Triton {card['triton']}; "
            f"{results['date'][:10]}. Ceilings measured there: {most['copy_gb_s']:.0f} GB/s read and written by a "
            f"large copy; large matrix products, TFLOP/s: {rates}."
        ]
    timed = [row for row in results["rows"] if "times" in row and row["dtype"] != "triton"]
    for what, chosen in (
        ("Networks", [r for r in timed if r["family"] in NETWORKS]),
        ("Operators", [r for r in timed if r["family"] not in NETWORKS]),
    ):
        ratios = [x for r in chosen if (x := ratio(r, "cold_us")) is not None]
        if ratios:
            slower = sum(x < 1 for x in ratios)
            text.append(
                f"{what}: slower than the best peer in {slower} of {len(ratios)} cases, "
                f"{statistics.median(ratios):.2f} times as fast in the median."
            )
    return "\n".join(text) + "\n"


def section(results: Row) -> str:
    """All of it in Markdown."""
    if not results["rows"]:
        return "Nothing has been measured yet.\n"
    parts = [summary(results)]
    parts += [f"**{title}**\n\n{markdown(heads, rows, left)}" for title, heads, rows, left in tables(results)]
    missing = failures(results)
    if missing:
        parts.append("**Without a time**\n\n" + "".join(f"- {text}\n" for text in missing))
    return "\n".join(parts)


def layers(results: Row) -> str:
    """What was timed by hand; ``*``: the first time is of a graph of one call, so its replay is in it."""
    heads = ("layer, fp16", "first us", "now us", "PyTorch", "us", "as fast")
    rows = [
        [
            row["case"], _us(row["first_us"]) + "*" * row.get("first_single", False), _us(row["now_us"]), row["peer"],
            _us(row["peer_us"]), _times(row["peer_us"] / row["now_us"]),
        ]
        for row in results["rows"]
    ]  # fmt: skip
    return markdown(heads, rows, 1)


def terminal(results: Row) -> str:
    """All of it in aligned columns."""
    if not results["rows"]:
        return "nothing has been measured yet"
    text = [summary(results)]
    for title, heads, rows, _ in tables(results):
        cells = [list(heads), *rows]
        widths = [max(len(row[i]) for row in cells) for i in range(len(heads))]
        text += [
            title,
            *("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells),
            "",
        ]
    return "\n".join([*text, *failures(results)])


def main(argv: Sequence[str] | None = None) -> None:
    """Print, or fill files."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_tables")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--into", type=Path, nargs="+", metavar="FILE", help="Markdown files with the marked place")
    options = parser.parse_args(argv)
    results = load(options.results)
    if options.into is None:
        print(terminal(results))
        return
    write(options.into, results)


def write(paths: Iterable[Path], results: Row) -> None:
    """Fill files."""
    for path in paths:
        try:
            text = fill(path.read_text(), results, {"gpu": section, "gpu layers": lambda _: layers(load(LAYERS))})
        except ValueError as error:
            sys.exit(f"{path}: {error}")
        write_atomically(path, text.encode())
        print(path)


if __name__ == "__main__":
    main()
