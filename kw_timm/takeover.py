"""What KW layers take over from the static layers that they replace: kernels, biases, exactly or nearly."""

from collections.abc import Mapping
from typing import Any

import torch
from torch._subclasses import FakeTensor

from .layers import KWLayer, Warehouse
from .layers.start import ALIVE, gain
from .ops.straightforward import arrange_gradient

__all__ = ['FREE', 'WEIGHTS', 'kernel_std', 'take_over']

WEIGHTS = ('new', 'keep')
FREE = ('random', 'copies', 'residuals', 'zeros')
# How much of a mixture, in magnitudes, is made of cells that are zero, so that these learn from the first step.
_SPARE = 0.2


def kernel_std(static: Any) -> float | None:
    """Return the root mean square of a static layer's weights; None if they are not there (meta device, fake)."""
    weight = static.weight.detach()
    if weight.is_meta or isinstance(weight, FakeTensor):
        return None
    return float(weight.float().square().mean().sqrt())


@torch.no_grad()
def take_over(
    warehouse: Warehouse, layers: Mapping[str, tuple[KWLayer, Any]], weights: str, free: str = 'random'
) -> dict[str, float]:
    """Start KW layers from static ones.

    Args:
        warehouse: The layers' warehouse, newly made.
        layers: All of them by name: the KW layer, and the static layer that it replaces (its weight and bias).
        weights: ``'keep'``: kernels are the static layers', whatever the input, or the nearest that the cells can make;
            ``'new'``: the same where every mixture has a cell of its own, and they vary with the input a little.
        free: What cells begin as that no mixture needs yet, of which each mixture has ``b - 1``: ``'random'`` with the
            root mean square of the layer's kernel, ``'copies'`` of the mixture's own cell with a tenth of noise,
            ``'residuals'``, what other mixtures' cells are more than its own, or ``'zeros'``, which mixtures are made
            of to a fifth. Gradients reach zeros from the first step, the others from the second, when the attention
            has begun to use them. In fine-tuning a network of 4x, none was better than another by more than the spread
            of three seeds (test loss 0.142 to 0.152, each +- 0.007 to 0.027; see docs/warm-start.md).

    Returns:
        By layer how far its kernel is from the static one, in the root of squares, relative. Empty if nothing was to
        be kept.
    """
    for layer, static in layers.values():
        if layer.bias is not None:
            layer.bias.copy_(static.bias)
    whole = warehouse.partition.cell_num_ratio >= 1
    if not whole:
        return _approximate(warehouse, layers) if weights == 'keep' else {}
    alive = 0.0 if weights == 'keep' else ALIVE
    for layer, static in layers.values():
        attention, spare = layer.attention, 0.0
        pieces = _pieces(layer, static).to(warehouse.weight)
        assigned = torch.tensor(attention.assigned, device=pieces.device)
        if weights == 'keep':
            unused = [assigned + i for i in range(1, int(warehouse.partition.cell_num_ratio))]
            codes = attention.codes
            if free == 'zeros' and unused:
                codes, spare = _with_spare(codes, torch.stack(unused, 1)), _SPARE
            attention.begin(codes, alive)
            for i, cells in enumerate(unused, 1):
                warehouse.weight[cells] = _free_cells(pieces, i, free)
        warehouse.weight[assigned] = pieces * gain(attention.num_cells, alive) / (1 - spare)
    return dict.fromkeys(layers, 0.0) if weights == 'keep' else {}


def _free_cells(pieces: torch.Tensor, i: int, how: str) -> torch.Tensor:
    """Return every mixture's ``i``-th free cell, ``(m, co, ci, *window)``."""
    noise = torch.randn_like(pieces) * pieces.square().mean().sqrt()
    if how == 'copies':
        return pieces + 0.1 * noise
    if how == 'residuals' and len(pieces) > i:
        return pieces.roll(-i, 0) - pieces
    return torch.zeros_like(pieces) if how == 'zeros' else noise


def _with_spare(codes: torch.Tensor, unused: torch.Tensor) -> torch.Tensor:
    """Make a share of every mixture ``(m, n + 1)`` of its free cells ``(m, b - 1)``, each with a random coefficient."""
    drawn = torch.randn(unused.shape, device=codes.device, dtype=codes.dtype)
    shares = torch.zeros_like(codes).scatter_(1, unused, drawn / drawn.abs().sum(1, keepdim=True))
    return (1 - _SPARE) * codes + _SPARE * shares


def _pieces(layer: KWLayer, static: Any) -> torch.Tensor:
    """Return a static kernel cut into what a KW layer's mixtures should be, ``(m, co, ci, *window)``."""
    kernel = static.weight.detach().reshape(1, *layer.spec.kernel_shape)
    return arrange_gradient(kernel, layer.spec)[0].unflatten(1, layer.spec.cell_shape)


def _approximate(warehouse: Warehouse, layers: Mapping[str, tuple[KWLayer, Any]]) -> dict[str, float]:
    """Start from the kernels nearest to the static ones, of all that so few cells can make.

    They are the projection of all layers' pieces on the first singular vectors; pieces count alike in every layer,
    whatever the layer's scale, which norms undo.
    """
    pieces = [_pieces(layer, static).flatten(1).double() for layer, static in layers.values()]
    sizes = [max(float(piece.square().mean().sqrt()), 1e-30) for piece in pieces]
    codes, cells = _low_rank(
        torch.cat([p / size for p, size in zip(pieces, sizes, strict=True)]), len(warehouse.weight)
    )
    rows = [part * size for part, size in zip(codes.split([len(p) for p in pieces]), sizes, strict=True)]
    # A mixture's magnitudes sum to 1: the cells grow with the largest sum, and the zero cell takes what others lack.
    largest = max(float(part.abs().sum(1).max()) for part in rows) or 1.0
    warehouse.weight.copy_((cells * largest * gain(len(cells), 0.0)).reshape(warehouse.weight.shape))
    errors = {}
    for (name, (layer, _)), piece, part in zip(layers.items(), pieces, rows, strict=True):
        errors[name] = float((part @ cells - piece).norm() / max(float(piece.norm()), 1e-30))
        shares = part / largest
        layer.attention.begin(torch.cat((shares, 1 - shares.abs().sum(1, keepdim=True)), 1), 0.0)
    return errors


def _low_rank(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``(rows, rank)`` and ``(rank, columns)`` whose product is nearest to a matrix; zeros where it has less."""
    wide = matrix.shape[0] <= matrix.shape[1]
    values, vectors = torch.linalg.eigh(matrix @ matrix.T if wide else matrix.T @ matrix)
    kept = vectors[:, values > 1e-14 * values[-1]][:, -rank:]
    left, right = (kept, kept.T @ matrix) if wide else (matrix @ kept, kept.T)
    missing = rank - kept.shape[1]
    return torch.nn.functional.pad(left, (0, missing)), torch.nn.functional.pad(right, (0, 0, 0, missing))
