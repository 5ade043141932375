"""Experiments in their smoke-test form, and the machinery under them: pieces done once, pages made from results."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace

import pytest

from effkern.recipes import blockdrop, dsnet, stochastic_depth
from effkern.training import load_config
from experiments.common import ROOT, Experiment, Piece, main, spread, table

NAMES = ("blockdrop", "dsnet", "stochastic_depth")
RECIPES = {"blockdrop": blockdrop, "dsnet": dsnet, "stochastic_depth": stochastic_depth}
CALLS: list[str] = []


def pieces(quick: bool) -> list[Piece]:
    def make(name, value):
        return lambda context, before: (CALLS.append(name), {"value": value, "before": sorted(before)})[1]

    return [Piece("first", [1], make("first", 1)), Piece("second", {"a": (2, 3)}, make("second", 2))]


TOY = Experiment(
    "toy",
    "A toy",
    "digits",
    pieces,
    lambda made: {"best": max(one["value"] for one in made.values())} if made else {},
    lambda results: (
        table(["piece", "value"], [[n, p["result"]["value"]] for n, p in results["pieces"].items()]),
        {"p.png": b"x"},
    ),
)


@pytest.fixture
def run(tmp_path):
    CALLS.clear()
    return lambda *more, experiment=TOY: main(
        experiment, ["--quick", "--out", str(tmp_path), "--runs", str(tmp_path / "r"), *more]
    )


def test_a_piece_is_done_once(run, tmp_path):
    assert run("--only", "fir") == 0
    assert run() == 0 and CALLS == ["first", "second"]
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["best"] == 2 and results["quick"] and results["pieces"]["second"]["result"]["before"] == ["first"]
    assert "| second | 2 |" in (tmp_path / "README.md").read_text() and (tmp_path / "p.png").read_bytes() == b"x"


def test_a_name_is_not_the_beginning_of_another(run):
    two = lambda quick: [pieces(quick)[0], replace(pieces(quick)[0], name="first one"), pieces(quick)[1]]  # noqa: E731
    experiment = replace(TOY, pieces=two)
    assert run("--only", "first", experiment=experiment) == 0 and CALLS == ["first"]
    assert run("--only", "fir", experiment=experiment) == 0 and CALLS == ["first", "first"]


def test_a_piece_with_other_settings_is_done_again(run):
    run()
    changed = lambda quick: [pieces(quick)[0], replace(pieces(quick)[1], settings={"a": (2, 4)})]  # noqa: E731
    assert run(experiment=replace(TOY, pieces=changed)) == 0
    assert CALLS == ["first", "second", "second"]


@pytest.mark.parametrize(("images", "done"), [("digits", ["first"]), ("fashion-mnist", ["second"])])
def test_pieces_of_other_images_are_left_out(images, done, tmp_path):
    CALLS.clear()
    named = lambda quick: [pieces(quick)[0], replace(pieces(quick)[1], images="fashion-mnist")]  # noqa: E731
    arguments = ["--data", images, "--out", str(tmp_path), "--runs", str(tmp_path / "r")]
    assert main(replace(TOY, pieces=named), arguments) == 0 and done == CALLS


def test_what_was_done_before_a_failure_is_kept(run, capsys):
    def broken(context, before):
        raise ValueError("no room")

    late = lambda quick: [*pieces(quick), Piece("third", [], broken)]  # noqa: E731
    assert run(experiment=replace(TOY, pieces=late)) == 1
    assert capsys.readouterr().err == "experiments: toy: no room\n"
    assert run() == 0 and CALLS == ["first", "second"]


def test_the_page_alone_can_be_made_again(run, tmp_path):
    run()
    page = (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").unlink()
    assert run("--render") == 0 and (tmp_path / "README.md").read_text() == page and CALLS == ["first", "second"]


def test_the_plan_says_what_is_to_do(run, capsys):
    run("--only", "first")
    run("--plan")
    said = capsys.readouterr().out
    assert "second" in said and said.count("to do") == 1 and CALLS == ["first"]


def test_cells():
    assert spread([1.0, 2.0]) == "1.50 ± 0.71" and spread([1.0]) == "1.00" and spread([]) == "-"
    assert table(["a", "b"], [["x", None], ["y", 0.125]]).splitlines() == [
        "| a | b |",
        "| :-- | --: |",
        "| x | - |",
        "| y | 0.12 |",
    ]


@pytest.mark.parametrize("name", NAMES)
def test_configurations_are_of_their_recipes_and_names_are_unique(name):
    module = importlib.import_module(f"experiments.{name}")
    files = sorted((ROOT / "docs" / "experiments" / name).glob("*.toml"))
    assert files
    for file in files:
        recipe = stochastic_depth if file.stem == "dense" else RECIPES[name]
        load_config(recipe.Config, file)
    for quick in (True, False):
        found = module.pieces(quick)
        assert len({piece.name for piece in found}) == len(found)
        json.dumps([piece.settings for piece in found])


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_smoke(name, tmp_path):
    """All of it on digits with tiny networks, and a second start that finds everything done."""
    experiment = importlib.import_module(f"experiments.{name}").EXPERIMENT
    arguments = ["--quick", "--out", str(tmp_path / "out"), "--runs", str(tmp_path / "runs")]
    assert main(experiment, arguments) == 0
    file = tmp_path / "out" / "results.json"
    results = json.loads(file.read_text())
    assert len(results["pieces"]) == len(experiment.pieces(True))
    if name == "blockdrop":
        assert set(results["blockdrop"]) == set(results["dense"]) == {"top1", "blocks_used", "macs_left", "time_left"}
        assert set(results["blockdrop"]["time_left"]) == {"batch1", "batch8"}
    elif name == "dsnet":
        assert {"top1", "gate_diversity"} <= set(results["sgs"]) and {"top1", "gate_diversity"} <= set(
            results["gumbel"]
        )
        assert all(len(row["top1_by_width"]) in (1, 3) for row in results["widths"])
    else:
        assert {row["form"].split()[0] for row in results["step_time"]} == {"dense", "batch", "row", "subset", "masked"}
    page = (tmp_path / "out" / "README.md").read_text()
    for line in page.splitlines():
        if line.startswith("!["):
            assert (tmp_path / "out" / line[line.index("(") + 1 : -1]).read_bytes()[:4] == b"\x89PNG"
    before = file.read_bytes()
    assert main(experiment, arguments) == 0 and file.read_bytes() == before
