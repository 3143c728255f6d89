"""Kernels from cells, quickly: every cell is read once, and kernels are written in the order convolutions want.

On a CPU a small compiled module does it at the speed of memory; elsewhere, and where it could not be compiled, torch's
matrix products do. Both agree with :func:`~kw_timm.layers.assemble_kernels`.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from types import ModuleType

import torch

from .buffers import empty_buffer
from .functional import arrange_kernels
from .native import module as _mixing

__all__ = [
    'add_dot_products',
    'add_products',
    'compiled',
    'compiled_module',
    'is_exporting',
    'is_making_graph',
    'is_plain',
    'mix_cells',
]

Grid = tuple[int, int, int]

# Before torch 2.7 exporting and compiling could not be told apart.
is_exporting = getattr(torch.compiler, 'is_exporting', torch.compiler.is_compiling)


def is_making_graph() -> bool:
    """Return whether what runs is being recorded, and should then serve any batch size."""
    return bool(torch.compiler.is_compiling() or torch.jit.is_tracing())


# Codes of the compiled module: coefficients and kernels are float64 in the second, float32 in the others.
_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.int8: 3}


def compiled() -> bool:
    """Return whether the compiled module is there."""
    return _mixing is not None


def compiled_module() -> ModuleType | None:
    """Return the compiled module."""
    return _mixing


def mix_cells(
    coefficients: torch.Tensor,
    cells: torch.Tensor,
    grid: Grid,
    kernel_size: Sequence[int],
    factors: torch.Tensor | None = None,
) -> torch.Tensor:
    """Make every sample's kernel. Not differentiable.

    Args:
        coefficients: ``(B, m, n)``.
        cells: ``(n, co, ci, *window)``, the same for all mixtures; or ``(m, n, co, ci, *window)``, each mixture's own.
            May be stored in fewer bits than the coefficients, as bfloat16 or int8.
        grid: ``(spatial positions, output groups, input groups)`` of the ``m`` mixtures.
        kernel_size: Window of the kernel.
        factors: ``(O,)``, what to multiply output channels by.

    Returns:
        Kernels of the type of the coefficients, ``(B, O, I / groups, *kernel_size)``, contiguous.
    """
    if cells.dim() == 3 + len(kernel_size):
        cells = cells[None]
    if is_exporting() or torch.jit.is_tracing():
        return _mix_with_matmul(coefficients, cells, grid, kernel_size, factors)
    if is_plain(coefficients):
        return _mix_compiled(coefficients, cells, grid, kernel_size, factors)
    return torch.ops.kw_timm.mix_cells(coefficients, cells, grid, kernel_size, factors)


def is_plain(tensor: torch.Tensor) -> bool:
    """Return whether a tensor can be computed on at once, which saves what torch takes to find that out."""
    return type(tensor) is torch.Tensor and tensor.device.type == 'cpu' and not torch.compiler.is_compiling()


def _mix_with_matmul(
    coefficients: torch.Tensor,
    cells: torch.Tensor,
    grid: Sequence[int],
    kernel_size: Sequence[int],
    factors: torch.Tensor | None,
) -> torch.Tensor:
    cells = cells.to(coefficients.dtype)
    if cells.shape[0] == 1:
        mixed = coefficients @ cells[0].flatten(1)
    else:
        mixed = torch.bmm(coefficients.transpose(0, 1), cells.flatten(2)).transpose(0, 1)
    kernels = arrange_kernels(mixed, cells.shape[2:], grid, kernel_size)
    if factors is not None:
        kernels = kernels * factors.view(-1, *(1,) * (kernels.dim() - 2))
    return kernels.contiguous()


def _mix_compiled(
    coefficients: torch.Tensor,
    cells: torch.Tensor,
    grid: Sequence[int],
    kernel_size: Sequence[int],
    factors: torch.Tensor | None,
) -> torch.Tensor:
    code = _CODES.get(cells.dtype)
    mixes = torch.float64 if code == 1 else torch.float32
    if _mixing is None or code is None or coefficients.dtype != mixes:
        return _mix_with_matmul(coefficients, cells, grid, kernel_size, factors)
    if factors is not None and factors.dtype != mixes:
        raise ValueError(f'Expected factors of type {mixes}, as the coefficients, got {factors.dtype}.')
    cells, factors = _with_plain_rows(cells, 2), None if factors is None else factors.contiguous()
    (batch, mixtures, num_cells), groups = coefficients.shape, cells.shape[0]
    coefficients = _with_plain_rows(coefficients, 2)
    if groups == 1 and 1 not in (batch, mixtures) and coefficients.stride(0) != mixtures * coefficients.stride(1):
        coefficients = coefficients.contiguous()
    by_sample = groups > 1 or mixtures == 1
    cell_shape = tuple(cells.shape[2:])
    positions, out_groups, in_groups = grid
    window = math.prod(cell_shape[2:])
    line = in_groups * cell_shape[1] * positions * window
    shape = (batch, out_groups * cell_shape[0], in_groups * cell_shape[1], *kernel_size)
    kernels = empty_buffer(shape, coefficients)
    offsets = _offsets(tuple(grid), cell_shape, batch, groups > 1)
    _mixing.mix(
        kernels.data_ptr(),
        coefficients.data_ptr(),
        cells.data_ptr(),
        0 if factors is None else factors.data_ptr(),
        offsets.data_ptr(),
        code,
        False,
        groups,
        batch if groups > 1 else batch * mixtures,
        num_cells,
        math.prod(cell_shape),
        cell_shape[1] * window,
        coefficients.stride(1),  # from one group to the next
        coefficients.stride(0) if by_sample else coefficients.stride(1),  # from one row to the next
        1,
        cells.stride(0),
        cells.stride(1),
        line,
        positions,
        kernels.shape[1],
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
    module, code = _module_for(out)
    if module is None:
        torch.baddbmm(out, left, right, beta=0 if overwrite else 1, out=out)
        return
    right = _with_plain_rows(right, 2)
    (groups, rows, num_cells), length = left.shape, right.shape[2]
    offsets = (torch.arange(groups)[:, None] * out.stride(0) + torch.arange(rows) * out.stride(1)).contiguous()
    module.mix(
        out.data_ptr(),
        left.data_ptr(),
        right.data_ptr(),
        0,
        offsets.data_ptr(),
        code,
        not overwrite,
        groups,
        rows,
        num_cells,
        length,
        length,
        left.stride(0),
        left.stride(1),
        left.stride(2),
        right.stride(0),
        right.stride(1),
        length,
        1,
        1,
    )


def add_dot_products(out: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add ``left @ right.T``: the gradient that coefficients get from kernels.

    Args:
        out: ``(rows, n)``, contiguous.
        left: Gradients of the mixtures, ``(rows, length)``.
        right: Cells, ``(n, length)``.
    """
    module, code = _module_for(out)
    if module is None:
        out.addmm_(left, right.t())
        return
    left, right = _with_plain_rows(left, 1), _with_plain_rows(right, 1)
    module.add_dots(
        out.data_ptr(),
        left.data_ptr(),
        right.data_ptr(),
        code,
        *out.shape,
        left.shape[1],
        left.stride(0),
        right.stride(0),
    )


def _module_for(tensor: torch.Tensor) -> tuple[ModuleType | None, int]:
    """Return the compiled module and its code for a tensor's type; no module where torch has to do."""
    code = _CODES.get(tensor.dtype, 0)
    serves = tensor.device.type == 'cpu' and tensor.dtype in (torch.float32, torch.float64)
    return (_mixing if serves else None), code


@lru_cache(maxsize=1024)
def _offsets(grid: Grid, cell_shape: tuple[int, ...], batch: int, by_mixture: bool) -> torch.Tensor:
    """Where each mixture's cell begins among the batch's kernels: ``(B, m)``, or ``(m, B)``."""
    positions, out_groups, in_groups = (torch.arange(size) for size in grid)
    window = math.prod(cell_shape[2:])
    line = grid[2] * cell_shape[1] * grid[0] * window
    by_input = in_groups * cell_shape[1] * grid[0] * window
    starts = positions[:, None, None] + (out_groups * cell_shape[0] * line)[:, None] + by_input
    samples = torch.arange(batch) * (grid[1] * cell_shape[0] * line)
    offsets = samples[:, None] + starts.flatten()
    return (offsets.t() if by_mixture else offsets).contiguous()


_library = torch.library.Library('kw_timm', 'FRAGMENT')
_library.define(
    'mix_cells(Tensor coefficients, Tensor cells, int[] grid, int[] kernel_size, Tensor? factors) -> Tensor'
)
_library.impl('mix_cells', _mix_compiled, 'CPU')
_library.impl('mix_cells', _mix_with_matmul, 'CUDA')


@torch.library.register_fake('kw_timm::mix_cells', lib=_library)
def _mix_fake(
    coefficients: torch.Tensor,
    cells: torch.Tensor,
    grid: Sequence[int],
    kernel_size: Sequence[int],
    factors: torch.Tensor | None,
) -> torch.Tensor:
    return coefficients.new_empty(
        coefficients.shape[0], grid[1] * cells.shape[2], grid[2] * cells.shape[3], *kernel_size
    )
