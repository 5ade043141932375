"""The operators as plain functions. One folder an op family; adding one adds one line here."""

from effkern.ops.pq import pq_conv2d, pq_decode, pq_embedding, pq_embedding_bag, pq_linear
from effkern.ops.sliced_conv import sliced_conv2d

__all__ = ["pq_conv2d", "pq_decode", "pq_embedding", "pq_embedding_bag", "pq_linear", "sliced_conv2d"]
