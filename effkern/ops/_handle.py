"""The handle of a packed weight in plain PyTorch: what the C++ packer writes, byte for byte, and how to read it back.

For the references of every op that takes handles. The format is ``csrc/conv/pack.h``.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

HEADER_BYTES = 64
PANEL = 16  # outputs side by side in a pack
_MAGIC = b"EFFKPACK"
_VERSION = 1
_PANELS, _DEPTHWISE, _WINOGRAD = 0, 1, 2
_HEADER = struct.Struct("<8sHHI5i20xQ")  # magic, version, kind, has_bias, out, in/groups, kh, kw, groups, checksum
#: Headers on GPUs that were read, with the version of the tensor they were read from.
_READ: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def pack_conv_weight(weight: Tensor, bias: Tensor | None = None, groups: int = 1, algo: str = "auto") -> Tensor:
    """Lay a weight out for the kernels: 64-byte header, bias, then panels ``[groups][out/16][tap][in][16]`` in fp32.

    The bias and each group's outputs are padded with zeros to a multiple of 16. A depthwise weight with one filter per
    channel is ``[tap][channels]`` instead. With ``algo="winograd"`` the panels of a 3x3 kernel are followed by their
    transforms.
    """
    out_channels, depth, rows, columns = weight.shape
    values = weight.detach().float()
    if is_depthwise(out_channels, depth, groups):
        kind, packed = _DEPTHWISE, values.reshape(out_channels, rows * columns).t()
    else:
        per_group = out_channels // groups
        kind, panels = _PANELS, panels_of(per_group)
        padded = values.new_zeros(groups, panels * PANEL, depth, rows * columns)
        padded[:, :per_group] = values.reshape(groups, per_group, depth, rows * columns)
        packed = padded.view(groups, panels, PANEL, depth, rows * columns).permute(0, 1, 4, 3, 2)
        if algo == "winograd" and (rows, columns) == (3, 3):
            kind, packed = _WINOGRAD, torch.cat([packed.reshape(-1), winograd_transforms(packed).reshape(-1)])
    parts = [_header(kind, bias is not None, out_channels, depth, rows, columns, groups).to(weight.device)]
    if bias is not None:
        padding = panels_of(out_channels) * PANEL - out_channels
        parts.append(F.pad(bias.detach().float(), (0, padding)).view(torch.uint8))
    parts.append(packed.reshape(-1).view(torch.uint8))
    return torch.cat(parts)


def winograd_transforms(panels: Tensor) -> Tensor:
    """Transforms ``[..., 36, in, 16]`` of panels ``[..., 9, in, 16]`` for F(4,3), equal to the kernels' up to rounding.

    ``G g G^T`` on the points 0, +-1/sqrt(2), +-sqrt(2) and infinity, its rows in the order in which the kernels make
    them.
    """
    q = 2.0**0.5
    g = [[1, 0, 0], [-2 / 3, -q / 3, -1 / 3], [-2 / 3, q / 3, -1 / 3], [1 / 6, q / 6, 1 / 3], [1 / 6, -q / 6, 1 / 3]]
    across = torch.tensor([*g, [0, 0, 1]], dtype=torch.float64, device=panels.device)
    kernels = panels.double().unflatten(-3, (3, 3))
    values = torch.einsum("ia,...abkl,jb->...ijkl", across[[1, 2, 3, 4, 0, 5]], kernels, across)
    return values.flatten(-4, -3).to(panels.dtype)


def is_depthwise(out_channels: int, in_per_group: int, groups: int) -> bool:
    """Whether a weight is packed as one filter per channel."""
    return groups > 1 and in_per_group == 1 and out_channels == groups


def panels_of(outputs: int) -> int:
    """Panels that hold so many outputs."""
    return (outputs + PANEL - 1) // PANEL


def handle_bytes(
    out_channels: int,
    in_per_group: int,
    rows: int,
    columns: int,
    groups: int,
    has_bias: bool,
    transformed: bool = False,
) -> int:
    """Size of the handle of a weight; plain arithmetic, so that it also serves symbolic sizes."""
    taps = rows * columns + (36 if transformed else 0)
    if is_depthwise(out_channels, in_per_group, groups):
        floats = taps * out_channels
    else:
        floats = groups * panels_of(out_channels // groups) * taps * in_per_group * PANEL
    return HEADER_BYTES + 4 * (floats + (panels_of(out_channels) * PANEL if has_bias else 0))


def check_bytes(handle: Tensor, dims: tuple[int, int, int, int, int], op: str, name: str = "handle") -> None:
    """Refuse a handle whose size is none that a weight of these dimensions packs to (all that a fake can see).

    Args:
        dims: out channels, channels per group, rows, columns, groups.
    """
    if handle.numel() in (handle_bytes(*dims, has_bias) for has_bias in (False, True)):
        return
    outs, depth, rows, columns, groups = dims
    transformable = (rows, columns) == (3, 3) and not is_depthwise(outs, depth, groups)
    if transformable and handle.numel() in (handle_bytes(*dims, has_bias, True) for has_bias in (False, True)):
        return
    sizes = [handle_bytes(*dims, has_bias) for has_bias in (False, True)]
    raise ValueError(
        f"{op}: {name} must have {sizes[0]} bytes (or {sizes[1]} with a bias"
        f"{', or more with transforms' if transformable else ''}) for out_channels = {outs}, kernel_size = "
        f"{(rows, columns)}, groups = {groups} and x's {depth * groups} channels, got {handle.numel()}"
    )


def _header(kind: int, has_bias: bool, *dims: int) -> Tensor:
    fields = _HEADER.pack(_MAGIC, _VERSION, kind, int(has_bias), *dims, 0)[:-8]
    return torch.frombuffer(bytearray(fields + struct.pack("<Q", _fnv1a(fields))), dtype=torch.uint8)


def _fnv1a(data: bytes) -> int:
    value = 1469598103934665603
    for byte in data:
        value = (value ^ byte) * 1099511628211 % (1 << 64)
    return value


def unpack_conv_weight(
    handle: Tensor, out_channels: int, in_per_group: int, kernel_size: Sequence[int], groups: int
) -> tuple[Tensor, Tensor | None]:
    """The weight ``[out, in/groups, kh, kw]`` and the bias of a handle, fp32.

    Reads no data to find its way, only sizes, so it can be traced; :func:`check_handle` is what looks at the header.
    """
    rows, columns = kernel_size
    dims = (out_channels, in_per_group, rows, columns, groups)
    transformed = handle.numel() > handle_bytes(*dims, True)
    has_bias = handle.numel() != handle_bytes(*dims, False, transformed)
    values = handle[HEADER_BYTES : handle_bytes(*dims, has_bias)].clone().view(torch.float32)
    bias = None
    if has_bias:
        bias, values = values[:out_channels], values[panels_of(out_channels) * PANEL :]
    if is_depthwise(out_channels, in_per_group, groups):
        return values.view(rows, columns, out_channels).permute(2, 0, 1).unsqueeze(1), bias
    per_group = out_channels // groups
    panels = values.view(groups, panels_of(per_group), rows, columns, in_per_group, PANEL).permute(0, 1, 5, 4, 2, 3)
    whole = panels.reshape(groups, panels_of(per_group) * PANEL, in_per_group, rows, columns)
    return whole[:, :per_group].reshape(out_channels, in_per_group, rows, columns), bias


def _header_bytes(handle: Tensor) -> bytes:
    """The header. On a GPU to read it waits for the device, so there it is read once for a tensor and what it holds."""
    if handle.is_cpu:
        return bytes(handle[:HEADER_BYTES].tolist())
    version = 0 if handle.is_inference() else handle._version
    known = _READ.get(handle)
    if known is None or known[0] != version:
        known = _READ[handle] = (version, bytes(handle[:HEADER_BYTES].tolist()))
    return known[1]


def weight_of(handle: Tensor, shape: Sequence[int], groups: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """The weight of that shape as kernels for GPUs read it, channels_last in ``dtype``, and the bias in fp32."""
    outs, depth, *kernel = shape
    weight, bias = unpack_conv_weight(handle, outs, depth, kernel, groups)
    return weight.to(dtype, memory_format=torch.channels_last), bias


def check_handle(
    handle: Tensor, out_channels: int, kernel_size: Sequence[int], groups: int, op: str = "rep_conv2d_packed"
) -> int:
    """Look at a handle's header and return its channels per group.

    Raises:
        ValueError: if it is truncated or corrupt, or was packed for another convolution.
    """
    if handle.numel() < HEADER_BYTES:
        raise ValueError(f"{op}: handle is shorter than its 64-byte header")
    raw = _header_bytes(handle)
    magic, version, kind, has_bias, packed_out, in_per_group, rows, columns, packed_groups, checksum = _HEADER.unpack(
        raw
    )
    if magic != _MAGIC:
        raise ValueError(f"{op}: handle does not begin with the magic bytes of a packed weight")
    if version != _VERSION:
        raise ValueError(f"{op}: handle has a format version this build does not read")
    if checksum != _fnv1a(raw[:-8]):
        raise ValueError(f"{op}: handle has a corrupt header (checksum differs)")
    if min(packed_out, in_per_group, rows - 1, columns - 1, packed_groups - 1) < 0 or packed_out % packed_groups:
        raise ValueError(f"{op}: handle has impossible dimensions in its header")
    transformed = kind == _WINOGRAD and (rows, columns) == (3, 3)
    plain = _DEPTHWISE if is_depthwise(packed_out, in_per_group, packed_groups) else _PANELS
    if kind != plain and not (transformed and plain == _PANELS):
        raise ValueError(f"{op}: handle has a kind of pack that does not fit the dimensions in its header")
    size = handle_bytes(packed_out, in_per_group, rows, columns, packed_groups, bool(has_bias), transformed)
    if handle.numel() != size:
        raise ValueError(f"{op}: handle has a size other than its header tells (truncated?)")
    if packed_groups != groups:
        raise ValueError(f"{op}: handle was packed with groups = {packed_groups}, got {groups}")
    if (packed_out, rows, columns) != (out_channels, *kernel_size):
        raise ValueError(
            f"{op}: handle was packed for {packed_out} output channels and a {rows}x{columns} kernel, "
            f"got out_channels = {out_channels} and kernel_size = {tuple(kernel_size)}"
        )
    return in_per_group
