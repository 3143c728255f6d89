"""The default path of a KW layer for large batches: kernels by way of bases, which are made once per batch.

The logits of a mixture are linear in the attention's hidden vector ``h``. So with ``g = [h, 1]`` and the norm ``s`` of
the mixture's logits, ``s * sum_j (F g)_j E_j`` is also ``s * sum_k g_k D_k``, with bases ``D = F^T E``. The sum over
the warehouse's ``n`` cells is then taken once per batch for each of ``hidden + 1`` bases, instead of once per sample.

Bases are as large as the kernels of ``hidden + 1`` samples. They are made for some output channels at a time, the
kernels from them for some samples at a time, and for the gradients both are made again.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch._subclasses import FakeTensor
from torch.autograd.function import once_differentiable

from .buffers import empty_buffer, slices, sum_buffer
from .candidates import mix_and_convolve, mix_and_convolve_backward, without_blind_positions
from .choice import fastest
from .dynamic_conv import kernel_warehouse_conv
from .mixing import add_dot_products, add_products
from .modes import autocast_dtype, in_autocast_type, is_recording, is_straightforward, is_transforming, learns
from .spec import ConvSpec, check_input
from .straightforward import in_type_of, straightforward_conv

__all__ = ['bases_from_batch', 'conv_from_bases', 'conv_from_bases_or_cells', 'takes_bases']

# Bases, and kernels, in memory at one time; of the kernels there are two or three such in the backward pass. Elsewhere
# than on a CPU there are no caches to fit into, and every operation should be large.
_BASES_BYTES = 32 * 2**20
_KERNEL_BYTES = 40 * 2**20
_BACKWARD_KERNEL_BYTES = 16 * 2**20
_TIMES_ELSEWHERE = 32
# Operations by which bases must be fewer to be worth the trouble.
_GAIN = 1.25


def bases_from_batch(terms: int, cells: int) -> float:
    """Return the batch from which on ``terms`` bases per mixture cost less than mixing ``cells`` for every sample.

    A pass, forward or backward, costs ``terms * (cells + batch)`` with them and ``batch * cells`` without.
    """
    saved = cells - _GAIN * terms
    return math.ceil(_GAIN * terms * cells / saved) if saved > 0 else math.inf


def takes_bases(x: Any) -> bool:
    """Return whether :func:`conv_from_bases` takes inputs ``x`` now: where torch computes, and records nothing."""
    return (
        type(x) in (torch.Tensor, torch.nn.Parameter, FakeTensor)
        and x.device.type != 'meta'
        and not (is_straightforward() or torch.compiler.is_compiling() or is_recording() or is_transforming())
    )


def conv_from_bases(
    x: torch.Tensor,
    coefficients: torch.Tensor,
    maps: torch.Tensor,
    cells: torch.Tensor,
    bias: torch.Tensor | None,
    spec: ConvSpec,
) -> torch.Tensor:
    """Convolve each sample with the kernel that its coefficients make of bases, and those are made of the cells.

    Computes what :func:`~kw_timm.ops.kernel_warehouse_conv` does with coefficients ``coefficients @ maps``.

    Args:
        x: Inputs, ``(B, C, *spatial)``.
        coefficients: Coefficients of the bases, ``(B, m, T)``.
        maps: The bases' coefficients of the cells, ``(m, T, n)``.
        cells: Warehouse cells, ``(n, co, ci, *window)``.
        bias: ``(O,)`` or None, the same for all samples.
        spec: The layer's constants; one group.

    Returns:
        ``(B, O, *spatial')``.

    Raises:
        ValueError: If the input is not a batch, has no pixels or is smaller than the kernel.
    """
    check_input(x, spec)
    x, coefficients, maps, cells, bias = in_autocast_type(x, coefficients, maps, cells, bias)
    x = spec.pad_end(x)
    if not x.dtype == coefficients.dtype == maps.dtype == cells.dtype:
        return straightforward_conv(x, _of_cells(coefficients, maps), cells, bias, spec)
    spec, (coefficients, maps) = without_blind_positions(x, spec, (coefficients, 1), (maps, 0))
    given = (x, coefficients, maps, cells, bias)
    if learns(*given):
        return _ConvFromBases.apply(*given, spec)
    return _convolve(*given, spec)


def conv_from_bases_or_cells(
    x: torch.Tensor,
    coefficients: torch.Tensor,
    maps: torch.Tensor,
    cells: torch.Tensor,
    bias: torch.Tensor | None,
    spec: ConvSpec,
) -> torch.Tensor:
    """Convolve as :func:`conv_from_bases`, from bases or from cells, as is the fastest; that is measured.

    Where gradients are needed, they are measured too.
    """

    def from_cells(x: Any, coefficients: Any, maps: Any, cells: Any, bias: Any) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            mixing = _of_cells(coefficients, maps)
        return kernel_warehouse_conv(x, mixing, cells, bias, spec)

    differentiable = (x, coefficients, maps, cells, bias)
    ways: dict[str, Callable[..., torch.Tensor]] = {'bases': partial(conv_from_bases, spec=spec), 'cells': from_cells}
    needs = [t is not None and learns(t) for t in differentiable]
    trials = {name: partial(_try, way, differentiable) for name, way in ways.items()}
    key = ('layer', x.shape, maps.shape, cells.shape, cells.dtype, autocast_dtype(x), spec, *needs)
    return ways[fastest(key, trials, x)](*differentiable)


def _of_cells(coefficients: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
    """Return coefficients of the cells, ``(B, m, n)``, from those of the bases."""
    return torch.bmm(coefficients.transpose(0, 1), in_type_of(coefficients, maps)).transpose(0, 1)


def _try(way: Callable[..., torch.Tensor], tensors: Sequence[torch.Tensor | None]) -> None:
    """Compute forward and, where gradients are needed, backward, apart from the graph that there is."""
    apart = [None if t is None else t.detach().requires_grad_(t.requires_grad) for t in tensors]
    y = way(*apart)
    if y.requires_grad:
        torch.autograd.grad(y, [t for t in apart if t is not None and t.requires_grad], torch.ones_like(y))


def _rows_of_cells(maps: torch.Tensor, spec: ConvSpec) -> Iterator[slice]:
    """Slices of the cells' output channels whose bases are in memory at one time."""
    needed = maps.shape[0] * maps.shape[1] * math.prod(spec.cell_shape) * maps.element_size()
    return slices(spec.cell_shape[0], -(-needed // _most(maps, _BASES_BYTES)))


def _samples(x: torch.Tensor, spec: ConvSpec, most: int) -> Iterator[slice]:
    """Slices of the batch whose kernels are in memory at one time."""
    needed = x.shape[0] * math.prod(spec.grid) * math.prod(spec.cell_shape) * x.element_size()
    return slices(x.shape[0], -(-needed // _most(x, most)))


def _most(like: torch.Tensor, size: int) -> int:
    return size if like.device.type == 'cpu' else size * _TIMES_ELSEWHERE


def _make_bases(maps: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
    """Return ``(m, T, co, ci, *window)``."""
    bases = empty_buffer((*maps.shape[:2], *cells.shape[1:]), maps)
    flat = bases.view(1, maps.shape[0] * maps.shape[1], -1)
    add_products(flat, maps.flatten(0, 1)[None], cells.flatten(1)[None], overwrite=True)
    return bases


def _convolve(
    x: torch.Tensor,
    coefficients: torch.Tensor,
    maps: torch.Tensor,
    cells: torch.Tensor,
    bias: torch.Tensor | None,
    spec: ConvSpec,
) -> torch.Tensor:
    y = x.new_empty(x.shape[0], spec.kernel_shape[0], *spec.output_size(x))
    by_group = y.unflatten(1, (spec.grid[1], spec.cell_shape[0]))
    for rows in _rows_of_cells(maps, spec):
        part = spec.narrow(rows.stop - rows.start)
        bases = _make_bases(maps, cells[:, rows])
        for chunk in _samples(x, part, _KERNEL_BYTES):
            if part == spec:
                mix_and_convolve(x[chunk], coefficients[chunk], bases, spec, out=y[chunk])
            else:
                found = mix_and_convolve(x[chunk], coefficients[chunk], bases, part)
                by_group[chunk, :, rows] = found.unflatten(1, (spec.grid[1], -1))
    return y if bias is None else y.add_(bias.view(-1, *(1,) * (y.dim() - 2)))


class _ConvFromBases(torch.autograd.Function):
    """The layer's function with gradients, keeping what bases are made of instead of bases and kernels."""

    @staticmethod
    def forward(ctx: Any, x, coefficients, maps, cells, bias, spec):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, coefficients, maps, cells)
        ctx.spec = spec
        # Saved tensors may come back as others; whose gradient it is does not change.
        ctx.parameter = cells if cells.is_leaf and cells.requires_grad else None
        with torch.autocast(x.device.type, enabled=False):
            return _convolve(x, coefficients, maps, cells, bias, spec)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad):  # type: ignore[no-untyped-def]
        with torch.autocast(grad.device.type, enabled=False):
            return _ConvFromBases._backward(ctx, grad)

    @staticmethod
    def _backward(ctx: Any, grad):  # type: ignore[no-untyped-def]
        x, coefficients, maps, cells = ctx.saved_tensors
        spec: ConvSpec = ctx.spec
        need_x, need_coefficients, need_maps, need_cells, need_bias = ctx.needs_input_grad[:5]
        need_bases = need_maps or need_cells
        mixtures, terms, _ = maps.shape
        grad_x = torch.zeros_like(x, memory_format=torch.contiguous_format) if need_x else None
        # By mixture first, so that the rows of each lie side by side.
        grad_coefficients = coefficients.new_zeros(mixtures, len(x), terms) if need_coefficients else None
        grad_maps = maps.new_zeros(maps.shape) if need_maps else None
        grad_cells, is_first = sum_buffer(cells, ctx.parameter) if need_cells else (None, True)
        by_group = grad.unflatten(1, (spec.grid[1], spec.cell_shape[0]))
        for rows in _rows_of_cells(maps, spec):
            part = spec.narrow(rows.stop - rows.start)
            part_cells = cells[:, rows]
            bases = _make_bases(maps, part_cells)
            flat = bases.flatten(2)
            grad_bases = torch.empty_like(flat) if need_bases else None
            for chunk in _samples(x, part, _BACKWARD_KERNEL_BYTES):
                grad_input, grad_mixed = mix_and_convolve_backward(
                    by_group[chunk, :, rows].flatten(1, 2),
                    x[chunk],
                    coefficients[chunk],
                    bases,
                    part,
                    need_x,
                    need_coefficients or need_bases,
                )
                if grad_x is not None and grad_input is not None:
                    grad_x[chunk] += grad_input
                if grad_mixed is None:
                    continue
                grad_mixed = grad_mixed.transpose(0, 1)
                if grad_coefficients is not None:
                    for i in range(mixtures):
                        add_dot_products(grad_coefficients[i, chunk], grad_mixed[i], flat[i])
                if grad_bases is not None:
                    left = coefficients[chunk].permute(1, 2, 0)
                    add_products(grad_bases, left, grad_mixed, overwrite=chunk.start == 0)
            if grad_bases is None:
                continue
            by_basis = grad_bases.flatten(0, 1)
            if grad_maps is not None:
                add_dot_products(grad_maps.flatten(0, 1), by_basis, part_cells.flatten(1))
            if grad_cells is not None:
                left = maps.flatten(0, 1).t()
                add_products(grad_cells[:, rows].flatten(1)[None], left[None], by_basis[None], overwrite=is_first)
        grad_bias = grad.sum([0, *range(2, grad.dim())]) if need_bias else None
        return (
            grad_x,
            None if grad_coefficients is None else grad_coefficients.transpose(0, 1),
            grad_maps,
            grad_cells if is_first else None,
            grad_bias,
            None,
        )
