"""How KW layers begin.

``'live'``, the default: every mixture is, for all inputs nearly the same, its assigned cell, and kernels have the
variance of a static layer's, at temperature 0 as at 1. Nothing relies on a norm to bring signals back to size, and no
annealing is needed.

``'published'``: as in the paper's recipes, whose attention is random from the start and made harmless by the
temperature. A mixture's magnitudes sum to 1 whatever it is made of, so that random combinations of ``n`` cells are
about ``sqrt(n)`` times smaller than one cell; norms in training mode make up for it.
"""

import math
from dataclasses import dataclass

import torch

from .partition import LayerPartition, Partition

__all__ = ['ALIVE', 'INITS', 'Codes', 'cell_std', 'check_init', 'gain', 'inertia', 'start_codes']

INITS = ('live', 'published')
# How much of a new layer's coefficients varies with the input, relative to what does not.
ALIVE = 0.05


def check_init(init: str) -> str:
    """Return the name of an initialization, if there is one of that name.

    Raises:
        ValueError: If there is none.
    """
    if init not in INITS:
        raise ValueError(f"init must be 'live' (the default) or 'published' (the ImageNet recipes'), got {init!r}.")
    return init


def inertia(num_cells: int) -> float:
    """Return the magnitude of a starting mixture's logits, which only their ratio to what is learnt gives a meaning.

    Adam moves all ``n`` logits of a mixture by about the learning rate at a step, and their magnitudes are summed up:
    against a single logit of 1, a few steps would drown what the mixture began as. The published initialization's
    magnitudes have sums that grow like this, too.
    """
    return math.sqrt(num_cells + 1)


def gain(num_cells: int, alive: float = ALIVE) -> float:
    """Return by how much cells are larger than the kernels that starting coefficients make of them."""
    return 1 + alive + 1e-3 / inertia(num_cells)


@dataclass(frozen=True)
class Codes:
    """Combinations of cells, a row each.

    Attributes:
        cells: Cells of each combination, equally many.
        weights: Their coefficients, whose magnitudes sum to 1.
    """

    cells: tuple[tuple[int, ...], ...]
    weights: tuple[tuple[float, ...], ...]

    @property
    def norm(self) -> float:
        """Standard deviation of a combination, relative to that of independent cells."""
        return math.hypot(*self.weights[0])

    def dense(self, like: torch.Tensor, columns: int) -> torch.Tensor:
        """Return them as a matrix ``(rows, columns)`` of the device and type of another tensor."""
        rows = torch.zeros(len(self.cells), columns, device=like.device, dtype=like.dtype)
        weights = torch.tensor(self.weights, device=like.device, dtype=like.dtype)
        return rows.scatter_(1, torch.tensor(self.cells, device=like.device), weights)


def start_codes(share: LayerPartition, partition: Partition) -> Codes:
    """Return what every mixture of a layer begins as.

    With a cell of its own for every mixture that is the cell. With fewer it is half the sum or difference of two cells
    of the layer's slice: not the assignment, which gives most mixtures no cell at all.
    """
    own = share.stop - share.start
    if partition.cell_num_ratio >= 1 or own < 2:
        first = share.assigned if partition.cell_num_ratio >= 1 else (share.start,) * share.num_mixtures
        return Codes(tuple((cell,) for cell in first), ((1.0,),) * share.num_mixtures)
    pairs, signs = [], []
    for i in range(share.num_mixtures):
        run, one = divmod(i, own)
        pairs.append((share.start + one, share.start + (one + 1 + run % (own - 1)) % own))
        signs.append((0.5, -0.5) if (one + run) % 2 else (0.5, 0.5))
    return Codes(tuple(pairs), tuple(signs))


def cell_std(partition: Partition, index: int, init: str, kernel_std: float | None = None) -> float:
    """Return the standard deviation with which a layer's own cells are drawn.

    Args:
        partition: The warehouse's partition.
        index: The layer's place in it.
        init: ``'live'``: such that its kernels have ``kernel_std``; ``'published'``: Kaiming normal, by the fan out of
            the layer's slice of cells.
        kernel_std: Standard deviation of the kernels; None for Kaiming normal, by the fan out of the kernel.
    """
    share, (cell_out, _, *window) = partition.layers[index], partition.cell_shape
    if init == 'published':
        return (2.0 / (max(share.stop - share.start, 1) * cell_out * math.prod(window))) ** 0.5
    if kernel_std is None:
        positions, out_groups, _ = share.grid
        kernel_std = (2.0 / (positions * math.prod(window) * out_groups * cell_out)) ** 0.5
    return kernel_std * gain(partition.num_cells) / start_codes(share, partition).norm
