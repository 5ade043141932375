"""Kernels that the Triton twins share. Importing it needs triton; :mod:`effkern.ops._backend` does so when asked."""
