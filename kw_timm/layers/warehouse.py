"""The shared store of kernel cells."""

from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import nn

from .partition import KernelShape, Partition, partition_kernels
from .shared import SharedModule
from .start import cell_std, check_init

__all__ = ['Warehouse']


class Warehouse(SharedModule):
    """Kernel cells that a group of layers shares.

    The network registers its warehouses (as ``warehouses.<name>``, before everything else); layers only refer to them,
    so that every cell is listed once in state dicts, optimizers and data-parallel wrappers. Layers that were taken out
    of the network bring their cells along, see :mod:`kw_timm.layers.shared`.

    Attributes:
        weight: The cells, ``(n, co, ci, *window)``.
        partition: How the layers' kernels are made of the cells.

    Args:
        kernel_shapes: ``(O, I / groups, *k)`` of every layer, in the order in which the network lists them.
        cell_num_ratio: Cells per mixture, ``b``.
        cell_inplane_ratio: Cell input channels relative to the layers' greatest common divisor.
        cell_outplane_ratio: Cell output channels relative to the layers' greatest common divisor.
        spatial_partition: Cut spatial positions apart (cells are 1x1).
        init: ``'live'``: kernels vary as those of static layers do; ``'published'``: as in the paper's recipes. See
            :mod:`kw_timm.layers.start`.
        stds: Standard deviation of every layer's kernel with ``init='live'``; without it Kaiming normal, fan out.
        device: Device of the cells.
        dtype: Type of the cells.

    Raises:
        ValueError: As :func:`~kw_timm.layers.partition.partition_kernels`, and if ``init`` is unknown.

    Source: arXiv 2406.07879, section 3.2.
    """

    def __init__(
        self,
        kernel_shapes: Sequence[KernelShape],
        cell_num_ratio: float = 1.0,
        cell_inplane_ratio: float = 1.0,
        cell_outplane_ratio: float = 1.0,
        spatial_partition: bool = True,
        init: str = 'live',
        stds: Sequence[float | None] = (),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.init, self._stds = check_init(init), stds
        self.partition: Partition = partition_kernels(
            kernel_shapes, cell_num_ratio, cell_inplane_ratio, cell_outplane_ratio, spatial_partition
        )
        shape = (self.partition.num_cells, *self.partition.cell_shape)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw each layer's own slice of cells, see :func:`~kw_timm.layers.start.cell_std`."""
        for i, layer in enumerate(self.partition.layers):
            std = cell_std(self.partition, i, self.init, self._stds[i] if self._stds else None)
            self.weight[layer.start : layer.stop].normal_(std=std)

    def forward(self) -> torch.Tensor:
        """Return the cells. Layers ask by a call, so that hooks on the warehouse run: those of pruning and sharding."""
        return self.weight

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        # `Module.to(memory_format=...)` asks tensors of rank 4 and 5 for the layout of images, which cells cannot have.
        return super()._apply(lambda cells: fn(cells.flatten(2)).reshape(cells.shape), recurse)

    def extra_repr(self) -> str:
        """Return cell count, cell shape and number of layers."""
        p = self.partition
        return f'cells={p.num_cells}, cell_shape={p.cell_shape}, layers={len(p.layers)}'
