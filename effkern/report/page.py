"""The page: one HTML file that needs nothing else, not even a network."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from . import plots
from .table import HEADS, LEGEND, cells, gain, losses, unrest

__all__ = ["render"]

STYLE = """
:root { --ink: #1d2430; --soft: #5b6472; --line: #dfe3e8; --tint: #f6f7f9; --win: #0a7a4f; --loss: #b3261e; }
* { box-sizing: border-box; }
body { margin: 0; color: var(--ink); background: #fff; font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto,
  "Helvetica Neue", Arial, "DejaVu Sans", sans-serif; }
main { max-width: 1400px; margin: 0 auto; padding: 28px 24px 64px; }
h1 { font-size: 27px; margin: 0 0 4px; letter-spacing: -.01em; }
h2 { font-size: 19px; margin: 38px 0 8px; }
p { margin: 6px 0; max-width: 120ch; }
.soft, figcaption, footer { color: var(--soft); font-size: 13px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: 5px 8px; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { font-weight: 600; color: var(--soft); border-bottom: 2px solid var(--line); vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; white-space: normal; min-width: 190px; }
tr.stage td { background: var(--tint); font-weight: 600; text-align: left; }
tr.stage span { font-weight: 400; color: var(--soft); }
td small { color: var(--soft); display: block; font-size: 11px; line-height: 1.2; white-space: normal; }
.win { color: var(--win); font-weight: 600; } .loss { color: var(--loss); font-weight: 600; }
.notice { border-left: 4px solid var(--loss); background: #fdf3f2; padding: 8px 14px; margin: 14px 0; }
ul { margin: 6px 0; padding-left: 20px; max-width: 130ch; } li { margin: 3px 0; }
figure { margin: 14px 0 22px; } img { max-width: 100%; height: auto; display: block; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 18px; font-size: 13px; margin: 8px 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
"""


def render(report: Mapping[str, Any], pictures: Sequence[tuple[str, str, bytes]]) -> str:
    """The whole page.

    Args:
        report: what ``report.json`` holds.
        pictures: ``(title, caption, PNG)`` in order.
    """
    run, rows = report["run"], report["rows"]
    data = run["data"]
    parts = [
        f"<h1>effkern demo: {escape(data['name'])}</h1>",
        f"<p class=soft>{escape(report['date'])} · effkern {escape(report['machine']['effkern'])} · "
        f"{escape(report['machine']['cpu'])}, {run['threads']} threads · {data['train']:,} images to train on, "
        f"{data['val']:,} held out, {data['test']:,} to test</p>",
        *_notices(report),
        _table(rows, report["stages"]),
        f"<p class=soft>{escape(LEGEND)}</p>",
        "<h2>Where it loses</h2>",
        _list(losses(rows))
        or "<p>Nowhere in this run: no row is slower than eager PyTorch, less accurate than the "
        "baseline by more than half a point, or saves clearly more work than time.</p>",
    ]
    for title, caption, png in pictures:
        parts.append(f"<h2>{escape(title)}</h2>{_picture(title, caption, png)}")
    parts += [_stage_notes(report["stages"], rows), _facts(report)]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>effkern demo: {escape(data['name'])}</title><style>{STYLE}</style></head>\n<body><main>\n"
        + "\n".join(part for part in parts if part)
        + "\n</main></body></html>\n"
    )


def _notices(report: Mapping[str, Any]) -> Iterable[str]:
    if report["run"]["quick"]:
        yield _notice(
            "A quick run: tiny networks and few steps. It shows that everything works; the numbers mean nothing."
        )
    elif report["run"]["data"]["name"] != "Fashion-MNIST":
        yield _notice(f"This is not Fashion-MNIST but {report['run']['data']['name']}: Fashion-MNIST could not be had.")
    if warning := unrest(report["rows"]):
        yield _notice(warning)
    for name, reason in report["failed"].items():
        yield _notice(f"{name} failed and has no rows: {reason}")


def _notice(text: str) -> str:
    return f"<p class=notice>{escape(text)}</p>"


def _table(rows: Sequence[Mapping[str, Any]], stages: Mapping[str, Any]) -> str:
    out = [
        "<div class=scroll><table><thead><tr>",
        *(f"<th>{escape(head)}</th>" for head in HEADS),
        "</tr></thead><tbody>",
    ]
    stage = None
    for row in rows:
        if row["stage"] != stage:
            stage = row["stage"]
            title = stages[stage]["title"]
            out.append(
                f"<tr class=stage><td colspan={len(HEADS)}>{escape(stage)} <span>{escape(title)}</span></td></tr>"
            )
        out.append("<tr>" + "".join(_cells(row)) + "</tr>")
    out.append("</tbody></table></div>")
    return "".join(out)


def _cells(row: Mapping[str, Any]) -> Iterable[str]:
    for head, text in zip(HEADS, cells(row), strict=True):
        shown = escape(text)
        if head.endswith("gain") and not row["eager_only"]:
            shown = f"<span class={'win' if gain(row, head.split()[0]) >= 1 else 'loss'}>{shown}</span>"
        elif shown.endswith(")") and head.endswith(("ms", "eager")):
            median, minimum = shown[:-1].split(" (")
            form = f"<small>{escape(row[f'eager_form_{head.split()[0]}'])}</small>" if head.endswith("eager") else ""
            shown = f"{median}<small>{minimum}</small>{form}"
        yield f"<td>{shown}</td>"


def _picture(title: str, caption: str, png: bytes) -> str:
    data = base64.b64encode(png).decode()
    width = int.from_bytes(png[16:20], "big") * 96 // plots.DPI  # bytes 16 to 19 of every PNG; shown at its real size
    return (
        f'<figure><img alt="{escape(title)}" width={width} src="data:image/png;base64,{data}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _list(sentences: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(sentence)}</li>' for sentence in sentences)}</ul>" if sentences else ""


def _stage_notes(stages: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    sentences = [f"{row['name']}: {row['note']}" for row in rows if row["note"]]
    sentences += [note for stage in stages.values() for note in stage["notes"]]
    return f"<h2>Notes</h2>{_list(sentences)}" if sentences else ""


def _facts(report: Mapping[str, Any]) -> str:
    run = report["run"]
    facts = {
        **report["machine"],
        "threads": run["threads"],
        "data": f"{run['data']['name']}, {run['data']['source']}",
        "seed": run["seed"],
        "date": report["date"],
        **{f"{name}, s": stage["seconds"] for name, stage in report["stages"].items()},
    }
    listed = "".join(f"<dt>{escape(str(key))}</dt><dd>{escape(str(value))}</dd>" for key, value in facts.items())
    return f"<h2>Machine and run</h2><dl>{listed}</dl>"
