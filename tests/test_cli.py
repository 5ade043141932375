"""The command line: what it prints, what it returns, and that a user's mistake is one line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from effkern import cli

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "report"))
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def report(tmp_path):
    from sample_report import sample_report

    from effkern.training import save_json

    save_json(tmp_path / "report.json", sample_report())
    return tmp_path / "report.json"


def test_report_prints_the_table(report, capsys):
    assert cli.main(["report", "markdown", str(report)]) == 0
    markdown = capsys.readouterr().out
    assert markdown.startswith("| network |") and "| width 0.25 |" in markdown
    assert cli.main(["report", "table", str(report)]) == 0
    assert "width 0.25" in capsys.readouterr().out


def test_report_goes_into_a_readme_and_again(report, tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text("# Title\n\n<!-- demo table -->\nyesterday\n<!-- end of demo table -->\n\nafter\n")
    for _ in range(2):
        assert cli.main(["report", "markdown", str(report), "--into", str(readme)]) == 0
        text = readme.read_text()
        assert text.startswith("# Title\n\n<!-- demo table -->\n| network |") and "yesterday" not in text
        assert text.endswith("<!-- end of demo table -->\n\nafter\n")
        assert "`make demo` on A processor, 2 threads" in text and "Where it loses:\n\n- " in text
    readme.write_text("no marks")
    assert cli.main(["report", "markdown", str(report), "--into", str(readme)]) == 1
    assert readme.read_text() == "no marks" and "must hold the lines" in capsys.readouterr().err
    assert cli.main(["report", "table", str(report), "--into", str(readme)]) == 2


@pytest.mark.parametrize("content", [None, "{", '{"format": 1, "rows": [{"name": "x"}]}'])
def test_an_unusable_report_is_one_line(tmp_path, capsys, content):
    path = tmp_path / "report.json"
    if content is not None:
        path.write_text(content)
    assert cli.main(["report", "table", str(path)]) == 1
    said = capsys.readouterr()
    assert said.out == "" and len(said.err.splitlines()) == 1 and str(path) in said.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--stages", "pq,qp"], "effkern: demo: stages: must be among"),
        (["demo", "--threads", "-1"], "effkern: demo: threads: must be at least 0"),
    ],
)
def test_wrong_options_of_the_demo_are_one_line(arguments, message, capsys):
    assert cli.main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith(message) and len(said.splitlines()) == 1


@pytest.mark.parametrize("arguments", [[], ["train"], ["train", "x"], ["demo", "--seed", "x"], ["report", "pdf"]])
def test_unknown_words_are_refused_with_the_usage(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2 and "usage: effkern" in capsys.readouterr().err


def test_wrong_data_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("EFFKERN_DATA", str(tmp_path / "typo"))
    assert cli.main(["demo", "--out", str(tmp_path / "run")]) == 1
    said = capsys.readouterr().err
    assert said.startswith("effkern: demo: EFFKERN_DATA: must be a folder") and len(said.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert cli.main(["demo", "--quick", "--out", str(tmp_path / "file" / "run")]) == 1
    assert "effkern: demo: cannot write the run: " in capsys.readouterr().err


def test_bench_outside_a_checkout_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "site-packages" / "effkern" / "cli.py"))
    monkeypatch.chdir(tmp_path)
    assert cli.main(["bench", "--quick"]) == 1
    assert "source checkout" in capsys.readouterr().err


def test_bench_hands_its_options_on(tmp_path, capsys, monkeypatch):
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "__init__.py").write_text("")
    (tmp_path / "benchmarks" / "run_all.py").write_text("import sys\nprint('bench got', sys.argv[1:])\n")
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "effkern" / "cli.py"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", ["effkern"])
    for name in [name for name in sys.modules if name.split(".")[0] == "benchmarks"]:
        monkeypatch.delitem(sys.modules, name)
    assert cli.main(["bench", "--quick", "--only", "pq"]) == 0
    assert "bench got ['--quick', '--only', 'pq']" in capsys.readouterr().out
    sys.modules.pop("benchmarks", None)


def test_help_and_version(capsys):
    for option in ("--version", "--help"):
        with pytest.raises(SystemExit) as stop:
            cli.main([option])
        assert stop.value.code == 0
    said = capsys.readouterr().out
    assert said.startswith("effkern 0.") and all(command in said for command in ("demo", "info", "bench", "report"))


def test_info_as_a_program():
    done = subprocess.run(
        [sys.executable, "-m", "effkern", "info"], capture_output=True, text=True, env=ENVIRONMENT, timeout=120
    )
    assert done.returncode == 0 and "torch" in done.stdout


def test_ctrl_c_ends_the_demo_cleanly(tmp_path):
    """The signal a terminal sends, while the real program is at work."""
    process = subprocess.Popen(
        [sys.executable, "-m", "effkern", "demo", "--quick", "--threads", "1", "--out", str(tmp_path / "run")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        start_new_session=True,
        # A background job of a shell inherits an ignored SIGINT, and so would the demo.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if "baseline" in line:  # it has begun to train
                break
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    # A shell shows 130 for both: when the signal falls into an exec() of a string (dataclasses), CPython ends by the
    # signal itself although the exception was handled.
    assert process.returncode in (130, -signal.SIGINT)
    assert "Interrupted. Finished and kept: " in out and "The same command goes on with " in out
    assert "Traceback" not in out + err
