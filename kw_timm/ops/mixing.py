"""Kernels from cells, quickly: every cell is read once, and kernels are written in the order convolutions want.

On a CPU a small compiled module does it at the speed of memory; elsewhere, and where it could not be compiled, torch's
matrix products do. Both agree with :func:`~kw_timm.ops.assemble_kernels`.
"""

import math
from array import array
from collections.abc import Sequence
from functools import lru_cache

import torch

from . import native
from .buffers import empty_buffer
from .modes import is_plain
from .spec import ConvSpec
from .straightforward import arrange_kernels, mix

__all__ = ['add_dot_products', 'add_products', 'mix_cells']

# From three times so many rows, and so many cells on, dot products are an ordinary product of matrices.
_LARGE = 32


def mix_cells(
    coefficients: torch.Tensor, cells: torch.Tensor, spec: ConvSpec, factors: torch.Tensor | None = None
) -> torch.Tensor:
    """Make every sample's kernel. Not differentiable.

    Args:
        coefficients: ``(B, m, n)``.
        cells: ``(n, co, ci, *window)``, the same for all mixtures; or ``(m, n, co, ci, *window)``, each mixture's own.
            May be stored in fewer bits than the coefficients, as bfloat16 or int8.
        spec: The layer's constants.
        factors: ``(O,)``, what to multiply output channels by.

    Returns:
        Kernels of the type of the coefficients, ``(B, O, I / groups, *kernel_size)``, contiguous.
    """
    if cells.dim() == 1 + len(spec.cell_shape):
        cells = cells[None]
    if is_plain(coefficients):
        return _mix_natively(coefficients, cells, spec, factors)
    return torch.ops.kw_timm.mix_cells(coefficients, cells, spec.layout, factors)


def _mix_with_matmul(
    coefficients: torch.Tensor, cells: torch.Tensor, spec: ConvSpec, factors: torch.Tensor | None
) -> torch.Tensor:
    kernels = arrange_kernels(mix(coefficients, cells, spec), spec)
    if factors is not None:
        kernels = kernels * factors.view(-1, *(1,) * (kernels.dim() - 2))
    return kernels.contiguous()


def _mix_natively(
    coefficients: torch.Tensor, cells: torch.Tensor, spec: ConvSpec, factors: torch.Tensor | None
) -> torch.Tensor:
    if coefficients.dtype != native.computes_in(cells.dtype):
        return _mix_with_matmul(coefficients, cells, spec, factors)
    cells, factors = _with_plain_rows(cells, 2), None if factors is None else factors.contiguous()
    (batch, mixtures, _), groups = coefficients.shape, cells.shape[0]
    coefficients = _with_plain_rows(coefficients, 2)
    if groups == 1 and 1 not in (batch, mixtures) and coefficients.stride(0) != mixtures * coefficients.stride(1):
        coefficients = coefficients.contiguous()
    by_sample = groups > 1 or mixtures == 1
    kernels = empty_buffer((batch, *spec.kernel_shape), coefficients)
    native.mix(
        kernels,
        coefficients,
        cells,
        factors,
        _offsets(spec, batch, groups > 1),
        groups=groups,
        rows=batch if groups > 1 else batch * mixtures,
        strides=(coefficients.stride(1), coefficients.stride(0) if by_sample else coefficients.stride(1), 1),
        width=math.prod(spec.cell_shape[1:]),
        out_stride=math.prod(spec.kernel_shape[1:]),
        in_stride=spec.grid[0],
        channels=spec.kernel_shape[0],
    )
    return kernels


def _with_plain_rows(tensor: torch.Tensor, axes: int) -> torch.Tensor:
    """Return a tensor whose elements behind the first ``axes`` axes lie side by side, copied if need be."""
    expected = 1
    for axis in range(tensor.dim() - 1, axes - 1, -1):
        if tensor.shape[axis] != 1 and tensor.stride(axis) != expected:
            return tensor.contiguous()
        expected *= tensor.shape[axis]
    return tensor


def add_products(out: torch.Tensor, left: torch.Tensor, right: torch.Tensor, *, overwrite: bool = False) -> None:
    """Add ``left @ right``, as ``torch.baddbmm``: fast where ``left`` is small and the other two are wide.

    Args:
        out: ``(G, rows, length)``, the last axis contiguous.
        left: ``(G, rows, n)``.
        right: ``(G, n, length)``.
        overwrite: Take what is in ``out`` for zeros.
    """
    if not _served(out):
        torch.baddbmm(out, left, right, beta=0 if overwrite else 1, out=out)
        return
    groups, rows, length = out.shape
    native.mix(
        out,
        left,
        _with_plain_rows(right, 2),
        None,
        _rows(groups, rows, out.stride(0), out.stride(1)),
        groups=groups,
        rows=rows,
        strides=(left.stride(0), left.stride(1), left.stride(2)),
        width=length,
        out_stride=length,
        add=not overwrite,
    )


def add_dot_products(out: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add ``left @ right.T``: the gradient that coefficients get from kernels.

    Args:
        out: ``(rows, n)``, contiguous.
        left: Gradients of the mixtures, ``(rows, length)``.
        right: Cells, ``(n, length)``.
    """
    large = min(len(left) // 3, len(right)) >= _LARGE and torch.backends.mkl.is_available()
    if _served(out) and not large:
        native.add_dots(out, _with_plain_rows(left, 1), _with_plain_rows(right, 1))
    else:
        torch.addmm(out, left, right.t(), out=out)  # Unlike the method, counted by FlopCounterMode.


def _served(out: torch.Tensor) -> bool:
    return native.computes_in(out.dtype) == out.dtype and is_plain(out)


@lru_cache(maxsize=1024)
def _offsets(spec: ConvSpec, batch: int, by_mixture: bool) -> 'array[int]':
    """Where each mixture's cell begins among the batch's kernels: ``(B, m)``, or ``(m, B)``; in no mode of torch."""
    (positions, out_groups, in_groups), (cell_out, cell_in, *window) = spec.grid, spec.cell_shape
    kernel, channel = math.prod(spec.kernel_shape), math.prod(spec.kernel_shape[1:])
    by_input = cell_in * positions * math.prod(window)
    starts = [
        position + o * cell_out * channel + i * by_input
        for position in range(positions)
        for o in range(out_groups)
        for i in range(in_groups)
    ]
    if by_mixture:
        return array('q', (sample * kernel + start for start in starts for sample in range(batch)))
    return array('q', (sample * kernel + start for sample in range(batch) for start in starts))


@lru_cache(maxsize=1024)
def _rows(groups: int, rows: int, group_stride: int, row_stride: int) -> 'array[int]':
    return array('q', (g * group_stride + r * row_stride for g in range(groups) for r in range(rows)))


def _spec_of(cells: torch.Tensor, layout: Sequence[int]) -> ConvSpec:
    grid = (int(layout[0]), int(layout[1]), int(layout[2]))
    return ConvSpec.of(grid, tuple(cells.shape[2:]), tuple(layout[3:]))


def _mix_anywhere(
    coefficients: torch.Tensor, cells: torch.Tensor, layout: Sequence[int], factors: torch.Tensor | None
) -> torch.Tensor:
    return _mix_with_matmul(coefficients, cells, _spec_of(cells, layout), factors)


def _mix_on_cpu(
    coefficients: torch.Tensor, cells: torch.Tensor, layout: Sequence[int], factors: torch.Tensor | None
) -> torch.Tensor:
    return _mix_natively(coefficients, cells, _spec_of(cells, layout), factors)


def _mix_fake(
    coefficients: torch.Tensor, cells: torch.Tensor, layout: Sequence[int], factors: torch.Tensor | None
) -> torch.Tensor:
    return coefficients.new_empty(coefficients.shape[0], *_spec_of(cells, layout).kernel_shape)


_library = torch.library.Library('kw_timm', 'FRAGMENT')
_library.define('mix_cells(Tensor coefficients, Tensor cells, int[] layout, Tensor? factors) -> Tensor')
_library.impl('mix_cells', _mix_on_cpu, 'CPU')
for _backend in ('CUDA', 'MPS', 'XPU', 'HPU', 'XLA', 'MTIA', 'IPU', 'VE', 'Lazy', 'PrivateUse1'):
    _library.impl('mix_cells', _mix_anywhere, _backend)
torch.library.register_fake('kw_timm::mix_cells', _mix_fake, lib=_library)
