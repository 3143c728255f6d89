"""The compiled module of ``kw_timm/csrc``, and the one door through which it is handed addresses.

What is behind the door trusts what it gets, so every tensor that passes is checked: its kind, device, layout and type.
"""

import math
import os
from array import array
from collections.abc import Sequence
from types import ModuleType

import torch

module: ModuleType | None
try:
    from .. import _mixing as module
except ImportError:  # installed without a compiler
    module = None

__all__ = ['add_dots', 'attend', 'computes_in', 'instructions', 'mix', 'module', 'use_huge_pages']

# The widest instructions to use, so that one kind of processor can measure for another; the name -> bytes of a vector.
ISA_VARIABLE = 'KW_TIMM_ISA'
_VECTORS = {'avx512': 64, 'avx2': 32, 'any': 16}


def _use_widest() -> str | None:
    wanted = os.environ.get(ISA_VARIABLE) or 'avx512'
    if wanted not in _VECTORS:
        raise ValueError(f"{ISA_VARIABLE}='{wanted}' is not known; use one of {', '.join(_VECTORS)}, or unset it.")
    if module is None:
        return None
    used = module.use_vectors(_VECTORS[wanted])
    return next(name for name, size in _VECTORS.items() if size == used)


_instructions = _use_widest()


def instructions() -> str | None:
    """Return the instructions that the module uses since its import, ``'avx512'``, ``'avx2'`` or ``'any'``, or None."""
    return _instructions


# How cells are stored -> the module's code for it, and the type of coefficients and results.
_TYPES = {
    torch.float32: (0, torch.float32),
    torch.float64: (1, torch.float64),
    torch.bfloat16: (2, torch.float32),
    torch.int8: (3, torch.float32),
}
# Subclasses with another are not memory, but what stands for it.
_DISPATCH = torch.Tensor.__torch_dispatch__


def computes_in(stored: torch.dtype) -> torch.dtype | None:
    """Return the type that cells stored in ``stored`` are mixed in; None if the module cannot, or is not there."""
    return _TYPES[stored][1] if module is not None and stored in _TYPES else None


def _address(tensor: torch.Tensor, dtype: torch.dtype, what: str) -> int:
    if (
        type(tensor).__torch_dispatch__ is _DISPATCH
        and tensor.dtype == dtype
        and tensor.device.type == 'cpu'
        and tensor.layout is torch.strided
        and not tensor.is_neg()
    ):
        return tensor.data_ptr()
    raise TypeError(
        f'{what}: the compiled module takes plain {dtype} tensors in the memory of the CPU, got a '
        f'{type(tensor).__name__} of {tensor.dtype} on {tensor.device}. This is a fault of kw_timm; '
        f'please report it, and compute within kw_timm.layers.straightforward() meanwhile.'
    )


def mix(
    out: torch.Tensor,
    coefficients: torch.Tensor,
    cells: torch.Tensor,
    factors: torch.Tensor | None,
    offsets: 'array[int]',
    *,
    groups: int,
    rows: int,
    strides: tuple[int, int, int],
    width: int,
    out_stride: int,
    in_stride: int = 1,
    channels: int = 1,
    add: bool = False,
) -> None:
    """Write sums of cells: ``out[offsets[g, r] + place(c)] = sum_j coefficients[g, r, j] * cells[g, j, c]``.

    Args:
        out: Results, float32 or float64; written through ``offsets``.
        coefficients: ``groups x rows x n`` by ``strides``, of the type of ``out``.
        cells: ``(groups, n, *cell)``, each cell contiguous; of the type of ``out`` or stored in fewer bits.
        factors: ``(channels,)``, what output channels are multiplied by, or None.
        offsets: Where the sum of each group and row begins in ``out``, in elements.
        groups: Groups of cells.
        rows: Sums per group.
        strides: Elements from one group, row and cell to the next in ``coefficients``.
        width: Elements of a cell that lie on one line of ``out``; the next ``width`` go on the next line.
        out_stride: Elements of ``out`` from line to line.
        in_stride: Elements of ``out`` from one element of a line to the next.
        channels: Lines of a whole kernel.
        add: Add to what is in ``out``.
    """
    assert module is not None
    code, computes = _TYPES[cells.dtype]
    if len(offsets) != groups * rows:
        raise ValueError(f'Expected {groups * rows} offsets, got {len(offsets)}.')
    module.mix(
        _address(out, computes, 'out'),
        _address(coefficients, computes, 'coefficients'),
        _address(cells, cells.dtype, 'cells'),
        0 if factors is None else _address(factors, computes, 'factors'),
        offsets.buffer_info()[0],
        code,
        add,
        groups,
        rows,
        cells.shape[1],
        math.prod(cells.shape[2:]),
        width,
        *strides,
        cells.stride(0),
        cells.stride(1),
        out_stride,
        in_stride,
        channels,
    )


def add_dots(out: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add ``left @ right.T`` to ``out``: ``(rows, n)``, ``(rows, length)``, ``(n, length)``, rows contiguous."""
    assert module is not None
    code, computes = _TYPES[out.dtype]
    module.add_dots(
        _address(out, computes, 'out'),
        _address(left, computes, 'left'),
        _address(right, computes, 'right'),
        code,
        *out.shape,
        left.shape[1],
        left.stride(0),
        right.stride(0),
    )


def attend(
    out: torch.Tensor,
    x: torch.Tensor,
    tensors: Sequence[torch.Tensor | None],
    epsilon: float,
    bases: bool,
) -> None:
    """Fill ``out`` with the coefficients of an attention at fixed weights.

    Args:
        out: ``(B, m, n)``, or ``(B, m, hidden + 1)`` with ``bases``; contiguous, float32.
        x: ``(B, C, *spatial)``, contiguous, float32.
        tensors: Contiguous float32: first map ``(C, hidden)`` and bias, weight and bias of a LayerNorm (or None),
            second map ``(hidden, m * (n + 1))`` and bias.
        epsilon: The LayerNorm's.
        bases: Return coefficients of bases instead of cells.
    """
    assert module is not None
    first, second = tensors[0], tensors[4]
    assert first is not None
    assert second is not None
    (batch, mixtures, _), (channels, width) = out.shape, first.shape
    work = torch.empty(batch * (channels + width), dtype=torch.float32, device='cpu')
    module.attend(
        _address(x, torch.float32, 'x'),
        *(0 if t is None else _address(t, torch.float32, 'attention') for t in tensors),
        _address(work, torch.float32, 'work'),
        _address(out, torch.float32, 'out'),
        batch,
        channels,
        x.numel() // (batch * channels) if batch else 0,
        width,
        mixtures,
        second.shape[1] // mixtures,
        epsilon,
        bases,
    )


def use_huge_pages(memory: torch.Tensor) -> None:
    """Ask the system to back memory (uint8) that nothing was written to yet by large pages."""
    if module is not None:
        module.use_huge_pages(_address(memory, torch.uint8, 'memory'), memory.nbytes)
