"""All kernels in the harness under all schedules, and the harness and a part of them under sanitizers."""

from __future__ import annotations

from tests.gpu.counts import COUNTS
from tests.gpu.harness import build, run_tests
from tests.gpu.test_simt import SMOKE

EVERYTHING = (*SMOKE, "test_wgrad", "test_conv")


def test_every_kernel_under_every_schedule(tmp_path):
    runs = run_tests(build(tmp_path, EVERYTHING, "-O2"))
    assert runs >= 1000
    COUNTS["schedules"] = f"{runs} kernel runs, each under a schedule of its own"


def test_harness_and_kernels_under_sanitizers(tmp_path):
    program = build(tmp_path, SMOKE, "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    # A fault ends a launch with the other threads' stacks as they are; what those frames own is not given back.
    run_tests(program, ASAN_OPTIONS="detect_leaks=0")
