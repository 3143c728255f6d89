"""The default path of a KW layer: exact, like the straightforward one, but quick and with little memory.

Kernels of a few samples at a time are made, used and forgotten; for the gradients they are made again, which costs
less than keeping them. Exported, traced and compiled training graphs take the straightforward path, which fits any
batch.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .buffers import sum_buffer
from .functional import Padding, arrange_gradient, check_input, straightforward_conv
from .mixing import Grid, add_dot_products, add_products, is_exporting, is_making_graph, mix_cells
from .per_sample import Convolution, convolve, convolve_backward

__all__ = ['as_convolution', 'convolve_in_chunks', 'kernel_warehouse_conv', 'straightforward']

# Kernels in memory at one time: few enough that they are still in a cache when they are used, enough that every cell
# read serves many rows. In the backward pass there are the kernels, their gradients, and those in another order.
_CHUNK_BYTES = 40 * 2**20
_BACKWARD_CHUNK_BYTES = 16 * 2**20

_straightforward = False


@contextmanager
def straightforward() -> Iterator[None]:
    """Let every KW layer compute in the straightforward way while the context lasts.

    It is what the other ways are tested and measured against; it also serves what they do not: second derivatives,
    forward-mode derivatives and ``torch.func.vmap``.

    Example:
        >>> with straightforward():
        ...     model(images)
    """
    global _straightforward
    before, _straightforward = _straightforward, True
    try:
        yield
    finally:
        _straightforward = before


def kernel_warehouse_conv(
    x: torch.Tensor,
    coefficients: torch.Tensor,
    cells: torch.Tensor,
    bias: torch.Tensor | None,
    grid: Grid,
    kernel_size: tuple[int, ...],
    stride: tuple[int, ...],
    padding: Padding,
    dilation: tuple[int, ...],
    groups: int,
) -> torch.Tensor:
    """Convolve each sample with the kernel that its coefficients make of the cells.

    Args:
        x: Inputs, ``(B, C, *spatial)``.
        coefficients: Attention, ``(B, m, n)``.
        cells: Warehouse cells, ``(n, co, ci, *window)``.
        bias: ``(O,)`` or None, the same for all samples.
        grid: ``(spatial positions, output groups, input groups)`` of the ``m`` mixtures.
        kernel_size: Window of the kernel.
        stride: Stride per spatial axis.
        padding: Zero padding per spatial axis, or ``'same'`` / ``'valid'``.
        dilation: Dilation per spatial axis.
        groups: Groups of the layer.

    Returns:
        ``(B, O, *spatial')``.

    Raises:
        ValueError: If the input is not a batch, has no pixels or is smaller than the kernel.
    """
    check_input(x, kernel_size, padding, dilation)
    kind = x.device.type
    if x.dtype != torch.float64 and torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        x, coefficients, cells = x.to(dtype), coefficients.to(dtype), cells.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    conv = as_convolution(kernel_size, stride, padding, dilation, groups)
    learns = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, coefficients, cells, bias))
    # Depthwise kernels are small: left to autograd, which keeps them.
    if conv is None or (learns and groups != 1) or _must_be_straightforward(x, coefficients, cells, learns):
        return straightforward_conv(x, coefficients, cells, bias, grid, kernel_size, stride, padding, dilation, groups)
    if not learns:
        return convolve_in_chunks(x, coefficients, cells, bias, grid, kernel_size, conv)
    return _KernelWarehouseConv.apply(x, coefficients, cells, bias, grid, kernel_size, conv)


def as_convolution(
    kernel_size: tuple[int, ...], stride: tuple[int, ...], padding: Padding, dilation: tuple[int, ...], groups: int
) -> Convolution | None:
    """Return the arguments of a convolution with its padding in pixels, None if that differs from side to side."""
    if padding == 'valid':
        padding = (0,) * len(kernel_size)
    elif isinstance(padding, str):
        total = [d * (k - 1) for k, d in zip(kernel_size, dilation, strict=True)]
        if any(t % 2 for t in total):
            return None
        padding = tuple(t // 2 for t in total)
    return Convolution(stride, padding, dilation, groups)


def _must_be_straightforward(x: torch.Tensor, coefficients: torch.Tensor, cells: torch.Tensor, learns: bool) -> bool:
    return (
        _straightforward
        or torch.jit.is_tracing()
        or is_exporting()
        or (learns and torch.compiler.is_compiling())
        or x.shape[0] == 0
        or x.device.type == 'meta'
        or not x.dtype == coefficients.dtype == cells.dtype
    )


def _chunks(x: torch.Tensor, kernel_bytes: int) -> Iterator[slice]:
    """Slices of the batch, of like sizes, whose kernels are in memory at one time."""
    in_parts = x.device.type == 'cpu' and not is_making_graph()
    most = max(1, _CHUNK_BYTES // kernel_bytes)
    return _slices(x.shape[0], -(-x.shape[0] // most) if in_parts else 1)


def _slices(length: int, count: int) -> Iterator[slice]:
    for i in range(count):
        yield slice(length * i // count, length * (i + 1) // count)


def _kernel_bytes(x: torch.Tensor, coefficients: torch.Tensor, cells: torch.Tensor) -> int:
    return coefficients.shape[1] * math.prod(cells.shape[-x.dim() :]) * coefficients.element_size()


def _parts_of_cells(x: torch.Tensor, coefficients: torch.Tensor, cells: torch.Tensor) -> Iterator[slice]:
    """Slices of the cells' output channels for which the kernels of the whole batch are in memory at one time.

    Unlike slices of the batch, each adds to another part of the cells' gradient, which is large.
    """
    channels, needed = cells.shape[1], x.shape[0] * _kernel_bytes(x, coefficients, cells)
    return _slices(channels, min(channels, -(-needed // _BACKWARD_CHUNK_BYTES)) if x.device.type == 'cpu' else 1)


def convolve_in_chunks(
    x: torch.Tensor,
    coefficients: torch.Tensor,
    cells: torch.Tensor,
    bias: torch.Tensor | None,
    grid: Grid,
    kernel_size: tuple[int, ...],
    conv: Convolution,
    factors: torch.Tensor | None = None,
) -> torch.Tensor:
    """Make the kernels of some samples at a time and convolve. Not differentiable.

    Args:
        x: As of :func:`kernel_warehouse_conv`, as all that follow.
        coefficients: ``(B, m, n)``.
        cells: As of :func:`~kw_timm.layers.mixing.mix_cells`.
        bias: ``(O,)`` or None.
        grid: Grid of the mixtures.
        kernel_size: Window of the kernel.
        conv: The other arguments of the convolution.
        factors: ``(O,)``, what to multiply the kernels' output channels by, or None.

    Returns:
        ``(B, O, *spatial')``.
    """
    chunks = list(_chunks(x, _kernel_bytes(x, coefficients, cells)))
    if len(chunks) == 1:
        return convolve(x, mix_cells(coefficients, cells, grid, kernel_size, factors), conv, bias)
    channels = grid[1] * cells.shape[-x.dim()]
    y = x.new_empty(x.shape[0], channels, *conv.output_size(x, kernel_size))
    for chunk in chunks:
        kernels = mix_cells(coefficients[chunk], cells, grid, kernel_size, factors)
        convolve(x[chunk], kernels, conv, bias, out=y[chunk])
    return y


class _KernelWarehouseConv(torch.autograd.Function):
    """The layer's function with gradients, keeping inputs and coefficients instead of kernels."""

    @staticmethod
    def forward(ctx: Any, x, coefficients, cells, bias, grid, kernel_size, conv):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, coefficients, cells)
        ctx.arguments = grid, kernel_size, conv
        with torch.autocast(x.device.type, enabled=False):
            return convolve_in_chunks(x, coefficients, cells, bias, grid, kernel_size, conv)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad):  # type: ignore[no-untyped-def]
        with torch.autocast(grad.device.type, enabled=False):
            return _KernelWarehouseConv._backward(ctx, grad)

    @staticmethod
    def _backward(ctx: Any, grad):  # type: ignore[no-untyped-def]
        x, coefficients, cells = ctx.saved_tensors
        grid, kernel_size, conv = ctx.arguments
        need_x, need_coefficients, need_cells, need_bias = ctx.needs_input_grad[:4]
        grad_x = None
        grad_coefficients = coefficients.new_zeros(coefficients.shape) if need_coefficients else None
        grad_cells, is_first = sum_buffer(cells) if need_cells else (None, True)
        by_group = grad.unflatten(1, (grid[1], cells.shape[1]))
        for rows in _parts_of_cells(x, coefficients, cells):
            part = cells[:, rows]
            kernels = mix_cells(coefficients, part, grid, kernel_size)
            grad_input, grad_kernels = convolve_backward(
                by_group[:, :, rows].flatten(1, 2), x, kernels, conv, need_x, need_coefficients or need_cells
            )
            del kernels
            if grad_input is not None:
                grad_x = grad_input if grad_x is None else grad_x.add_(grad_input)
            if grad_kernels is None:
                continue
            mixtures = arrange_gradient(grad_kernels, part.shape[1:], grid).flatten(0, 1)
            del grad_kernels
            if grad_coefficients is not None:
                add_dot_products(grad_coefficients.flatten(0, 1), mixtures, part.flatten(1))
            if grad_cells is not None:
                left = coefficients.flatten(0, 1).t()
                add_products(grad_cells[:, rows].flatten(1)[None], left[None], mixtures[None], overwrite=is_first)
        grad_bias = grad.sum([0, *range(2, grad.dim())]) if need_bias else None
        return grad_x, grad_coefficients, grad_cells if is_first else None, grad_bias, None, None, None
