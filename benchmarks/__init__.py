"""Benchmarks: ``python -m benchmarks.bench_<family>``, or all of them with ``make bench``."""
