"""How kernels are cut into cells: pure integer arithmetic, no tensors.

A *warehouse* serves a group of layers. Every kernel ``(O, I / groups, *k)`` of the group is cut into equally shaped
cells; each cell position of a kernel is one *mixture*, a linear combination of all ``n`` cells of the warehouse.

Source: KernelWarehouse (ICML 2024, arXiv 2406.07879), section 3.1 (kernel partition) and 3.2 (warehouse construction
and sharing); the rounding is that of the released weights.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ['LayerPartition', 'Partition', 'assign_cells', 'cut_kernels', 'partition_kernels']

KernelShape = tuple[int, ...]


@dataclass(frozen=True)
class LayerPartition:
    """One layer's share of a warehouse.

    Attributes:
        grid: Cell positions of the kernel as ``(spatial, output groups, input groups)``; mixtures are numbered
            row-major over it.
        start: First cell of the layer's own slice of the warehouse.
        stop: One past the last cell of the slice.
        assigned: For each mixture the cell it equals at temperature 1; ``num_cells`` stands for the zero cell.
    """

    grid: tuple[int, int, int]
    start: int
    stop: int
    assigned: tuple[int, ...]

    @property
    def num_mixtures(self) -> int:
        """Number of cell positions in the kernel."""
        return math.prod(self.grid)


@dataclass(frozen=True)
class Partition:
    """The cells of one warehouse and how its layers use them.

    Attributes:
        num_cells: Number of cells, ``n``.
        cell_shape: ``(output channels, input channels, *window)`` of a cell.
        cell_num_ratio: The budget ``b``: cells per mixture.
        layers: The layers' shares, in the order of the kernel shapes given.
    """

    num_cells: int
    cell_shape: tuple[int, ...]
    cell_num_ratio: float
    layers: tuple[LayerPartition, ...]


def partition_kernels(
    kernel_shapes: Sequence[KernelShape],
    cell_num_ratio: float = 1.0,
    cell_inplane_ratio: float = 1.0,
    cell_outplane_ratio: float = 1.0,
    spatial_partition: bool = True,
) -> Partition:
    """Cut the kernels of a group of layers into the cells of one warehouse.

    Args:
        kernel_shapes: ``(O, I / groups, *k)`` of every layer, in the order in which the network lists its modules.
        cell_num_ratio: Number of cells per mixture, ``b``.
        cell_inplane_ratio: Cell input channels as a fraction of the layers' greatest common divisor of ``I / groups``.
        cell_outplane_ratio: Cell output channels as a fraction of the layers' greatest common divisor of ``O``.
        spatial_partition: Cut every spatial position apart (cells are 1x1). If False, cells keep the whole window.

    Returns:
        Cell count, cell shape and every layer's share.

    Raises:
        ValueError: If there is no layer, kernels differ in rank, a ratio is not positive, cells do not divide a
            kernel, windows differ without spatial partition, or the layers' cells do not add up to the warehouse.

    Example:
        >>> partition_kernels([(64, 64, 3, 3), (64, 64, 1, 1)]).num_cells
        10
    """
    cell_shape, grids, num_cells = cut_kernels(
        kernel_shapes, cell_num_ratio, cell_inplane_ratio, cell_outplane_ratio, spatial_partition
    )
    layers: list[LayerPartition] = []
    start = 0
    for grid in grids:
        assigned, stop = assign_cells(math.prod(grid), start, cell_num_ratio, num_cells)
        layers.append(LayerPartition(grid, start, stop, assigned))
        start = stop
    if start != num_cells:
        mixtures = [layer.num_mixtures for layer in layers]
        raise ValueError(
            f'The plan does not add up: {len(layers)} layers with {mixtures} mixtures take {start} cells, but at '
            f'cell_num_ratio={cell_num_ratio:g} the warehouse has {num_cells}. Use a whole ratio (1, 2, 4) or the '
            f'inverse of a whole number that divides every mixture count (1/2, 1/4).'
        )
    return Partition(num_cells, cell_shape, float(cell_num_ratio), tuple(layers))


def cut_kernels(
    kernel_shapes: Sequence[KernelShape],
    cell_num_ratio: float = 1.0,
    cell_inplane_ratio: float = 1.0,
    cell_outplane_ratio: float = 1.0,
    spatial_partition: bool = True,
) -> tuple[tuple[int, ...], list[tuple[int, int, int]], int]:
    """Return the shape of a cell, the grid of every layer and the number of cells; see :func:`partition_kernels`.

    Takes no time and memory for mixtures, however many there are.
    """
    shapes = [tuple(shape) for shape in kernel_shapes]
    _check_shapes(shapes, spatial_partition)
    for name, ratio in (
        ('cell_num_ratio', cell_num_ratio),
        ('cell_inplane_ratio', cell_inplane_ratio),
        ('cell_outplane_ratio', cell_outplane_ratio),
    ):
        if not (math.isfinite(ratio) and ratio > 0):
            raise ValueError(f'{name} must be a positive number, got {ratio!r}.')
    cell_out = max(int(math.gcd(*(shape[0] for shape in shapes)) * cell_outplane_ratio), 1)
    cell_in = max(int(math.gcd(*(shape[1] for shape in shapes)) * cell_inplane_ratio), 1)
    window = (1,) * len(shapes[0][2:]) if spatial_partition else shapes[0][2:]
    grids = [_cell_grid(shape, cell_out, cell_in, spatial_partition) for shape in shapes]
    num_cells = max(int(sum(math.prod(grid) for grid in grids) * cell_num_ratio), 1)
    return (cell_out, cell_in, *window), grids, num_cells


def assign_cells(num_mixtures: int, start: int, cell_num_ratio: float, num_cells: int) -> tuple[tuple[int, ...], int]:
    """Give each mixture of a layer the one cell that it equals at temperature 1.

    With ``b >= 1`` the mixtures take every ``int(b)``-th cell. With ``b < 1`` and ``w = int(1 / b)``, of each run of
    ``w`` mixtures one takes the next cell (at a place that moves on by one from run to run), the others the zero cell.

    Args:
        num_mixtures: Number of mixtures of the layer.
        start: First cell of the layer.
        cell_num_ratio: The budget ``b``.
        num_cells: Cells in the warehouse; as an index it stands for the zero cell.

    Returns:
        The cell of each mixture, and the first cell of the next layer.
    """
    if cell_num_ratio >= 1:
        step = int(cell_num_ratio)
        return tuple(start + i * step for i in range(num_mixtures)), start + num_mixtures * step
    width = int(1 / cell_num_ratio)
    assigned = []
    for i in range(num_mixtures):
        takes_cell = i % width == (i // width) % width
        assigned.append(start if takes_cell else num_cells)
        start += takes_cell
    return tuple(assigned), start


def _check_shapes(shapes: list[KernelShape], spatial_partition: bool) -> None:
    if not shapes:
        raise ValueError('A warehouse needs at least one layer, got none.')
    ranks = {len(shape) for shape in shapes}
    if len(ranks) > 1 or min(ranks) < 2:
        raise ValueError(f'Kernels of one warehouse must have one rank, (O, I / groups, *k); got shapes {shapes}.')
    for shape in shapes:
        if min(shape) < 1:
            raise ValueError(f'Kernel sizes must be positive, got a kernel of shape {shape}.')
    windows = {shape[2:] for shape in shapes}
    if not spatial_partition and len(windows) > 1:
        raise ValueError(
            f'Without spatial partition all layers of a warehouse need one kernel size, got {sorted(windows)}. '
            f'Give each kernel size a warehouse of its own, or set spatial_partition=True.'
        )


def _cell_grid(shape: KernelShape, cell_out: int, cell_in: int, spatial_partition: bool) -> tuple[int, int, int]:
    out_channels, in_channels = shape[:2]
    if out_channels % cell_out or in_channels % cell_in:
        raise ValueError(
            f'Cells of {cell_out} output and {cell_in} input channels do not divide a kernel of shape {shape}. '
            f'Choose cell_outplane_ratio and cell_inplane_ratio such that they divide {out_channels} and {in_channels}.'
        )
    positions = math.prod(shape[2:]) if spatial_partition else 1
    return positions, out_channels // cell_out, in_channels // cell_in
