"""The path of a KW layer in graphs that other programs run: torch's own operations, and no convolution.

The groups of a convolution are a constant of such a graph, so the batch cannot be among them; matrix products take any
batch. Exporters reason about every size that is not a constant, by operation, which takes most of their time; hence few
operations. What a window sees is gathered by one, which is unfolding. In a traced graph that would make constants of
sizes: there, shifted copies are cut out by distances from both ends, few of them (one axis after the other), with views
of constant sizes.
"""

import math

import torch
import torch.nn.functional as F

from .spec import ConvSpec
from .straightforward import add_bias, in_type_of, mix

__all__ = ['conv_by_products']


def conv_by_products(
    x: torch.Tensor,
    coefficients: torch.Tensor,
    cells: torch.Tensor,
    bias: torch.Tensor | None,
    spec: ConvSpec,
    factors: torch.Tensor | None = None,
) -> torch.Tensor:
    """Convolve each sample with the kernel that its coefficients make of the cells. Differentiable.

    Arguments and result as :func:`~kw_timm.ops.convolve_fixed`, which checks them and pads the input's end.
    """
    # Where nothing is traced, one operation gathers what a window sees, but in two dimensions only.
    unfolds = len(spec.kernel_size) == 2 and math.prod(spec.kernel_size) > 1 and not torch.jit.is_tracing()
    kernels = _arrange(mix(coefficients, cells, spec), spec, unfolds)
    if factors is not None:
        kernels = kernels * factors[:, None]
    kernels = in_type_of(x, kernels)
    if unfolds:
        return add_bias(_unfolded(x, kernels, spec), bias)
    if any(spec.padding):
        x = F.pad(x, [zeros for padding in reversed(spec.padding) for zeros in (padding, padding)])
    x = _every(x, [stride if taps == 1 else 1 for taps, stride in zip(spec.kernel_size, spec.stride, strict=True)])
    y = _depthwise(x, kernels, spec) if spec.groups > 1 == spec.kernel_shape[1] else _dense(x, kernels, spec)
    return add_bias(y, bias)


def _arrange(mixed: torch.Tensor, spec: ConvSpec, window_last: bool = False) -> torch.Tensor:
    """Put mixtures ``(B, m, co * ci * window)`` in their places: ``(B, O, window * C / groups)``, or window last."""
    positions, out_groups, in_groups = spec.grid
    cell_out, cell_in, *window = spec.cell_shape
    parts = mixed.reshape(-1, positions, out_groups, in_groups, cell_out, cell_in, math.prod(window))
    rows = parts.permute(0, 2, 4, *((3, 5, 1, 6) if window_last else (1, 6, 3, 5))).contiguous()
    return rows.view(-1, spec.kernel_shape[0], math.prod(spec.kernel_shape[1:]))


def _unfolded(x: torch.Tensor, kernels: torch.Tensor, spec: ConvSpec) -> torch.Tensor:
    """Multiply kernels with all that they see, of every group: ``(B, g, O / g, C / g * window) @ (..., pixels)``."""
    channels, groups, batch = spec.kernel_shape[0], spec.groups, x.shape[0]
    seen = F.unfold(x, spec.kernel_size, spec.dilation, spec.padding, spec.stride)
    length = math.prod(spec.kernel_shape[1:])
    if groups > 1:
        kernels = kernels.view(batch, groups, channels // groups, length)
        seen = seen.view(batch, groups, length, seen.shape[2])
    # In the words in which torch counts them, so that their product is known to be the number of pixels.
    sizes = [
        (x.shape[2 + axis] + 2 * padding - dilation * (taps - 1) + stride - 1) // stride
        for axis, (taps, dilation, padding, stride) in enumerate(
            zip(spec.kernel_size, spec.dilation, spec.padding, spec.stride, strict=True)
        )
    ]
    return (kernels @ seen).view(batch, channels, *sizes)


def _dense(x: torch.Tensor, kernels: torch.Tensor, spec: ConvSpec) -> torch.Tensor:
    """Multiply kernels with all that they see: ``(B, O, window * C) @ (B, window * C, pixels)``."""
    channels, groups = spec.kernel_shape[0], spec.groups
    if groups > 1:  # They become samples.
        x = x.reshape(-1, spec.kernel_shape[1], *_sizes(x, 2))
        kernels = kernels.view(-1, channels // groups, kernels.shape[2])
    seen = x
    for axis in reversed(range(len(spec.kernel_size))):
        seen = _beside([_cut(seen, 2 + axis, spec, axis, i) for i in range(spec.kernel_size[axis])], 1)
    return (kernels @ seen.flatten(2)).reshape(-1, channels, *_sizes(seen, 2))


def _depthwise(x: torch.Tensor, kernels: torch.Tensor, spec: ConvSpec) -> torch.Tensor:
    """Multiply along all axes of the window but the last, and add up along that one, which takes fewer copies."""
    (*others, last), multiplier = range(len(spec.kernel_size)), spec.kernel_shape[0] // spec.groups
    width, length = spec.kernel_size[last], math.prod(spec.kernel_size[:last])
    seen = x.unsqueeze(2)
    for axis in reversed(others):
        seen = _beside([_cut(seen, 3 + axis, spec, axis, i) for i in range(spec.kernel_size[axis])], 2)
    matrices = kernels.view(-1, spec.groups, multiplier, length, width).permute(0, 1, 4, 2, 3)
    products = matrices.reshape(-1, spec.groups, width * multiplier, length) @ seen.flatten(3)
    products = products.reshape(-1, spec.groups, width * multiplier, *_sizes(seen, 3))
    parts = [_cut(part, 3 + last, spec, last, i) for i, part in enumerate(products.split(multiplier, 2))]
    y = sum(parts[1:], parts[0])
    return y.squeeze(2) if multiplier == 1 else y.flatten(1, 2)


def _every(x: torch.Tensor, strides: list[int]) -> torch.Tensor:
    """Return every so many pixels of each axis. Of slices without an end OpenVINO takes a wrong size for granted."""
    if max(strides) == 1:
        return x
    pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[len(strides) - 1]
    return pool(x, 1, strides)


def _beside(parts: list[torch.Tensor], dim: int) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _sizes(x: torch.Tensor, begin: int) -> list[int]:
    """Return the sizes from an axis on, each asked for alone: slicing ``shape`` would make constants of them."""
    return [x.shape[axis] for axis in range(begin, x.dim())]


def _cut(x: torch.Tensor, dim: int, spec: ConvSpec, axis: int, tap: int) -> torch.Tensor:
    """Return what one position of the window along an axis sees of ``x``, whose axis ``dim`` is the image's."""
    if spec.kernel_size[axis] == 1:
        return x
    begin, end = (i * spec.dilation[axis] for i in (tap, spec.kernel_size[axis] - 1 - tap))
    return torch.ops.aten.slice.Tensor(x, dim, begin, -end or None, spec.stride[axis])
