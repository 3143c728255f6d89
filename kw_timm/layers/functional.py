"""The straightforward path: mix all cells for every sample, then one grouped convolution over the batch.

Short and obviously right; every faster way is held against it.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

__all__ = ['arrange_kernels', 'assemble_kernels', 'conv_per_sample', 'straightforward_conv']

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}

Padding = str | tuple[int, ...]


def assemble_kernels(
    coefficients: torch.Tensor, cells: torch.Tensor, grid: tuple[int, int, int], kernel_size: Sequence[int]
) -> torch.Tensor:
    """Rebuild a layer's kernel for every sample.

    ``W[b, og * co + o, ig * ci + i, s] = sum_j coefficients[b, (s, og, ig), j] * cells[j, o, i]``

    Args:
        coefficients: Attention, ``(B, m, n)``.
        cells: Warehouse cells, ``(n, co, ci, *window)``; the window is 1x1, or the whole kernel where the spatial
            partition is off.
        grid: ``(spatial positions, output groups, input groups)`` of the ``m`` mixtures.
        kernel_size: Window of the kernel.

    Returns:
        Kernels, ``(B, O, I / groups, *kernel_size)``.
    """
    mixed = coefficients @ cells.flatten(1).to(coefficients.dtype)
    return arrange_kernels(mixed, cells.shape[1:], grid, kernel_size)


def arrange_kernels(
    mixed: torch.Tensor, cell_shape: Sequence[int], grid: Sequence[int], kernel_size: Sequence[int]
) -> torch.Tensor:
    """Put mixtures ``(B, m, co * ci * window)`` in their places; arguments, result as :func:`assemble_kernels`."""
    positions, out_groups, in_groups = grid
    cell_out, cell_in, *window = cell_shape
    # One of `positions` and `window` is 1; together they are the flattened kernel window.
    parts = mixed.reshape(mixed.shape[0], positions, out_groups, in_groups, cell_out, cell_in, math.prod(window))
    kernels = parts.permute(0, 2, 4, 3, 5, 1, 6)
    return kernels.reshape(mixed.shape[0], out_groups * cell_out, in_groups * cell_in, *kernel_size)


def arrange_gradient(grad_kernels: torch.Tensor, cell_shape: Sequence[int], grid: Sequence[int]) -> torch.Tensor:
    """Gradient of :func:`arrange_kernels`: from that of the kernels to ``(B, m, co * ci * window)``, contiguous."""
    positions, out_groups, in_groups = grid
    cell_out, cell_in, *window = cell_shape
    parts = grad_kernels.reshape(-1, out_groups, cell_out, in_groups, cell_in, positions, math.prod(window))
    return parts.permute(0, 5, 1, 3, 2, 4, 6).reshape(grad_kernels.shape[0], math.prod(grid), -1).contiguous()


def conv_per_sample(
    x: torch.Tensor,
    kernels: torch.Tensor,
    bias: torch.Tensor | None,
    stride: tuple[int, ...],
    padding: Padding,
    dilation: tuple[int, ...],
    groups: int,
) -> torch.Tensor:
    """Convolve each sample with its own kernel.

    Args:
        x: Inputs, ``(B, C, *spatial)``.
        kernels: ``(B, O, C / groups, *k)``.
        bias: ``(O,)`` or None, the same for all samples.
        stride: Stride per spatial axis.
        padding: Zero padding per spatial axis, or ``'same'`` / ``'valid'``.
        dilation: Dilation per spatial axis.
        groups: Groups of the layer.

    Returns:
        ``(B, O, *spatial')``.
    """
    batch, out_channels = x.shape[0], kernels.shape[1]
    if batch == 0:
        # A grouped convolution cannot have zero groups; any one kernel gives the right empty output.
        return CONV[x.dim() - 2](x, kernels.new_zeros(kernels.shape[1:]), bias, stride, padding, dilation, groups)
    # The batch becomes groups of one wide sample, which is what lets every sample have its own kernel.
    wide = x.reshape(1, batch * x.shape[1], *x.shape[2:])
    y = CONV[x.dim() - 2](wide, kernels.flatten(0, 1), None, stride, padding, dilation, batch * groups)
    y = y.reshape(batch, out_channels, *y.shape[2:])
    if bias is not None:
        y = y + bias.to(y.dtype).view(-1, *(1,) * (y.dim() - 2))
    return y


def straightforward_conv(
    x: torch.Tensor,
    coefficients: torch.Tensor,
    cells: torch.Tensor,
    bias: torch.Tensor | None,
    grid: tuple[int, int, int],
    kernel_size: tuple[int, ...],
    stride: tuple[int, ...],
    padding: Padding,
    dilation: tuple[int, ...],
    groups: int,
) -> torch.Tensor:
    """Assemble every sample's kernel from the cells and convolve the sample with it.

    Arguments and result as :func:`assemble_kernels` and :func:`conv_per_sample`.

    Raises:
        ValueError: If the input is not a batch, has no pixels or is smaller than the kernel.
    """
    check_input(x, kernel_size, padding, dilation)
    kernels = assemble_kernels(coefficients, cells, grid, kernel_size)
    return conv_per_sample(x, kernels.to(x.dtype), bias, stride, padding, dilation, groups)


def check_input(x: torch.Tensor, kernel_size: tuple[int, ...], padding: Padding, dilation: tuple[int, ...]) -> None:
    """Raise ValueError unless ``x`` is a batch of inputs that the kernel fits into."""
    if x.dim() != len(kernel_size) + 2:
        raise ValueError(
            f'Expected a batched input of {len(kernel_size) + 2} axes (B, C, *spatial), got shape {tuple(x.shape)}. '
            f'Add the batch axis with x.unsqueeze(0): the kernels are computed per sample.'
        )
    spatial = tuple(x.shape[2:])
    if 0 in spatial:
        raise ValueError(f'The input has no pixels: shape {tuple(x.shape)}. Every spatial size must be at least 1.')
    if isinstance(padding, str):
        padding = tuple(d * (k - 1) if padding == 'same' else 0 for k, d in zip(kernel_size, dilation, strict=True))
        padded = tuple(s + p for s, p in zip(spatial, padding, strict=True))
    else:
        padded = tuple(s + 2 * p for s, p in zip(spatial, padding, strict=True))
    window = tuple(d * (k - 1) + 1 for k, d in zip(kernel_size, dilation, strict=True))
    if any(s < w for s, w in zip(padded, window, strict=True)):
        raise ValueError(
            f'The input of spatial size {spatial} (with padding {padded}) is smaller than the kernel window {window}. '
            f'Feed a larger image.'
        )
