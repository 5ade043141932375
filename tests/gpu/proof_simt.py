"""All kernels in the harness under all schedules, and the harness and a part of them under sanitizers."""

from __future__ import annotations

import os
import re
import subprocess

from tests.gpu.harness import build
from tests.gpu.test_simt import SMOKE

EVERYTHING = (*SMOKE, "test_wgrad", "test_conv")


def test_every_kernel_under_every_schedule(tmp_path):
    program = build(tmp_path, EVERYTHING, "-O2")
    run = subprocess.run([program], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert ", 0 failed checks" in run.stdout
    print(run.stdout)
    schedules = re.search(r"(\d+) kernel runs", run.stdout)
    assert schedules and int(schedules[1]) >= 1000


def test_harness_and_kernels_under_sanitizers(tmp_path):
    flags = ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    program = build(tmp_path, SMOKE, *flags)
    # A fault ends a launch with the other threads' stacks as they are; what those frames own is not given back.
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0"}
    run = subprocess.run([program], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stdout + run.stderr
