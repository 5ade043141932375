"""What runs the tests on a GPU: processes that die or hang cost one test each, and everything is told."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from tests.gpu import pool
from tests.gpu.check import arguments, summary
from tests.gpu.pool import Pool, Result
from tests.native.package import CHECKOUT, python

DEADLY = """
import os, signal, time
import pytest, torch

@pytest.mark.parametrize("key", ["conv/right", "conv/wrong", "skip/right"])
def test_values(key):
    assert key.endswith("right"), "the values differ"

@pytest.mark.skip(reason="there is one device")
def test_skipped():
    pass

def test_segments():
    os.kill(os.getpid(), signal.SIGSEGV)

def test_errors_of_the_device_that_come_late():
    def synchronize():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    torch.cuda.is_initialized, torch.cuda.synchronize = lambda: True, synchronize

def test_after():
    pass
"""


def check(path: Path, source: str, *options: str) -> tuple[int, list[str], str]:
    """Exit status, what was printed and what is in the report."""
    file, report = path / "test_fake.py", path / "report"
    file.write_text(source)
    command = ("-m", "tests.gpu.check", "--jobs", "1", "--report", str(report), *options, str(file))
    run = python(*command, path=CHECKOUT, cwd=CHECKOUT, EFFKERN_CHECK_DEVICE="cpu")
    assert not run.stderr, run.stderr
    return run.returncode, run.stdout.splitlines(), report.read_text() if report.exists() else ""


def test_a_process_that_dies_is_one_failed_test(tmp_path):
    status, said, report = check(tmp_path, DEADLY, "--test-limit", "600")
    assert status == 1
    assert {"conv: 1 failed, 1 passed", "skip: 1 passed", "test_after: 1 passed"} <= set(said)
    assert "FAILED test_fake.py::test_values[conv/wrong]: AssertionError: the values differ" in said
    assert "DIED test_fake.py::test_segments: exit status -11 (died)" in said
    assert any(line.startswith("DIED test_fake.py::test_errors_of_the_device_that_come_late: RuntimeError: CUDA error")
               for line in said)  # fmt: skip
    assert "2 died, 1 failed, 3 passed, 1 skipped" in said
    assert "Segmentation fault" in report and "there_is_one" not in report


def test_what_hangs_is_ended_and_tells_where_it_was(tmp_path):
    source = "import time\ndef test_forever():\n    time.sleep(1000)"
    status, said, report = check(tmp_path, source, "--test-limit", "1")
    assert status == 1 and "1 hung" in said
    assert "in test_forever" in report


def test_files_that_cannot_be_read_are_told(tmp_path):
    status, said, _ = check(tmp_path, "import there_is_no_such_module")
    assert status == 1 and any("No module named 'there_is_no_such_module'" in line for line in said)


class Fake:
    """A process that answers as it is told, by the name of the test."""

    names = ("f.py::a[x/1]", "f.py::a[x/2]", "f.py::a[x/3]", "f.py::a[x/4]", "f.py::a[y/1]")
    answers: dict[str, object]
    started = 0

    def __init__(self, files: object) -> None:
        self.connection, self.name = self, ""
        Fake.started += 1

    def send(self, name: str) -> None:
        self.name = name

    def answer(self, seconds: float) -> object:
        said = Fake.answers.get(self.name, list(self.names) if not self.name else ("passed", "", 0.0, True))
        if isinstance(said, type):
            raise said
        return said

    def end(self, patience: float = 0.0) -> str:
        return "it ended"


def outcomes(monkeypatch, answers: dict[str, object], limit: float = math.inf, only: str = "") -> list[str]:
    monkeypatch.setattr(pool, "Process", Fake)
    Fake.answers, Fake.started = answers, 0
    results = Pool(["f.py"], 1, 1.0, limit, lambda name: only in name, lambda result: None).run()
    return [f"{r.name[-4:-1]} {r.outcome}" for r in results]


def test_the_rest_goes_on_in_another_process(monkeypatch):
    found = outcomes(monkeypatch, {"f.py::a[x/2]": EOFError, "f.py::a[x/3]": ("failed", "CUDA error", 1.0, False)})
    assert found == ["x/1 passed", "x/2 died", "x/3 died", "x/4 passed", "y/1 passed"]
    assert Fake.started == 3


def test_three_of_a_kind_that_die_are_enough(monkeypatch):
    found = outcomes(monkeypatch, {name: TimeoutError for name in Fake.names})
    assert found == ["x/1 hung", "x/2 hung", "x/3 hung", "x/4 not run", "y/1 hung"]


def test_what_is_left_when_the_time_is_over_was_not_run(monkeypatch):
    assert outcomes(monkeypatch, {}, limit=-1.0) == [f"{name[-4:-1]} not run" for name in Fake.names]


def test_only_what_is_asked_for_is_run(monkeypatch):
    assert outcomes(monkeypatch, {}, only="[y/") == ["y/1 passed"]
    wanted = arguments(["--only", "a", "b"])
    assert (wanted.only, wanted.limit) == (["a", "b"], math.inf)


def test_without_a_process_nothing_is_said_to_be_right(monkeypatch):
    with pytest.raises(RuntimeError, match="could not be started: it ended"):
        outcomes(monkeypatch, {"": EOFError})


def test_the_summary_counts_by_op():
    results = [Result("d/f.py::a[x/1-float16]", "passed", "", 2.0), Result("d/f.py::a[x/2]", "died", "one\nlast"),
               Result("d/f.py::b", "not run")]  # fmt: skip
    assert summary(results) == [
        "b: 1 not run", "x: 1 died, 1 passed", "DIED f.py::a[x/2]: last",
        "slowest: f.py::a[x/1-float16] 2.0 s, f.py::a[x/2] 0.0 s, f.py::b 0.0 s",
        "1 died, 1 not run, 1 passed",
    ]  # fmt: skip
    assert summary([])[-1] == "no test has such a name"


def test_the_tests_themselves_run_on_the_cpu():
    """A few of each file: what is wrong in them is better found here than on a GPU."""
    some = ("pq_decode/decode-", "pq_decode/4096 columns-1-", "test_decoding_over", "[pq-torch.float32-nchw]")
    command = ("-m", "tests.gpu.check", "--jobs", "1", "--test-limit", "600", "--only", *some, "--skip", "twins")
    run = python(*command, path=CHECKOUT, cwd=CHECKOUT, EFFKERN_CHECK_DEVICE="cpu", OMP_NUM_THREADS="1")
    lines = run.stdout.splitlines()
    assert run.returncode == 0 and not run.stderr, run.stdout + run.stderr
    assert "test_networks: 1 passed" in lines and "test_decoding_over_2_31: 1 passed" in lines
    run = python("-m", "tests.gpu.sanitize", "pq_decode", path=CHECKOUT, cwd=CHECKOUT, EFFKERN_CHECK_DEVICE="cpu")
    assert run.returncode == 0 and "4 calls" in run.stdout, run.stderr
