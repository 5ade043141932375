"""The pybind11 module: k-means steps, packing of codes, instruction-set switch, peak timer."""

import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

from effkern import _host
from effkern.ops import pq_linear


def test_assign_finds_the_nearest_row():
    rng = np.random.default_rng(0)
    for n, k, d in ((1, 1, 1), (50, 3, 2), (700, 33, 9), (3000, 256, 5)):
        x, book = rng.standard_normal((n, d), np.float32), rng.standard_normal((k, d), np.float32)
        codes, distance = _host.assign(x, book)
        exact = ((x[:, None].astype(np.float64) - book[None]) ** 2).sum(-1)
        assert codes.dtype == np.int64 and distance.dtype == np.float32
        # fp32 may prefer another row only if the two are equally near up to rounding.
        chosen = exact[np.arange(n), codes]
        assert (chosen <= exact.min(1) + 1e-6 * (1 + exact.max(1))).all()
        np.testing.assert_allclose(distance, chosen, rtol=1e-5, atol=1e-6)


def test_assign_takes_the_lowest_of_equal_rows():
    book = np.zeros((40, 3), np.float32)
    assert (_host.assign(np.ones((5, 3), np.float32), book)[0] == 0).all()


def test_assign_does_not_depend_on_threads():
    rng = np.random.default_rng(1)
    x, book = rng.standard_normal((5001, 4), np.float32), rng.standard_normal((20, 4), np.float32)
    for a, b in zip(_host.assign(x, book, threads=1), _host.assign(x, book, threads=3), strict=True):
        assert (a == b).all()


def test_assign_does_alone_what_no_thread_can_be_started_for():
    """In a process of its own, whose address space has room for two more stacks."""
    program = """
import resource
import numpy as np
import effkern
from effkern import _host
x, book = np.random.default_rng(0).standard_normal((66000, 2), np.float32), np.eye(2, dtype=np.float32)
alone = _host.assign(x, book, 1)
pages = int(open("/proc/self/statm").read().split()[0])
room = pages * resource.getpagesize() + (20 << 20)
resource.setrlimit(resource.RLIMIT_STACK, (8 << 20, resource.getrlimit(resource.RLIMIT_STACK)[1]))
resource.setrlimit(resource.RLIMIT_AS, (room, resource.getrlimit(resource.RLIMIT_AS)[1]))
crowded = _host.assign(x, book, 64)
assert all(np.array_equal(a, b) for a, b in zip(alone, crowded))
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_update_averages_in_double_and_counts():
    x = np.array([[1e8, 1], [1, 2], [-1e8, 6]], np.float32)
    means, counts = _host.update(x, np.array([1, 1, 1]), 3)
    np.testing.assert_allclose(means[1], [1 / 3, 3], rtol=1e-6)  # fp32 sums would lose the 1
    assert counts.tolist() == [0, 3, 0] and (means[[0, 2]] == 0).all()


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 7, 8, 9, 11, 12, 16, 31, 32])
def test_packing_round_trips(bits):
    rng = np.random.default_rng(bits)
    for count in (0, 1, 7, 8, 1001):
        codes = rng.integers(0, 2**bits, count)
        packed = _host.pack_codes(codes, bits)
        assert packed.dtype == np.uint8 and packed.size == -(-count * bits // 8)
        assert (_host.unpack_codes(packed, bits, count) == codes).all()


def test_packing_is_least_significant_bit_first():
    assert _host.pack_codes(np.array([1, 2, 3], np.uint8), 4).tolist() == [0x21, 0x03]


def test_bad_input_is_named():
    ok = np.zeros((4, 2), np.float32)
    for error, match, call in (
        (ValueError, "x: must be 2-d", lambda: _host.assign(ok[0], ok)),
        (ValueError, "book: must have as many columns", lambda: _host.assign(ok, ok[:, :1])),
        (ValueError, "book: must have 1 to", lambda: _host.assign(ok, ok[:0])),
        (ValueError, "x: must be finite", lambda: _host.assign(np.full((1, 2), np.nan, np.float32), ok)),
        (ValueError, "threads", lambda: _host.assign(ok, ok, threads=0)),
        (ValueError, "codes: must lie in", lambda: _host.update(ok, np.array([0, 1, 2, 3]), 3)),
        (ValueError, "codes: must be \\[4\\]", lambda: _host.update(ok, np.array([0]), 3)),
        (TypeError, "codes: must be integers", lambda: _host.update(ok, np.zeros(4), 3)),
        (ValueError, "bits", lambda: _host.pack_codes(np.array([0]), 33)),
        (ValueError, "codes: must lie in", lambda: _host.pack_codes(np.array([4]), 2)),
        (ValueError, "packed: must be 2 bytes", lambda: _host.unpack_codes(np.zeros(3, np.uint8), 8, 2)),
        (ValueError, "count", lambda: _host.unpack_codes(np.zeros(3, np.uint8), 8, -1)),
        (ValueError, "name: must be one of", lambda: _host.set_isa("sse9")),
        (ValueError, "seconds", lambda: _host.fma_peak(0)),
        (ValueError, "isa", lambda: _host.fma_peak(0.001, "sse9")),
    ):
        with pytest.raises(error, match=match):
            call()


def test_switch_reaches_the_kernels_and_all_sets_agree():
    first = _host.isa()
    assert first in _host.available_isas() and "scalar" in _host.available_isas()
    codes = torch.randint(16, (40, 25), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    x, book = torch.randn(9, 100), torch.randn(1, 16, 4)
    try:
        results = []
        for name in _host.available_isas():
            _host.set_isa(name)
            assert _host.isa() == name
            results.append(pq_linear(x, codes, book))
        for result in results[1:]:
            torch.testing.assert_close(result, results[0], rtol=1e-4, atol=1e-4)
    finally:
        _host.set_isa(first)


def test_the_interpreter_runs_while_a_long_assignment_does():
    """The lock of the interpreter is released: another thread makes progress meanwhile."""
    rng = np.random.default_rng(0)
    x, book = rng.standard_normal((40000, 16), np.float32), rng.standard_normal((1024, 16), np.float32)
    worker = threading.Thread(target=_host.assign, args=(x, book))
    worker.start()
    steps = 0
    while worker.is_alive():
        steps += 1
    worker.join()
    assert steps > 100  # with the lock held it would be the few steps after the end


def test_peak_is_a_rate():
    for name in _host.available_isas():
        assert _host.fma_peak(0.002, name) > 0
