"""The whole program with its real stages, small: what `make demo` runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from effkern.demo.runner import STAGES

ROOT = Path(__file__).resolve().parents[2]


def effkern_demo(out: Path, *options: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "effkern", "demo", "--quick", "--out", str(out), *options],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=600,
    )


@pytest.mark.slow
def test_every_stage_runs_reports_and_is_kept(tmp_path):
    done = effkern_demo(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert list(report["stages"]) == [stage.name for stage in STAGES] and report["failed"] == {}
    assert {row["stage"] for row in report["rows"]} == set(report["stages"])
    for row in report["rows"]:
        assert row["repetitions"] >= 10
        for key in ("params", "bytes_on_disk", "macs", "ms_b1", "ms_b64", "eager_ms_b1", "eager_ms_b64"):
            assert row[key] > 0, (row["name"], key)
        for key in ("ms_b1", "ms_b64", "eager_ms_b1", "eager_ms_b64"):
            assert row[f"{key}_min"] <= row[key], (row["name"], key)
        assert 0 <= row["top1"] <= 100 and row["disagreeing"] <= 0.01
    # Only the baseline and a network's own training form may leave effkern out.
    for stage in STAGES[1:]:
        assert any(not row["eager_only"] for row in report["rows"] if row["stage"] == stage.name)
    blocks = report["stages"]["block_skip"]["extra"]["blocks"]
    assert len(blocks["samples"]) > 0 and all(0 <= share <= 1 for share in blocks["usage"])
    page = (tmp_path / "report.html").read_text()
    assert "image by image" in page and "http" not in page

    again = effkern_demo(tmp_path)
    assert again.returncode == 0
    assert again.stdout.count("finished earlier, kept") == len(STAGES)
    assert json.loads((tmp_path / "report.json").read_text())["rows"] == report["rows"]
