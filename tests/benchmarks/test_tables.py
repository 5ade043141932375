"""The target table from made-up results: ratios, peers, verdicts, losses; merging; the places it is written to."""

from __future__ import annotations

import pytest

from benchmarks import results, tables
from benchmarks.targets import lines, targets

MACHINE = {"cpu": "made up", "isa": "avx2", "cores": 2, "torch": "2", "effkern": "0", "commit": "c0ffee"}
RUN = {"machine": MACHINE, "date": "2026-01-02T03:04:05+00:00", "missing": {"ncnn": "not installed"}}


def contest(family, case, times, op="network", batch=1, threads=1, **extra):
    """Rows of one contest; ``times``: impl to (minimum, median)."""
    common = {"family": family, "op": op, "case": case, "batch": batch, "threads": threads, "dtype": "float32"}
    common |= {"layout": "contiguous", "gflops": 1.0, "correct_error": 1e-7}
    common |= {"peak_gflops_before": 100.0, "peak_gflops_after": 100.0, **extra}
    return [{**common, "impl": impl, "min_ms": low, "median_ms": mid} for impl, (low, mid) in times.items()]


def made(*contests):
    rows = [row for rows in contests for row in rows]
    return {"format": 1, "runs": {row["family"]: RUN for row in rows}, "rows": rows}


def line(res, beginning):
    (found,) = [line for line in lines(res) if line.target.work.startswith(beginning)]
    return found


A0 = {"effkern": (10, 11), "mnn": (16, 21), "ncnn": (17, 20), "eager_contiguous": (30, 32)}


def test_each_statistic_has_its_own_best_peer():
    found = line(made(contest("networks", "repvgg_a0", A0)), "RepVGG-A0 deployed, 224x224, batch 1, 1 thread")
    assert (found.minima.against, found.minima.value) == ("mnn", 1.6)
    assert (found.medians.against, found.medians.value) == ("ncnn", pytest.approx(20 / 11))
    assert found.verdict == "beyond"


@pytest.mark.parametrize(
    "times, verdict",
    [((16, 16), "beyond"), ((16, 14), "met"), ((13, 13), "met"), ((30, 12.9), "missed"), ((9, 9), "missed")],
)
def test_both_statistics_must_reach(times, verdict):
    res = made(contest("networks", "repvgg_a0", {"effkern": (10, 10), "mnn": times}))
    assert line(res, "RepVGG-A0 deployed, 224x224, batch 1, 1 thread").verdict == verdict


def test_a_line_may_be_about_some_peers_only():
    res = made(
        contest("networks", "repvgg_a0", A0),
        contest("cifar", "resnet32", {"effkern": (1, 1), "compile": (4, 4), "eager_contiguous": (6, 6), "mnn": (2, 2)}),
    )
    assert line(res, "RepVGG-A0 against PyTorch eager").minima.value == 3
    assert line(res, "ResNet-32 (CIFAR), dense, batch 1, 1 thread: best torch").minima.against == "compile"
    assert line(res, "ResNet-32 (CIFAR), dense, batch 1, 1 thread: best engine").minima.value == 2


def test_what_was_not_measured_is_said():
    found = lines(made())
    assert len(found) == len(list(targets())) and {each.verdict for each in found} == {"not measured"}
    alone = made(contest("networks", "repvgg_a0", {"mnn": (1, 1)}))
    assert line(alone, "RepVGG-A0 deployed, 224x224, batch 1, 1 thread").verdict == "not measured"
    assert "**not measured**" in tables.targets_section(alone)


def test_linearity_is_the_worst_excess():
    def at(keep, time_left, least):
        extra = {"keep": keep, "time_left": time_left, "min_time_left": least}
        case = f"resnet110 body, keep {keep:.2f}"
        return contest("block_skip", case, {"effkern": (1, 1)}, "skip_stage", 64, **extra)

    res = made(at(0.0, 0.01, 0.01), at(0.5, 0.54, 0.51), at(0.75, 0.76, 0.77), at(1.0, 1.3, 1.3))
    found = line(res, "skip linearity, ResNet-110, batch 64")
    assert found.medians.value == pytest.approx(0.04) and "keep 0.50" in found.medians.against
    assert found.minima.value == pytest.approx(0.02) and "keep 0.75" in found.minima.against
    assert found.verdict == "met"


def test_less_is_better_where_it_is():
    def ragged(ours):
        times = {"effkern": (ours, ours), "effkern, classes": (100, 100)}
        return line(
            made(contest("supernet", "ds_mobilenet", times, "ragged", 32)), "DS-Net MobileNetV1, mixed batch over"
        )

    assert [ragged(t).verdict for t in (101, 104, 106)] == ["beyond", "met", "missed"]


def test_a_group_has_the_geometric_mean_and_names_its_worst():
    def layer(case, peer):
        return contest("rep_conv", case, {"effkern": (1, 1), "ncnn": (peer, peer)}, "rep_conv2d", group="3x3 stride 1")

    found = line(
        made(layer("a", 4), layer("b", 1)), "3x3 stride 1 layers, 48 channels or more, maps of 14 or more, batch 1"
    )
    assert found.minima.value == pytest.approx(2) and "worst 1.00x b (ncnn)" in found.minima.against


def test_ours_may_come_in_two_layouts():
    times = {
        "effkern_contiguous": (4, 6),
        "effkern_channels_last": (5, 5),
        "eager_contiguous": (20, 20),
        "compile_x": (1, 1),
    }
    res = made(contest("multi_branch_bn", "48@56_3_branches_forward", times))
    found = line(res, "multi-branch BN-add-ReLU, 3 branches, forward:")
    assert (found.minima.value, found.medians.value) == pytest.approx((5, 4))
    assert "| 0.25x | 0.20x | compile_x |" in tables.losses_section(res)


def test_scaling_is_the_worst_network_and_memory_is_resident():
    def scaling(case, two):
        return contest("networks", case, {"effkern": (10, 10), "effkern, 2 threads": (two, two)}, "scaling", 8)

    memory = contest("pq", "resnet50", {"dense": (None, None), "effkern": (None, None)}, "resident_memory")
    memory[0]["resident_bytes"], memory[1]["resident_bytes"] = 1600, 100
    res = made(scaling("resnet50", 5.0), scaling("mobilenet_v2", 6.25), memory)
    assert line(res, "two threads over one, whole networks, batch 8").minima.value == 1.6
    assert line(res, "memory of ResNet-50's weights").minima.value == 16


def test_losses_are_listed_as_losses():
    lost = contest("rep_conv", "slow layer", {"effkern": (4, 4), "ncnn": (2, 3), "mnn": (3, 2)}, "rep_conv2d")
    text = tables.losses_section(made(contest("networks", "repvgg_a0", A0), lost))
    assert "| rep_conv | rep_conv2d slow layer | 1 | 1 | 0.50x | 0.50x | ncnn / mnn |" in text
    assert "repvgg_a0" not in text
    assert tables.losses_section(made(contest("networks", "repvgg_a0", A0))) == "No contest was lost.\n"


def test_the_reading_names_what_was_missed_worst_first():
    slow = {"effkern": (20, 20), "mnn": (16, 16)}
    res = made(contest("networks", "repvgg_a0", A0), contest("networks", "resnet50", slow))
    res["rows"] += contest("networks", "mobilenet_v2", {"effkern": (10, 10), "mnn": (10, 10)})
    text = tables.reading_section(res)
    missed = [part for part in text.splitlines() if "Missed" in part]
    assert "ResNet-50" in missed[0] and "0.80x by minima" in missed[0] and "MobileNetV2" in missed[1]
    assert "Beyond: RepVGG-A0 deployed, 224x224, batch 1, 1 thread" in text


def test_every_section_is_made_of_any_results():
    res = made(contest("networks", "repvgg_a0", A0), contest("rep_conv", "l", A0, "rep_conv2d"))
    for section in tables.SECTIONS.values():
        assert section(res).endswith("\n") and section(results.load(results.FOLDER / "no such file"))
    assert "10 (11)" in tables.networks_section(res) and "16.000 mnn" in tables.layers_section(res)
    assert "not installed" in tables.missing_section(res) and "made up" in tables.terminal(res)


def test_a_file_is_filled_between_its_marks(tmp_path, capsys):
    file, text = tmp_path / "cpu.json", tmp_path / "page.md"
    results.save(file, made(contest("networks", "repvgg_a0", A0)))
    text.write_text("before\n<!-- targets -->\nold\n<!-- end of targets -->\nafter\n")
    for _ in range(2):
        tables.main(["--results", str(file), "--into", str(text)])
    filled = text.read_text()
    assert filled.startswith("before\n<!-- targets -->\n| work |") and filled.endswith(
        "<!-- end of targets -->\nafter\n"
    )
    assert "old" not in filled and filled.count("RepVGG-A0 deployed, 224x224, batch 1, 1 thread") == 1


@pytest.mark.parametrize("text", ["", "<!-- targets -->", "<!-- end of targets --><!-- targets -->"])
def test_a_file_without_a_place_is_refused_and_left(text, tmp_path):
    file = tmp_path / "page.md"
    file.write_text(text)
    with pytest.raises(SystemExit, match=r"page\.md"):
        tables.main(["--results", str(tmp_path / "none.json"), "--into", str(file)])
    assert file.read_text() == text


def test_results_survive_a_round_trip_and_rubbish_is_refused(tmp_path):
    file, res = tmp_path / "r.json", made(contest("networks", "repvgg_a0", A0))
    results.save(file, res)
    assert results.load(file) == res
    for text in ("{", "[]", '{"format": 99, "runs": {}, "rows": []}'):
        file.write_text(text)
        with pytest.raises(results.ResultsError, match=r"r\.json"):
            results.load(file)


def test_rows_of_two_machines_do_not_mix():
    res = made(contest("networks", "repvgg_a0", A0))
    other = {**RUN, "machine": {**MACHINE, "cpu": "another"}}
    with pytest.raises(results.ResultsError, match=r"another.*--out"):
        results.merge(res, "pq", other, [])
    assert results.merge(res, "networks", other, [])["rows"] == []


def test_the_documents_have_their_places():
    root = results.FOLDER.parents[1]
    assert "<!-- headline -->" in (root / "README.md").read_text()
    page = (root / "docs" / "performance.md").read_text()
    assert all(f"<!-- {name} -->" in page for name in ("targets", "reading", "networks", "layers", "losses", "missing"))
