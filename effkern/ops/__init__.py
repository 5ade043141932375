"""The operators as plain functions. One folder an op family; adding one adds one line here."""

from effkern.ops import _backend
from effkern.ops._backend import backend
from effkern.ops.block_skip import compact, skip_basic_block, skip_bottleneck, skip_stage
from effkern.ops.multi_branch_bn import multi_branch_bn_add_relu
from effkern.ops.pq import pq_conv2d, pq_decode, pq_embedding, pq_embedding_bag, pq_linear
from effkern.ops.rep_conv import pack_conv_weight, rep_conv2d, rep_conv2d_packed
from effkern.ops.rep_conv.chain import AverageStep, ConvStep, rep_conv2d_chain
from effkern.ops.sliced_conv import (
    AttentionStep,
    MeanStep,
    SlicedStep,
    sliced_chain,
    sliced_conv2d,
    sliced_conv2d_packed,
    sliced_conv2d_ragged,
    sliced_conv2d_ragged_packed,
    sliced_dw_pw,
    sliced_dw_pw_packed,
    sliced_linear,
    sliced_linear_ragged,
)

__all__ = [
    "AttentionStep",
    "AverageStep",
    "ConvStep",
    "MeanStep",
    "SlicedStep",
    "backend",
    "compact",
    "multi_branch_bn_add_relu",
    "pack_conv_weight",
    "pq_conv2d",
    "pq_decode",
    "pq_embedding",
    "pq_embedding_bag",
    "pq_linear",
    "rep_conv2d",
    "rep_conv2d_chain",
    "rep_conv2d_packed",
    "skip_basic_block",
    "skip_bottleneck",
    "skip_stage",
    "sliced_chain",
    "sliced_conv2d",
    "sliced_conv2d_packed",
    "sliced_conv2d_ragged",
    "sliced_conv2d_ragged_packed",
    "sliced_dw_pw",
    "sliced_dw_pw_packed",
    "sliced_linear",
    "sliced_linear_ragged",
]

_backend.from_environment()
