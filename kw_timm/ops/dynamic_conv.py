"""The default path of a KW layer: exact, like the straightforward one, but quick and with little memory.

Kernels of a few samples at a time are made, used and forgotten; for the gradients they are made again, which costs
less than keeping them. Exported and traced graphs consist of products (:mod:`~kw_timm.ops.products`), in compiled
ones convolving is an operator (:mod:`~kw_timm.ops.compiled_conv`).
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .buffers import slices, sum_buffer
from .candidates import mix_and_convolve, mix_and_convolve_backward, without_blind_positions
from .compiled_conv import conv_in_compiled_graph
from .convolution import conv_pointwise
from .mixing import add_dot_products, add_products, mix_cells
from .modes import autocast_dtype, in_autocast_type, is_recording, is_straightforward, is_transforming, learns
from .products import conv_by_products
from .spec import ConvSpec, check_input
from .straightforward import assemble_kernels, in_type_of, straightforward_conv

__all__ = ['convolve_fixed', 'kernel_warehouse_conv']

# Kernels in memory at one time: few enough that they are still in a cache when they are used, enough that every cell
# read serves many rows. In the backward pass there are the kernels, their gradients, and those in another order.
_CHUNK_BYTES = 40 * 2**20
_BACKWARD_CHUNK_BYTES = 16 * 2**20


def kernel_warehouse_conv(
    x: torch.Tensor, coefficients: torch.Tensor, cells: torch.Tensor, bias: torch.Tensor | None, spec: ConvSpec
) -> torch.Tensor:
    """Convolve each sample with the kernel that its coefficients make of the cells.

    Args:
        x: Inputs, ``(B, C, *spatial)``.
        coefficients: Attention, ``(B, m, n)``.
        cells: Warehouse cells, ``(n, co, ci, *window)``.
        bias: ``(O,)`` or None, the same for all samples.
        spec: The layer's constants.

    Returns:
        ``(B, O, *spatial')``.

    Raises:
        ValueError: If the input is not a batch, has no pixels or is smaller than the kernel.
    """
    check_input(x, spec)
    x, coefficients, cells, bias = in_autocast_type(x, coefficients, cells, bias)
    x = spec.pad_end(x)
    if is_recording() and not is_straightforward():
        return conv_by_products(x, coefficients, cells, bias, spec)
    is_learning = learns(x, coefficients, cells, bias)
    if torch.compiler.is_compiling() and not is_straightforward() and x.shape[0] != 0:
        make = assemble_kernels if is_learning else mix_cells
        return _convolve_compiled(x, in_type_of(x, make(coefficients, cells, spec)), bias, spec)
    # Depthwise kernels are small: left to autograd, which keeps them.
    if (is_learning and spec.groups != 1) or _must_be_straightforward(x, coefficients, cells):
        return straightforward_conv(x, coefficients, cells, bias, spec)
    spec, (coefficients,) = without_blind_positions(x, spec, (coefficients, 1))
    if not is_learning:
        return _convolve_in_chunks(x, coefficients, cells, bias, spec)
    return _KernelWarehouseConv.apply(x, coefficients, cells, bias, spec)


def convolve_fixed(
    x: torch.Tensor,
    coefficients: torch.Tensor,
    cells: torch.Tensor,
    bias: torch.Tensor | None,
    spec: ConvSpec,
    factors: torch.Tensor | None = None,
) -> torch.Tensor:
    """Convolve as :func:`kernel_warehouse_conv` does, at fixed weights. Not differentiable.

    Args:
        x: ``(B, C, *spatial)``.
        coefficients: ``(B, m, n)``.
        cells: As of :func:`~kw_timm.ops.mixing.mix_cells`: also one set per mixture, or stored in fewer bits.
        bias: ``(O,)`` or None.
        spec: The layer's constants.
        factors: ``(O,)``, what to multiply the kernels' output channels by, or None.

    Returns:
        ``(B, O, *spatial')``.

    Raises:
        ValueError: As :func:`kernel_warehouse_conv`.
    """
    check_input(x, spec)
    x = spec.pad_end(x.to(autocast_dtype(x) or x.dtype))
    bias = None if bias is None else bias.to(x.dtype)
    if is_recording():
        return conv_by_products(x, coefficients, cells, bias, spec, factors)
    if torch.compiler.is_compiling() and x.shape[0] != 0:
        return _convolve_compiled(x, in_type_of(x, mix_cells(coefficients, cells, spec, factors)), bias, spec)
    if cells.dim() == 1 + len(spec.cell_shape):
        spec, (coefficients,) = without_blind_positions(x, spec, (coefficients, 1))
    else:
        spec, (coefficients, cells) = without_blind_positions(x, spec, (coefficients, 1), (cells, 0))
    return _convolve_in_chunks(x, coefficients, cells, bias, spec, factors)


def _convolve_compiled(
    x: torch.Tensor, kernels: torch.Tensor, bias: torch.Tensor | None, spec: ConvSpec
) -> torch.Tensor:
    return (conv_pointwise if spec.is_pointwise else conv_in_compiled_graph)(x, kernels, bias, spec)


def _must_be_straightforward(x: torch.Tensor, coefficients: torch.Tensor, cells: torch.Tensor) -> bool:
    return (
        is_straightforward()
        or is_transforming()
        or x.shape[0] == 0
        or x.device.type == 'meta'
        or not x.dtype == coefficients.dtype == cells.dtype
    )


def _chunks(x: torch.Tensor, kernel_bytes: int) -> Iterator[slice]:
    """Slices of the batch, of like sizes, whose kernels are in memory at one time."""
    most = max(1, _CHUNK_BYTES // kernel_bytes)
    return slices(x.shape[0], -(-x.shape[0] // most) if x.device.type == 'cpu' else 1)


def _parts_of_cells(x: torch.Tensor, spec: ConvSpec) -> Iterator[slice]:
    """Slices of the cells' output channels for which the kernels of the whole batch are in memory at one time.

    Unlike slices of the batch, each adds to another part of the cells' gradient, which is large.
    """
    channels, needed = spec.cell_shape[0], x.shape[0] * _kernel_bytes(x, spec)
    return slices(channels, -(-needed // _BACKWARD_CHUNK_BYTES) if x.device.type == 'cpu' else 1)


def _kernel_bytes(x: torch.Tensor, spec: ConvSpec) -> int:
    return math.prod(spec.kernel_shape) * x.element_size()


def _convolve_in_chunks(
    x: torch.Tensor,
    coefficients: torch.Tensor,
    cells: torch.Tensor,
    bias: torch.Tensor | None,
    spec: ConvSpec,
    factors: torch.Tensor | None = None,
) -> torch.Tensor:
    """Make the kernels of some samples at a time and convolve."""
    chunks = list(_chunks(x, _kernel_bytes(coefficients, spec)))
    if len(chunks) == 1:
        return mix_and_convolve(x, coefficients, cells, spec, bias, factors)
    y = x.new_empty(x.shape[0], spec.kernel_shape[0], *spec.output_size(x))
    for chunk in chunks:
        mix_and_convolve(x[chunk], coefficients[chunk], cells, spec, bias, factors, out=y[chunk])
    return y


class _KernelWarehouseConv(torch.autograd.Function):
    """The layer's function with gradients, keeping inputs and coefficients instead of kernels."""

    @staticmethod
    def forward(ctx: Any, x, coefficients, cells, bias, spec):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, coefficients, cells)
        ctx.spec = spec
        # Saved tensors may come back as others; whose gradient it is does not change.
        ctx.parameter = cells if cells.is_leaf and cells.requires_grad else None
        with torch.autocast(x.device.type, enabled=False):
            y = _convolve_in_chunks(x, coefficients, cells, bias, spec)
            # A view made in here could not be changed in place, as an activation behind the layer may want to.
            return torch.ops.aten._unsafe_view(y, y.shape) if y._is_view() else y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad):  # type: ignore[no-untyped-def]
        with torch.autocast(grad.device.type, enabled=False):
            return _KernelWarehouseConv._backward(ctx, grad)

    @staticmethod
    def _backward(ctx: Any, grad):  # type: ignore[no-untyped-def]
        x, coefficients, cells = ctx.saved_tensors
        spec: ConvSpec = ctx.spec
        need_x, need_coefficients, need_cells, need_bias = ctx.needs_input_grad[:4]
        grad_x = None
        grad_coefficients = coefficients.new_zeros(coefficients.shape) if need_coefficients else None
        grad_cells, is_first = sum_buffer(cells, ctx.parameter) if need_cells else (None, True)
        by_group = grad.unflatten(1, (spec.grid[1], cells.shape[1]))
        for rows in _parts_of_cells(x, spec):
            part, part_spec = cells[:, rows], spec.narrow(rows.stop - rows.start)
            grad_input, grad_mixed = mix_and_convolve_backward(
                by_group[:, :, rows].flatten(1, 2),
                x,
                coefficients,
                part,
                part_spec,
                need_x,
                need_coefficients or need_cells,
            )
            if grad_input is not None:
                grad_x = grad_input if grad_x is None else grad_x.add_(grad_input)
            if grad_mixed is None:
                continue
            mixtures = grad_mixed.flatten(0, 1)
            del grad_mixed
            if grad_coefficients is not None:
                add_dot_products(grad_coefficients.flatten(0, 1), mixtures, part.flatten(1))
            if grad_cells is not None:
                left = coefficients.flatten(0, 1).t()
                add_products(grad_cells[:, rows].flatten(1)[None], left[None], mixtures[None], overwrite=is_first)
        grad_bias = grad.sum([0, *range(2, grad.dim())]) if need_bias else None
        return grad_x, grad_coefficients, grad_cells if is_first else None, grad_bias, None
