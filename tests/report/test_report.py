"""The report says everything, says it honestly, and needs nothing but itself."""

from __future__ import annotations

import contextlib
import html.parser
import io
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from sample_report import row, sample_report

from effkern.report import load_report, page, plots, table, write_report
from effkern.training import CheckpointError

IMAGES = torch.randint(0, 256, (12, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(12) % 10


STAGE = {"title": "", "seconds": 1.0, "notes": [], "extra": {}}


class Page(html.parser.HTMLParser):
    """What a browser would see: tags with their attributes, and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A whole report on disk, drawn once, and what was printed meanwhile."""
    report, folder = sample_report(), tmp_path_factory.mktemp("report")
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert write_report(folder, report, IMAGES, LABELS) == folder / "report.html"
    return report, folder, out.getvalue()


def test_everything_is_written_and_the_json_holds_every_number(written):
    report, folder, out = written
    assert load_report(folder / "report.json") == json.loads(json.dumps(report))
    plotted = {
        "accuracy_time.png",
        "saved_work.png",
        "block_skip_usage.png",
        "block_skip_samples.png",
        "block_skip_curve1.png",
    }
    assert {file.name for file in folder.iterdir()} == {"report.json", "report.html", *plotted}
    for name in plotted:
        picture = Image.open(folder / name)
        assert picture.format == "PNG" and min(picture.size) > 200
        assert np.asarray(picture.convert("L")).std() > 5  # something is drawn on it
    assert "ResNet-20, 8 bits a code" in out and "loss: " in out


def test_report_has_what_a_reader_needs():
    report = sample_report()
    for key in ("cpu", "cores", "isa", "ram_gib", "os", "python", "torch", "effkern", "commit"):
        assert key in report["machine"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", report["date"])
    assert report["run"]["threads"] == 2 and report["format"] == 1 and report["machine"]["ram_gib"] > 0
    assert len(report["rows"]) == 10
    for one in report["rows"]:
        for key in ("top1", "params", "bytes_on_disk", "macs"):
            assert one[key] > 0
        for key in ("ms_b1", "ms_b64", "eager_ms_b1", "eager_ms_b64"):
            assert one[key] >= one[f"{key}_min"] > 0


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 99, "rows": []}', '{"format": 1}'])
def test_something_else_is_not_read_as_a_report(tmp_path, content):
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"report\.json"):
        load_report(tmp_path / "report.json")


def test_an_empty_run_still_has_a_page(tmp_path):
    write_report(tmp_path, sample_report(stages={}, failed={"baseline": "RuntimeError: no"}), IMAGES, LABELS)
    assert "baseline failed" in Page((tmp_path / "report.html").read_text()).text


# --- page ------------------------------------------------------------------------------------------------------------


def test_the_page_needs_nothing_else(written):
    text = (written[1] / "report.html").read_text()
    seen = Page(text)
    assert seen.open == []
    sources = [attributes["src"] for tag, attributes in seen.tags if tag == "img"]
    assert len(sources) == 5 and all(source.startswith("data:image/png;base64,iVBOR") for source in sources)
    assert not {"script", "link", "iframe"} & {tag for tag, _ in seen.tags}
    assert "http" not in text.replace("data:image", "") and "@import" not in text and "url(" not in text


def test_every_text_from_outside_is_escaped():
    evil = "<script>alert('&\"')</script>"
    report = sample_report(evil)
    report["classes"] = [evil] * 10
    report["machine"] = {key: evil for key in report["machine"]}
    report["failed"] = {evil: evil}
    report["run"]["data"]["source"] = report["date"] = evil
    for stage in report["stages"].values():
        stage |= {"title": evil, "notes": [evil]}
    for one in report["rows"]:
        one |= {"name": evil, "note": evil, "eager_form_b1": evil, "eager_form_b64": evil, "relative_to": evil}
    text = page.render(report, [(evil, evil, plots.block_usage([0.5]))])
    assert "<script" not in text and "alert('" not in text
    assert text.count("&lt;script&gt;") > 50
    assert Page(text).open == []


def test_the_page_shows_gains_and_losses_in_their_colours():
    text = page.render(sample_report(), [])
    assert "<span class=win>2.40x</span>" in text and "<span class=loss>0.80x</span>" in text
    assert "Where it loses" in text and "slower than eager PyTorch" in text
    assert "Codes are decoded." in text


def test_the_page_says_when_it_is_a_quick_run_or_other_data():
    report = sample_report("digits (scikit-learn)")
    for quick, words in ((False, "not Fashion-MNIST but digits"), (True, "mean nothing")):
        report["run"]["quick"] = quick
        (notice,) = re.findall("<p class=notice>(.*?)</p>", page.render(report, []))
        assert words in notice
    assert "<p class=notice>" not in page.render(sample_report(), [])


# --- table -----------------------------------------------------------------------------------------------------------


def test_terminal_table_is_aligned_and_leaves_minima_out_where_they_do_not_fit():
    rows = sample_report()["rows"]
    wide, narrow = table.terminal(rows), table.terminal(rows, 150)
    assert "1.000 (0.900)" in wide and "(0.900)" not in narrow
    for text in (wide, narrow):
        lines = [line for line in text.splitlines() if line.startswith("  ")]
        assert len({len(line) for line in lines}) == 1 and len(lines) == 2 + len(rows)
    assert [line for line in narrow.splitlines() if not line.startswith(" ")] == [
        "baseline",
        "rep_conv",
        "block_skip",
        "sliced_conv",
        "pq",
    ]


def test_markdown_has_as_many_cells_as_heads_and_escapes_bars():
    text = table.markdown([row("pq", "a|b", left=0.5)])
    head, rule, line = text.splitlines()
    assert head.count("|") == rule.count("|") == len(table.HEADS) + 1
    assert "a\\|b" in line and line.replace("\\|", "").count("|") == len(table.HEADS) + 1
    assert "0.667 (0.600)" in line and "1.50x" in line and "50 % | 55 % | 52 %" in line


@pytest.mark.parametrize(
    "text",
    [
        "",
        table.BEGIN,
        f"{table.END}\n{table.BEGIN}",
        f"{table.BEGIN}{table.BEGIN}{table.END}",
        f"{table.BEGIN}{table.END}{table.END}",
    ],
)
def test_a_place_that_is_not_marked_is_refused(text):
    with pytest.raises(ValueError, match="must hold the lines"):
        table.insert(text, "x")


def test_eager_rows_claim_no_gain():
    cells = dict(zip(table.HEADS, table.cells(row("baseline", "dense", eager_only=True)), strict=True))
    assert cells["b1 gain"] == cells["b64 gain"] == "–"  # noqa: RUF001


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (999, "999"), (1234, "1.23k"), (999_999, "1M"), (8_050_000, "8.05M"), (1.81e9, "1.81G")],
)
def test_amounts_have_three_digits(value, text):
    assert table.amount(value) == text


def test_every_loss_is_told():
    good = [row("baseline", "dense", eager_only=True, gain=1), row("rep_conv", "folded", gain=2.0)]
    assert table.losses(good) == []
    bad = row(
        "block_skip",
        "policy",
        gain=0.5,
        left=0.5,
        time_left_b1=0.9,
        time_left_b64=0.55,
        relative_to="all <blocks>",
        top1=90.0,
        disagreeing=0.01,
        ms_b64=0.4,
    )
    assert table.losses([*good, bad]) == [
        "policy: slower than eager PyTorch, 0.50x at batch 1 (nchw); "
        "50 % of the multiply-adds of all <blocks>, but 90 % of the time at batch 1; "
        "1.25 points less accurate than the baseline; other decisions than eager on 1.00 % of the images."
    ]


def test_a_busy_machine_is_told():
    assert table.unrest([]) is None and table.unrest(sample_report()["rows"]) is None
    busy = row("pq", "codes", ms_b64=3.0, ms_b64_min=1.5)
    warning = table.unrest([row("baseline", "dense"), busy])
    assert warning is not None and "the median time of codes is 2.0 times its minimum" in warning
    assert "not quiet" in page.render(sample_report(stages={"pq": {**STAGE, "rows": [busy]}}), [])


# --- plots -----------------------------------------------------------------------------------------------------------


def test_plots_are_repeatable_and_survive_dollars_and_extremes():
    rows = [row("pq", "cost: $5 $ \\frac", left=0.3, time_left_b1=1.7), row("new_stage", "other", ms_b1=1e-4)]
    first = plots.accuracy_versus_time(rows)
    assert first == plots.accuracy_versus_time(rows)
    assert Image.open(io.BytesIO(plots.saved_work(rows))).format == "PNG"
    assert plots.saved_work([row("pq", "codes")]) is None


def test_sample_pictures_follow_the_policy():
    samples = [{"index": 0, "predicted": 0, "keep": [1, 0, 1]}]
    every = [{"index": 0, "predicted": 0, "keep": [1, 1, 1]}]
    classes = [str(i) for i in range(10)]
    assert plots.who_used_what(samples, IMAGES, LABELS, classes) != plots.who_used_what(every, IMAGES, LABELS, classes)
    colour = torch.cat([IMAGES] * 3, 1)
    assert Image.open(io.BytesIO(plots.who_used_what(samples, colour, LABELS, classes))).format == "PNG"
