"""Layers over :mod:`effkern.ops`."""
