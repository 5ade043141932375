"""Layers whose weight is codes and a codebook, run from the codes: the dense weight never exists.

Source: product quantization of weights as in "And the Bit Goes Down" (Stock et al., ICLR 2020), whose layers these
ops run without rebuilding them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from effkern.ops._checks import pair
from effkern.ops.pq import registration as _ops

__all__ = ["pq_conv2d", "pq_decode", "pq_embedding", "pq_embedding_bag", "pq_linear"]


def pq_linear(
    x: Tensor,
    codes: Tensor,
    codebook: Tensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    act: str = "none",
    algo: str = "auto",
) -> Tensor:
    """Fully connected layer run from codes: ``act(x @ W.T * scale + bias)`` with ``W = pq_decode(codes, codebook)``.

    A row of ``W`` is cut into ``J = ceil(Ci / d)`` sub-vectors, each the sum of the codebook rows its codes name. If
    ``J * d > Ci``, the last sub-vector's tail is ignored. The dense weight never exists, neither here nor in the
    gradient. The result of a row does not depend on the other rows or on the number of threads, bit for bit.

    On CUDA a layer of more than 8 rows decodes its weight for the call, and ``"auto"`` has other last bits there than
    up to 8 rows; an ``algo`` by name has the same for any number.

    Args:
        x: ``[..., Ci]``, float32, bfloat16 or float16, any strides.
        codes: ``[Co, J]``, or ``[Co, J, m]`` for ``m`` additive stages; uint8, int16, uint16 or int32, each below
            ``K``. int16 is read as signed: use uint16 for ``K > 32768``.
        codebook: ``[B, K, d]``, float32, bfloat16 or float16 independent of ``x``, ``K <= 65536``. ``B`` is 1, one
            book for all, or the last size of ``codes``: one book per position for 2-d codes, per stage for 3-d codes.
        scale: ``[Co]`` factor of every weight row; finite.
        bias: ``[Co]``.
        act: ``"none"``, ``"relu"``, ``"relu6"``, ``"hardswish"`` or ``"silu"``, applied to the float32 sum.
        algo: how to compute it; all agree within the bound of a direct sum, but not in the last bits.

            - ``"auto"``: ``decode_fma`` where ``d`` is 4 or a multiple of 8, else ``panel``.
            - ``"decode_fma"``: multiplies codebook rows where they lie; the fastest for few rows.
            - ``"panel"``, ``"direct"``: decodes 16 rows of ``W`` at a time and runs the convolution engine on them.
            - ``"lut"``: tables of products of all codebook rows with ``x``; for 8 rows and more of ``x`` and large
              ``Co`` the fastest, for fewer wasteful. ``K <= 256``, one stage.

    Returns:
        ``[..., Co]``, contiguous, in the dtype of ``x``; sums are kept in float32.

    Raises:
        ValueError: for shapes that disagree, a code of ``K`` or more, a scale that is not finite, an ``algo`` that
            cannot run the layer.
        TypeError: for dtypes not named above.

    Differentiable in ``x``, ``codebook``, ``scale`` and ``bias``; the gradient of a codebook entry is the sum over its
    uses, exactly 0 for an unused one. Under autocast only ``x`` is cast.

    >>> codes = torch.tensor([[0, 1]], dtype=torch.uint8)
    >>> pq_linear(torch.tensor([[1.0, 10.0, 100.0, 1000.0]]), codes, torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]))
    tensor([[4321.]])
    """
    return _ops.linear(x, codes, codebook, scale, bias, act, algo)


def pq_conv2d(
    x: Tensor,
    codes: Tensor,
    codebook: Tensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    kernel_size: int | tuple[int, int] = 1,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    act: str = "none",
    algo: str = "auto",
) -> Tensor:
    """Convolution run from codes: ``act(conv2d(x, W) * scale + bias)``, ``W`` decoded from codes a panel at a time.

    A weight row has ``Ci / groups * R * S`` numbers in (channel, kernel row, kernel column) order, so with a 3x3 kernel
    ``d = 9`` makes a sub-vector one kernel and ``d = 18`` two, and with a 1x1 kernel ``d`` is a run of channels.

    Args:
        x: ``[N, Ci, H, W]``, float32, bfloat16 or float16, any strides; channels_last is the fast one.
        codes: ``[Co, J]`` or ``[Co, J, m]``, ``J = ceil(Ci / groups * R * S / d)``; see :func:`pq_linear`.
        codebook: ``[B, K, d]``; see :func:`pq_linear`.
        scale: ``[Co]`` factor of every weight row; finite.
        bias: ``[Co]``.
        kernel_size: ``(R, S)``; an int counts for both, as in the arguments after it.
        stride: of the window.
        padding: zeros on both sides.
        dilation: of the window.
        groups: the rows of codes of a group see the channels of that group only. A depthwise layer
            (``groups == Ci == Co``) is decoded once a call, ``R * S`` numbers per channel.
        act: as in :func:`pq_linear`.
        algo: how to compute it.

            - ``"auto"``: chosen from the shape of one sample and the dtypes.
            - ``"panel"``: decodes 16 rows of the weight at a time and runs the convolution engine on them, which takes
              Winograd for many 3x3 kernels of stride 1.
            - ``"direct"``: ``panel`` without Winograd: a NaN or Inf in ``x`` reaches only the outputs whose receptive
              field holds it, and an output whose receptive field is zero is exactly ``bias``.
            - ``"decode_fma"``, ``"lut"``: as in :func:`pq_linear`, for 1x1 kernels without padding and groups.

    Returns:
        ``[N, Co, Ho, Wo]`` in the dtype of ``x``, channels_last if ``x`` is. A sample's result does not depend on the
        other samples or on the number of threads, bit for bit.

    Raises:
        ValueError: for shapes that disagree, a code of ``K`` or more, a scale that is not finite, an ``algo`` that
            cannot run the layer.
        TypeError: for dtypes not named above.

    Differentiable as :func:`pq_linear` is.
    """
    return _ops.conv(
        x,
        codes,
        codebook,
        scale,
        bias,
        pair(kernel_size, "kernel_size"),
        pair(stride, "stride"),
        pair(padding, "padding"),
        pair(dilation, "dilation"),
        groups,
        act,
        algo,
    )


def pq_embedding(
    idx: Tensor, codes: Tensor, codebook: Tensor, scale: Tensor | None = None, padding_idx: int | None = None
) -> Tensor:
    """Look rows up in a table held as codes; only the rows asked for are decoded.

    Args:
        idx: any shape, int64 or int32, each in ``[0, V)``.
        codes: ``[V, J]`` or ``[V, J, m]``; see :func:`pq_linear`.
        codebook: ``[B, K, d]``; see :func:`pq_linear`.
        scale: ``[V]`` factor of every row; finite.
        padding_idx: this row is zero and gets no gradient. (A dense table keeps such a row at zero because nothing
            trains it; here its codebook entries are trained by the other rows that use them.)

    Returns:
        ``[*idx.shape, J * d]`` in the dtype of ``codebook``.

    Raises:
        IndexError: for an index outside the table.
        ValueError: for shapes that disagree, a code of ``K`` or more, a scale that is not finite.
        TypeError: for other dtypes.

    Differentiable in ``codebook`` and ``scale``.
    """
    return _ops.embedding(idx, codes, codebook, scale, padding_idx)


def pq_embedding_bag(
    idx: Tensor,
    codes: Tensor,
    codebook: Tensor,
    offsets: Tensor | None = None,
    scale: Tensor | None = None,
    mode: str = "mean",
    per_sample_weights: Tensor | None = None,
    padding_idx: int | None = None,
) -> Tensor:
    """Sum or average bags of rows of a table held as codes, like ``torch.nn.functional.embedding_bag``.

    Args:
        idx: ``[n]`` with ``offsets``, or ``[bags, length]`` without; int64 or int32.
        codes: ``[V, J]`` or ``[V, J, m]``; see :func:`pq_linear`.
        codebook: ``[B, K, d]``; see :func:`pq_linear`.
        offsets: ``[bags]``, where each bag starts in ``idx``; begins with 0, never falls. A bag may be empty.
        scale: ``[V]`` factor of every row; finite.
        mode: ``"sum"`` or ``"mean"``.
        per_sample_weights: factors in the shape of ``idx``, with mode ``"sum"`` only.
        padding_idx: indices equal to it count neither in the sum nor in the mean.

    Returns:
        ``[bags, J * d]`` in the dtype of ``codebook``; sums are kept in float32, in index order. An empty bag is zero.

    Raises:
        IndexError: for an index outside the table.
        ValueError: for shapes that disagree, bad offsets, a code of ``K`` or more, a scale that is not finite.
        TypeError: for other dtypes.

    Differentiable in ``codebook``, ``scale`` and ``per_sample_weights``.
    """
    if idx.dim() == 2:
        if offsets is not None:
            raise ValueError("pq_embedding_bag: offsets must be None for idx [bags, length], they are its rows")
        bags, length = idx.shape
        if per_sample_weights is not None:
            if per_sample_weights.shape != idx.shape:
                raise ValueError(
                    f"pq_embedding_bag: per_sample_weights must be {list(idx.shape)} like idx, "
                    f"got {list(per_sample_weights.shape)}"
                )
            per_sample_weights = per_sample_weights.reshape(-1)
        offsets = torch.arange(bags, device=idx.device) * length
        idx = idx.reshape(-1)
    elif offsets is None:
        raise ValueError("pq_embedding_bag: offsets must be given for 1-d idx")
    return _ops.bag(idx, codes, codebook, offsets, scale, mode, per_sample_weights, padding_idx)


def pq_decode(codes: Tensor, codebook: Tensor, scale: Tensor | None = None) -> Tensor:
    """The dense weight ``[Co, J * d]`` behind codes, for tests, export and debugging; the layers never call it.

    Args:
        codes: ``[Co, J]`` or ``[Co, J, m]``; see :func:`pq_linear`.
        codebook: ``[B, K, d]``; see :func:`pq_linear`.
        scale: ``[Co]`` factor of every row; finite.

    Returns:
        ``[Co, J * d]``, contiguous, in the dtype of ``codebook``. The tail of a row that does not fill its last
        sub-vector is still there: cut it with ``[:, :columns]``.

    Raises:
        ValueError: for shapes that disagree, a code of ``K`` or more, a scale that is not finite.
        TypeError: for dtypes not named above.

    Differentiable in ``codebook`` and ``scale``.

    >>> pq_decode(torch.tensor([[1, 0]], dtype=torch.uint8), torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]))
    tensor([[3., 4., 1., 2.]])
    """
    return _ops.decode(codes, codebook, scale)
