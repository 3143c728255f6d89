"""Mixing and convolving for some samples: the ways there are, and which one is taken where.

==========  ==========================================================================================================
kernels     Kernels are put together while they are mixed, and convolved with as :mod:`~kw_timm.ops.convolution` says.
taps        Mixtures stay apart, and each is one factor of a matrix product: :mod:`~kw_timm.ops.taps`.
==========  ==========================================================================================================

Every way computes the same, and is held against the straightforward one by the tests. Which is taken, a rule says, or
measuring: see :mod:`~kw_timm.ops.choice`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from .buffers import empty_buffer
from .choice import fastest, is_measured
from .convolution import convolve, convolve_backward
from .mixing import mix_cells
from .spec import ConvSpec
from .straightforward import arrange_gradient
from .taps import convolve_mixtures, convolve_mixtures_backward, mix_apart, prefers_taps, seeing_positions, takes_taps

__all__ = ['mix_and_convolve', 'mix_and_convolve_backward', 'without_blind_positions']


def without_blind_positions(
    x: torch.Tensor, spec: ConvSpec, *by_mixture: tuple[torch.Tensor, int]
) -> tuple[ConvSpec, list[torch.Tensor]]:
    """Leave out mixtures that are multiplied with padding alone. Differentiable.

    Args:
        x: Inputs, ``(B, C, *spatial)``.
        spec: The layer's constants.
        by_mixture: Tensors, each with the axis that counts mixtures.

    Returns:
        The constants and the tensors for the mixtures that are left; where all are, as given.
    """
    tensors = [tensor for tensor, _ in by_mixture]
    # On another device to say which are left would wait for it.
    if x.shape[0] == 0 or x.device.type != 'cpu' or not takes_taps(x, spec):
        return spec, tensors
    positions = seeing_positions(x, spec)
    if not 0 < len(positions) < spec.grid[0]:
        return spec, tensors
    index = torch.tensor(positions, device=x.device)
    shape = (spec.grid[0], spec.grid[1] * spec.grid[2])
    return spec.at(positions), [
        tensor.unflatten(axis, shape).index_select(axis, index).flatten(axis, axis + 1) for tensor, axis in by_mixture
    ]


def mix_and_convolve(
    x: torch.Tensor,
    coefficients: torch.Tensor,
    cells: torch.Tensor,
    spec: ConvSpec,
    bias: torch.Tensor | None = None,
    factors: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Make each sample's kernel and convolve the sample with it. Not differentiable.

    Args:
        x: ``(B, C, *spatial)``.
        coefficients: ``(B, m, n)``.
        cells: As of :func:`~kw_timm.ops.mixing.mix_cells`.
        spec: The layer's constants.
        bias: ``(O,)`` or None.
        factors: ``(O,)``, what to multiply the kernels' output channels by, or None.
        out: ``(B, O, *spatial')``, contiguous, to be overwritten; allocated where not given.

    Returns:
        ``(B, O, *spatial')``.
    """

    def kernels() -> torch.Tensor:
        return convolve(x, mix_cells(coefficients, cells, spec, factors).to(x.dtype), spec, bias, out=out)

    def taps() -> torch.Tensor:
        y = convolve_mixtures(x, mix_apart(coefficients, cells, spec).to(x.dtype), spec, out)
        for operation, by_channel in ((y.mul_, factors), (y.add_, bias)):
            if by_channel is not None:
                operation(by_channel.view(-1, *(1,) * (y.dim() - 2)))
        return y

    ways = {'kernels': kernels, 'taps': taps}
    return ways[_way('forward', ways, x, cells, spec)]()


def _way(
    direction: str, ways: Mapping[str, Callable[[], Any]], x: torch.Tensor, cells: torch.Tensor, spec: ConvSpec
) -> str:
    if spec.positions:
        return 'taps'  # There is no other way.
    if not is_measured(x) or not takes_taps(x, spec):
        return 'taps' if prefers_taps(x, spec, direction.split()[0]) else 'kernels'
    return fastest((f'mix_and_convolve {direction}', x.shape, cells.shape, cells.dtype, spec), ways, x)


def mix_and_convolve_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    coefficients: torch.Tensor,
    cells: torch.Tensor,
    spec: ConvSpec,
    need_input: bool,
    need_mixtures: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Gradients of :func:`mix_and_convolve`, without bias and factors.

    Args:
        grad: Gradient of the output, ``(B, O, *spatial')``.
        x: As of :func:`mix_and_convolve`.
        coefficients: As of :func:`mix_and_convolve`.
        cells: As of :func:`mix_and_convolve`.
        spec: As of :func:`mix_and_convolve`.
        need_input: Return the gradient of ``x``.
        need_mixtures: Return the gradient of the mixtures.

    Returns:
        Gradients of ``x`` and of the mixtures ``(B, m, co * ci * window)``; each None where not needed. A sample's, or
        where cells are each mixture's own a mixture's, lie side by side.
    """

    def kernels() -> tuple[torch.Tensor | None, torch.Tensor | None]:
        made = mix_cells(coefficients, cells, spec)
        grad_input, grad_kernels = convolve_backward(grad, x, made, spec, need_input, need_mixtures)
        return grad_input, None if grad_kernels is None else arrange_gradient(grad_kernels, spec)

    def taps() -> tuple[torch.Tensor | None, torch.Tensor | None]:
        own = cells.dim() > 1 + len(spec.cell_shape)
        mixed = mix_apart(coefficients, cells, spec)
        grad_mixed = None
        if need_mixtures:
            grad_mixed = empty_buffer(mixed.transpose(0, 1).shape if own else mixed.shape, mixed)
            grad_mixed = grad_mixed.transpose(0, 1) if own else grad_mixed
        grad_input = convolve_mixtures_backward(grad, x, mixed, spec, need_input, grad_mixed)
        return grad_input, None if grad_mixed is None else grad_mixed.flatten(2)

    ways = {'kernels': kernels, 'taps': taps}
    return ways[_way(f'backward {need_input} {need_mixtures}', ways, x, cells, spec)]()
