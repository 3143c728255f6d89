"""What KW layers take over from the static layers that they replace: kernels, biases, exactly or nearly."""

from collections.abc import Mapping
from typing import Any

import torch

from .layers import KWLayer, Warehouse
from .layers.start import ALIVE, gain
from .ops.straightforward import arrange_gradient

__all__ = ['WEIGHTS', 'kernel_std', 'take_over']

WEIGHTS = ('new', 'keep')


def kernel_std(static: Any) -> float | None:
    """Return the root mean square of a static layer's weights; None if they are not there (meta device)."""
    return None if static.weight.is_meta else float(static.weight.detach().float().square().mean().sqrt())


@torch.no_grad()
def take_over(warehouse: Warehouse, layers: Mapping[str, tuple[KWLayer, Any]], weights: str) -> dict[str, float]:
    """Start KW layers from static ones.

    Args:
        warehouse: The layers' warehouse, newly made.
        layers: All of them by name: the KW layer, and the static layer that it replaces (its weight and bias).
        weights: ``'keep'``: kernels are the static layers', whatever the input, or the nearest that the cells can make;
            ``'new'``: the same where every mixture has a cell of its own, and they vary with the input a little.

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
        attention = layer.attention
        if weights == 'keep':
            attention.begin(attention.codes, alive)
        pieces = _pieces(layer, static).to(warehouse.weight)
        warehouse.weight[list(attention.assigned)] = pieces * gain(attention.num_cells, alive)
    return dict.fromkeys(layers, 0.0) if weights == 'keep' else {}


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
