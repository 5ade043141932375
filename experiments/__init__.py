"""Experiments on real data, one module each: ``python -m experiments.NAME`` (re)writes ``docs/experiments/NAME``."""
