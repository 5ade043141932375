"""The operators as plain functions. One folder an op family; adding one adds one line here."""

from effkern.ops.sliced_conv import sliced_conv2d

__all__ = ["sliced_conv2d"]
