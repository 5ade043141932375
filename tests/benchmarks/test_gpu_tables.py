"""The tables of what a GPU was measured to do, from made-up results."""

from __future__ import annotations

import copy

import pytest

from benchmarks import gpu_tables
from benchmarks.tables import fill
from tests.native.package import CHECKOUT

CEILINGS = {"copy_gb_s": 1000.0, "float16_tflops": 100.0, "bfloat16_tflops": 100.0, "tf32_tflops": 50.0}
CARD = {"device": "a card", "multiprocessors": 100, "l2_mb": 50.0, "driver": "1.2", "cudnn": 9, "torch": "2.11.0"}
CARD |= {"triton": "3.6.0", "ceilings": CEILINGS}


def times(cold, warm, eager=20.0):
    return {"cold_us": cold, "cold_min_us": cold, "warm_us": warm, "warm_min_us": warm, "eager_us": eager}


def row(case, found, family="rep_conv", dtype="float16", **extra):
    return {"family": family, "case": case, "dtype": dtype, "macs": 1e9, "bytes": 5e6, "times": found, **extra}


RESULTS = {
    "machine": CARD,
    "date": "2026-01-02T03:04:05+00:00",
    "rows": [
        # 20 us of products at 100 TFLOP/s, 5 us of bytes at 1 TB/s.
        row("a layer", {"effkern": times(40.0, 30.0), "contiguous": times(80.0, 25.0), "compiled": times(60.0, 28.0)}),
        row("a layer", {"effkern": times(40.0, 30.0), "effkern (triton)": times(32.0, 31.0)}, dtype="triton"),
        row("a layer", {"effkern": times(50.0, 50.0), "contiguous": times(45.0, 45.0)}, dtype="tf32"),
        row(
            "half a net",
            {
                "effkern": {"warm_us": 60.0, "warm_min_us": 59.0, "eager_us": 100.0},
                "gathered": {"eager_us": 1.0},
                "loop effkern": {"warm_us": 1.0},
                "masked": {"error": "values differ: [2], by 0.5"},
                "loop": {"warm_us": 120.0, "eager_us": 130.0},
                "all: effkern": {"warm_us": 100.0},
                "all: channels_last": {"warm_us": 90.0},
            },
            family="networks",
            share=0.5,
        ),
        {"family": "", "case": "a broken one", "dtype": "bfloat16", "error": "its process ended"},
    ],
}


def cells(text, case):
    return [[c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith(f"| {case}")]


def test_the_tables_say_what_was_measured():
    text = gpu_tables.section(RESULTS)
    net, left = cells(text, "half a net")
    # A call without a graph is not held against one in a graph; our own loop is no peer.
    assert net == ["half a net", "60", "loop", "120", "2.00x", "100", "130", "33.3", "–"]  # noqa: RUF001
    assert left == ["half a net", "50%", "60%", "60", "100", "channels_last", "90", "1.50x"]
    half, tf32 = cells(text, "a layer")
    assert half[:8] == ["a layer", "40", "30", "20", "50%", "compiled", "60", "1.50x"]
    assert half[8:] == ["25", "**0.83x**", "20", "20", "1.25x"]
    assert tf32 == ["a layer", "tf32", "50", "40", "80%", "contiguous", "45", "**0.90x**"]
    assert "Operators: slower than the best peer in 1 of 2 cases, 1.20 times as fast in the median." in text
    assert "- half a net (float16), masked: values differ" in text and "- a broken one (bfloat16): its process" in text
    assert "a card, 100 multiprocessors" in text and "1000 GB/s" in text and "2026-01-02" in text
    assert "1.50x" in gpu_tables.terminal(RESULTS)


def test_a_machine_without_ceilings_has_no_bounds():
    results = copy.deepcopy(RESULTS) | {"machine": {}}
    assert cells(gpu_tables.section(results), "a layer")[0][3:5] == ["–", "–"]  # noqa: RUF001


def test_the_marked_place_is_filled(tmp_path):
    text = "a\n<!-- gpu -->\nas before\n<!-- end of gpu -->\nb\n"
    empty = gpu_tables.load(tmp_path / "none.json")
    sections = {"gpu": gpu_tables.section}
    assert "Nothing has been measured yet." in fill(text, empty, sections) and gpu_tables.terminal(empty)
    path, page = tmp_path / "gpu.json", tmp_path / "page.md"
    gpu_tables.save(path, RESULTS)
    page.write_text(text)
    gpu_tables.main(["--results", str(path), "--into", str(page)])
    assert gpu_tables.section(RESULTS) in page.read_text() and "as before" not in page.read_text()
    with pytest.raises(ValueError, match="<!-- gpu -->"):
        fill("nothing marked", RESULTS, sections)


def test_layers_timed_by_hand_say_which_first_time_holds_the_replay():
    row = {"first_us": 40.0, "now_us": 20.0, "peer": "torch"}
    rows = [{"case": "a", "peer_us": 30.0, **row}, {"case": "b", "first_single": True, "peer_us": 10.0, **row}]
    text = gpu_tables.layers({"rows": rows})
    assert cells(text, "a") == [["a", "40", "20", "torch", "30", "1.50x"]]
    assert cells(text, "b") == [["b", "40*", "20", "torch", "10", "**0.50x**"]]


def test_the_page_holds_what_the_results_say():
    page = (CHECKOUT / "docs" / "gpu.md").read_text()
    made = {"gpu": gpu_tables.section, "gpu layers": lambda _: gpu_tables.layers(gpu_tables.load(gpu_tables.LAYERS))}
    assert fill(page, gpu_tables.load(gpu_tables.RESULTS), made) == page
