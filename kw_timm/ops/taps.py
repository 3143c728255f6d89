"""Convolving every sample with its own kernel as matrix products, one for each mixture that the kernel is made of.

Mixtures are taken as mixing leaves them, each in one piece: no kernel is put together, and no gradient of a kernel
taken apart. What a window sees is gathered first, which costs as much memory as the window is large, so it is for small
images, where besides a convolution of one sample takes long to prepare. Window positions that see nothing but padding,
as most do in images of a pixel or two, are left out altogether.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import product

import torch
import torch.nn.functional as F

from .buffers import empty_buffer
from .mixing import add_products
from .spec import ConvSpec

__all__ = [
    'convolve_mixtures',
    'convolve_mixtures_backward',
    'mix_apart',
    'prefers_taps',
    'seeing_positions',
    'takes_taps',
]

# Pixels of the output up to which it is fastest: gradients of kernels are slow to take apart.
_MOST_PIXELS = {'forward': 16, 'backward': 256}
_TYPES = (torch.float32, torch.float64)  # Sums of products are rounded to the type after each.


def takes_taps(x: torch.Tensor, spec: ConvSpec) -> bool:
    """Return whether inputs ``(B, C, *spatial)`` can be convolved this way without loss."""
    return x.dtype in _TYPES and spec.groups == 1 and not spec.is_pointwise


def prefers_taps(x: torch.Tensor, spec: ConvSpec, direction: str) -> bool:
    """Return whether convolving inputs this way is the fastest as a rule, ``'forward'`` or ``'backward'``."""
    few = math.prod(spec.output_size(x)) <= _MOST_PIXELS[direction]
    return few and x.device.type == 'cpu' and takes_taps(x, spec)


def seeing_positions(x: torch.Tensor, spec: ConvSpec) -> tuple[int, ...]:
    """Return the positions of a window that see a pixel of ``x``; all, where cells are not cut at positions."""
    if spec.grid[0] == 1:
        return (0,)
    axes = zip(x.shape[2:], spec.output_size(x), spec.stride, spec.padding, spec.dilation, strict=True)
    sees = [
        [any(0 <= o * stride + tap * dilation - padding < size for o in range(out)) for tap in range(window)]
        for (size, out, stride, padding, dilation), window in zip(axes, spec.kernel_size, strict=True)
    ]
    return tuple(i for i, seen in enumerate(product(*sees)) if all(seen))


def mix_apart(coefficients: torch.Tensor, cells: torch.Tensor, spec: ConvSpec) -> torch.Tensor:
    """Return mixtures ``(B, m, co, ci * window)``, each in one piece. Not differentiable.

    Args:
        coefficients: ``(B, m, n)``.
        cells: As of :func:`~kw_timm.ops.mixing.mix_cells`.
        spec: The layer's constants.
    """
    batch, mixtures, _ = coefficients.shape
    length = math.prod(spec.cell_shape)
    if cells.dim() == 1 + len(spec.cell_shape):
        mixed = empty_buffer((1, batch * mixtures, length), coefficients)
        add_products(mixed, coefficients.flatten(0, 1)[None], cells.flatten(1)[None], overwrite=True)
        return mixed.view(batch, mixtures, spec.cell_shape[0], -1)
    mixed = empty_buffer((mixtures, batch, length), coefficients)
    add_products(mixed, coefficients.transpose(0, 1), cells.flatten(2), overwrite=True)
    return mixed.view(mixtures, batch, spec.cell_shape[0], -1).transpose(0, 1)


def convolve_mixtures(
    x: torch.Tensor, mixed: torch.Tensor, spec: ConvSpec, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Convolve each sample with the kernel that its mixtures are the parts of. Not differentiable.

    Args:
        x: ``(B, C, *spatial)``.
        mixed: ``(B, m, co, ci * window)``.
        spec: The layer's constants; one group.
        out: ``(B, O, *spatial')``, to be overwritten; allocated where not given.

    Returns:
        ``(B, O, *spatial')``.
    """
    columns = _columns(x, spec)
    y = x.new_empty(x.shape[0], spec.kernel_shape[0], *spec.output_size(x)) if out is None else out
    by_group = y.flatten(2).unflatten(1, (spec.grid[1], -1))
    for o in range(spec.grid[1]):
        for count, (position, i, mixture) in enumerate(_mixtures_of(spec, o)):
            sums, factors = by_group[:, o], (mixed[:, mixture], columns[position, :, i])
            torch.baddbmm(sums, *factors, beta=0 if count == 0 else 1, out=sums)
    return y


def convolve_mixtures_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    mixed: torch.Tensor,
    spec: ConvSpec,
    need_input: bool = True,
    grad_mixed: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Gradients of :func:`convolve_mixtures`.

    Args:
        grad: Gradient of the output, ``(B, O, *spatial')``.
        x: As of :func:`convolve_mixtures`.
        mixed: As of :func:`convolve_mixtures`; looked at only with ``need_input``.
        spec: As of :func:`convolve_mixtures`.
        need_input: Return the gradient of ``x``.
        grad_mixed: Like ``mixed``, to be overwritten by its gradient, or None.

    Returns:
        The gradient of ``x``, None where not needed.
    """
    positions, out_groups, in_groups = spec.grid
    by_group = grad.flatten(2).unflatten(1, (out_groups, -1))
    if grad_mixed is not None:
        columns = _columns(x, spec)
        for o in range(out_groups):
            for position, i, mixture in _mixtures_of(spec, o):
                seen = columns[position, :, i].transpose(1, 2)
                torch.bmm(by_group[:, o], seen, out=grad_mixed[:, mixture])
        del columns
    if not need_input:
        return None
    grad_columns = x.new_empty(positions, x.shape[0], in_groups, _rows(spec), by_group.shape[-1])
    for o in range(out_groups):
        for position, i, mixture in _mixtures_of(spec, o):
            sums, factors = grad_columns[position, :, i], (mixed[:, mixture], by_group[:, o])
            torch.baddbmm(sums, factors[0].transpose(1, 2), factors[1], beta=0 if o == 0 else 1, out=sums)
    return _columns_backward(grad_columns, grad, x, spec)


def _mixtures_of(spec: ConvSpec, out_group: int) -> Iterator[tuple[int, int, int]]:
    """Yield position, input group and index of the mixtures that make a group of output channels."""
    positions, out_groups, in_groups = spec.grid
    for position in range(positions):
        for i in range(in_groups):
            yield position, i, (position * out_groups + out_group) * in_groups + i


def _rows(spec: ConvSpec) -> int:
    return math.prod(spec.cell_shape[1:])


def _seen(spec: ConvSpec, out: Sequence[int]) -> Iterator[tuple[slice, ...]]:
    """Yield for each position of the window the pixels of padded inputs ``(B, C, *spatial)`` that it sees."""
    axes = list(zip(out, spec.stride, spec.dilation, strict=True))
    taps = list(product(*(range(window) for window in spec.kernel_size)))
    for i in spec.positions or range(len(taps)):
        starts = (tap * dilation for tap, (_, _, dilation) in zip(taps[i], axes, strict=True))
        pixels = (slice(a, a + (n - 1) * step + 1, step) for a, (n, step, _) in zip(starts, axes, strict=True))
        yield (slice(None), slice(None), *pixels)


def _columns(x: torch.Tensor, spec: ConvSpec) -> torch.Tensor:
    """Return what the mixtures are multiplied with, ``(positions, B, input groups, ci * window, pixels)``."""
    padded = F.pad(x, [p for padding in reversed(spec.padding) for p in (padding, padding)])
    columns = torch.stack([padded[seen] for seen in _seen(spec, spec.output_size(x))])
    if spec.grid[0] == 1:
        columns = columns.movedim(0, 2)[None]  # The window belongs to the cell.
    return columns.reshape(spec.grid[0], x.shape[0], spec.grid[2], _rows(spec), -1)


def _columns_backward(grad_columns: torch.Tensor, grad: torch.Tensor, x: torch.Tensor, spec: ConvSpec) -> torch.Tensor:
    sizes = [size + 2 * padding for size, padding in zip(x.shape[2:], spec.padding, strict=True)]
    grad_padded = x.new_zeros(*x.shape[:2], *sizes)
    if spec.grid[0] == 1:
        by_position = grad_columns.reshape(*x.shape[:2], -1, *grad.shape[2:]).movedim(2, 0)
    else:
        by_position = grad_columns.reshape(-1, *x.shape[:2], *grad.shape[2:])
    for seen, part in zip(_seen(spec, grad.shape[2:]), by_position, strict=True):
        grad_padded[seen] += part
    for axis, (size, padding) in enumerate(zip(x.shape[2:], spec.padding, strict=True), 2):
        grad_padded = grad_padded.narrow(axis, padding, size)
    return grad_padded
