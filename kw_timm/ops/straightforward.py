"""The straightforward path: mix all cells for every sample, then one grouped convolution over the batch.

Short and obviously right; every faster way is held against it.
"""

import math

import torch
import torch.nn.functional as F

from .spec import ConvSpec

__all__ = [
    'add_bias',
    'arrange_gradient',
    'arrange_kernels',
    'assemble_kernels',
    'conv_per_sample',
    'in_type_of',
    'mix',
    'straightforward_conv',
]

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def straightforward_conv(
    x: torch.Tensor, coefficients: torch.Tensor, cells: torch.Tensor, bias: torch.Tensor | None, spec: ConvSpec
) -> torch.Tensor:
    """Assemble every sample's kernel from the cells and convolve the sample with it.

    Arguments and result as :func:`~kw_timm.ops.kernel_warehouse_conv`, which checks them and pads the input's end.
    """
    kernels = assemble_kernels(coefficients, cells, spec)
    return conv_per_sample(x, in_type_of(x, kernels), bias, spec)


def assemble_kernels(coefficients: torch.Tensor, cells: torch.Tensor, spec: ConvSpec) -> torch.Tensor:
    """Rebuild a layer's kernel for every sample.

    ``W[b, og * co + o, ig * ci + i, s] = sum_j coefficients[b, (s, og, ig), j] * cells[j, o, i]``

    Args:
        coefficients: Attention, ``(B, m, n)``.
        cells: Warehouse cells, ``(n, co, ci, *window)``.
        spec: The layer's constants.

    Returns:
        Kernels, ``(B, O, I / groups, *kernel_size)``.
    """
    return arrange_kernels(mix(coefficients, cells, spec), spec)


def mix(coefficients: torch.Tensor, cells: torch.Tensor, spec: ConvSpec) -> torch.Tensor:
    """Return the mixtures of cells, ``(B, m, co * ci * window)``.

    Args:
        coefficients: ``(B, m, n)``.
        cells: ``(n, co, ci, *window)``, the same for all mixtures; or ``(m, n, co, ci, *window)``, each mixture's own.
        spec: The layer's constants.
    """
    cells, axes = in_type_of(coefficients, cells), len(spec.cell_shape)
    if cells.dim() - axes == 2 and cells.shape[0] == 1:
        cells = cells[0]
    if cells.dim() - axes == 1:
        return coefficients @ cells.flatten(1)
    return torch.bmm(coefficients.transpose(0, 1), cells.flatten(2)).transpose(0, 1)


def in_type_of(like: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """Return ``tensor`` in the type of ``like``; where it has that, no operation gets into a graph."""
    return tensor if tensor.dtype == like.dtype else tensor.to(like.dtype)


def arrange_kernels(mixed: torch.Tensor, spec: ConvSpec) -> torch.Tensor:
    """Put mixtures ``(B, m, co * ci * window)`` in their places; result as :func:`assemble_kernels`."""
    positions, out_groups, in_groups = spec.grid
    cell_out, cell_in, *window = spec.cell_shape
    # One of `positions` and `window` is 1; together they are the flattened kernel window.
    parts = mixed.reshape(-1, positions, out_groups, in_groups, cell_out, cell_in, math.prod(window))
    return parts.permute(0, 2, 4, 3, 5, 1, 6).reshape(-1, *spec.kernel_shape)


def arrange_gradient(grad_kernels: torch.Tensor, spec: ConvSpec) -> torch.Tensor:
    """Gradient of :func:`arrange_kernels`: from that of the kernels to ``(B, m, co * ci * window)``, contiguous."""
    positions, out_groups, in_groups = spec.grid
    cell_out, cell_in, *window = spec.cell_shape
    parts = grad_kernels.reshape(-1, out_groups, cell_out, in_groups, cell_in, positions, math.prod(window))
    return parts.permute(0, 5, 1, 3, 2, 4, 6).reshape(grad_kernels.shape[0], math.prod(spec.grid), -1).contiguous()


def conv_per_sample(x: torch.Tensor, kernels: torch.Tensor, bias: torch.Tensor | None, spec: ConvSpec) -> torch.Tensor:
    """Convolve each sample with its own kernel.

    Args:
        x: Inputs, ``(B, C, *spatial)``.
        kernels: ``(B, O, C / groups, *k)``.
        bias: ``(O,)`` or None, the same for all samples.
        spec: The layer's constants.

    Returns:
        ``(B, O, *spatial')``.
    """
    batch, conv = x.shape[0], CONV[x.dim() - 2]
    if batch == 0:
        # A grouped convolution cannot have zero groups; any one kernel gives the right empty output.
        kernel = kernels.new_zeros(kernels.shape[1:])
        return conv(x, kernel, bias, spec.stride, spec.padding, spec.dilation, spec.groups)
    # The batch becomes groups of one wide sample, which is what lets every sample have its own kernel.
    wide = x.reshape(1, batch * x.shape[1], *x.shape[2:])
    y = conv(wide, kernels.flatten(0, 1), None, spec.stride, spec.padding, spec.dilation, batch * spec.groups)
    return add_bias(y.reshape(batch, kernels.shape[1], *y.shape[2:]), bias)


def add_bias(y: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return ``y: (B, O, *spatial)`` with a bias ``(O,)`` for every channel, or as it is."""
    return y if bias is None else y + in_type_of(y, bias).view(-1, *(1,) * (y.dim() - 2))
