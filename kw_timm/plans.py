"""Plans: which layers of a network share a warehouse; what a plan makes, before anything is made."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from .layers.attention import NormLayer, basis_size, hidden_width
from .layers.partition import cut_kernels
from .tables import aligned

__all__ = [
    'PlanSizes',
    'WarehousePlan',
    'WarehouseSizes',
    'attention_weights',
    'check_sizes',
    'kernel_shape',
    'naming',
    'plan_sizes',
]

# The released networks have at most 5 times the weights of their static kernels; what is small may be more.
_LEAST_LIMIT, _MOST_GROWTH = 10_000_000, 20


@dataclass(frozen=True)
class WarehousePlan:
    """One warehouse: the layers that share it, and its ratios.

    Attributes:
        layers: Names of the layers, as ``named_modules`` gives them; their order does not matter.
        cell_num_ratio: Cells per mixture, the budget ``b``.
        cell_inplane_ratio: Cell input channels relative to the layers' greatest common divisor.
        cell_outplane_ratio: Cell output channels relative to the layers' greatest common divisor.
        reduction: Hidden width of the attention relative to a layer's input channels.
        nonlocal_basis_ratio: Below 1, cells of other layers are reached through a basis of this relative size.
        spatial_partition: Cut spatial positions apart (cells are 1x1).
    """

    layers: Sequence[str]
    cell_num_ratio: float = 1.0
    cell_inplane_ratio: float = 1.0
    cell_outplane_ratio: float = 1.0
    reduction: float = 1 / 16
    nonlocal_basis_ratio: float = 1.0
    spatial_partition: bool = True

    @property
    def ratios(self) -> tuple[float, float, float, bool]:
        """What decides over the cells, as :class:`~kw_timm.layers.Warehouse` takes it behind the kernels' shapes."""
        return self.cell_num_ratio, self.cell_inplane_ratio, self.cell_outplane_ratio, self.spatial_partition


@dataclass(frozen=True)
class WarehouseSizes:
    """What one warehouse of a plan amounts to.

    Attributes:
        name: Name of the warehouse.
        layers: Its layers, in the order of the network.
        kernel_shapes: Their kernels, ``(O, I / groups, *k)``.
        cell_shape: ``(co, ci, *window)``.
        cells: Number of cells.
        mixtures: Mixtures, of all its layers.
        static_weights: Weights of the kernels that are replaced.
        cell_weights: Weights of the cells.
        attention_weights: Weights of the layers' attentions, norms and biases included.
        culprits: The layers whose shape makes cells so small: apart from the others, all the attentions would have less
            than half as many weights. Empty if there are none.
    """

    name: str
    layers: tuple[str, ...]
    kernel_shapes: tuple[tuple[int, ...], ...]
    cell_shape: tuple[int, ...]
    cells: int
    mixtures: int
    static_weights: int
    cell_weights: int
    attention_weights: int
    culprits: tuple[str, ...] = ()

    @property
    def weights(self) -> int:
        """Weights of cells and attentions."""
        return self.cell_weights + self.attention_weights


@dataclass(frozen=True)
class PlanSizes:
    """What a plan amounts to; as text, a table.

    Attributes:
        warehouses: One entry per warehouse, in the order of the plan.
    """

    warehouses: tuple[WarehouseSizes, ...]

    @property
    def static_weights(self) -> int:
        """Weights of the kernels that are replaced."""
        return sum(w.static_weights for w in self.warehouses)

    @property
    def cell_weights(self) -> int:
        """Weights of all cells."""
        return sum(w.cell_weights for w in self.warehouses)

    @property
    def attention_weights(self) -> int:
        """Weights of all attentions."""
        return sum(w.attention_weights for w in self.warehouses)

    @property
    def weights(self) -> int:
        """Weights that the plan makes: cells and attentions."""
        return self.cell_weights + self.attention_weights

    def __str__(self) -> str:
        head = ('warehouse', 'layers', 'mixtures', 'cells', 'cell', 'static weights', 'in cells', 'in attention')
        rows: list[tuple[Any, ...]] = [
            ('x'.join(map(str, w.cell_shape)), w.static_weights, w.cell_weights, w.attention_weights)
            for w in self.warehouses
        ]
        counts: list[tuple[Any, ...]] = [(w.name, len(w.layers), w.mixtures, w.cells) for w in self.warehouses]
        totals = [sum(column) for column in list(zip(*counts, strict=True))[1:]] or [0, 0, 0]
        last = ('all', *totals, '', self.static_weights, self.cell_weights, self.attention_weights)
        table = [head, *((*count, *row) for count, row in zip(counts, rows, strict=True)), last]
        texts = [[f'{v:,}' if isinstance(v, int) else str(v) for v in row] for row in table]
        return aligned(texts)


def plan_sizes(
    model: nn.Module, plan: Mapping[str, WarehousePlan], norm_layer: NormLayer = nn.BatchNorm1d
) -> PlanSizes:
    """Return what :func:`~kw_timm.kernelize` would make of a plan; nothing is made or changed.

    Args:
        model: The network, not yet kernelized.
        plan: Warehouse name -> layers and ratios.
        norm_layer: Norm within the attention.

    Raises:
        ValueError: If a layer is missing or has no kernel, or a warehouse cannot be partitioned.

    Example:
        >>> print(plan_sizes(timm.create_model('resnet18'), {'last': WarehousePlan(['layer4.1.conv1'])}))
    """
    modules = dict(model.named_modules())
    order = {name: i for i, name in enumerate(modules)}
    sizes = []
    for name, entry in plan.items():
        for layer in entry.layers:
            if not layer or not isinstance(getattr(modules.get(layer), 'weight', None), torch.Tensor):
                raise ValueError(f"Warehouse '{name}' plans the layer '{layer}', which the network does not have.")
        layers = sorted(entry.layers, key=order.__getitem__)
        with naming(name, layers):
            sizes.append(_warehouse_sizes(name, entry, {layer: modules[layer] for layer in layers}, norm_layer))
    return PlanSizes(tuple(sizes))


def check_sizes(sizes: PlanSizes, limit: float | None) -> None:
    """Raise ValueError if a plan makes more weights than ``limit``, naming what makes them so many."""
    if limit is None:
        limit = max(_LEAST_LIMIT, _MOST_GROWTH * sizes.static_weights)
    if sizes.weights <= limit:
        return
    worst = max(sizes.warehouses, key=lambda w: w.weights)
    cause = 'spread its layers over several warehouses, or let cells be larger (cell_inplane_ratio) or fewer'
    if len(worst.culprits) == 1:
        shape = ' x '.join(map(str, worst.kernel_shapes[worst.layers.index(worst.culprits[0])]))
        cause = (
            f"the layer '{worst.culprits[0]}' with its kernel of {shape} makes cells that small: give it a warehouse "
            f'of its own, or leave it static'
        )
    elif worst.culprits:
        cause = (
            f"{len(worst.culprits)} layers ('{worst.culprits[0]}' ... '{worst.culprits[-1]}') make cells that small: "
            f'give them their own warehouse, or leave them static'
        )
    raise ValueError(
        f'The plan makes {_short(sizes.weights)} weights of {_short(sizes.static_weights)}, more than the limit of '
        f"{_short(limit)}, because warehouse '{worst.name}' has {worst.mixtures:,} mixtures of {worst.cells:,} cells "
        f'of {" x ".join(map(str, worst.cell_shape))}, which takes {_short(worst.attention_weights)} attention weights '
        f'and {_short(worst.cell_weights)} weights in cells; {cause}; if it is meant, raise max_weights '
        f'(kw_timm.plan_sizes shows all sizes).'
    )


@contextmanager
def naming(warehouse: str, layers: Sequence[str]) -> Iterator[None]:
    """Say in a ValueError which warehouse of a plan it is about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"Warehouse '{warehouse}' of layers {', '.join(layers)}: {error}") from error


def kernel_shape(layer: Any) -> tuple[int, ...]:
    """Return a layer's kernel as a convolution's: ``(O, I / groups, *k)``, of a linear layer ``(O, I, 1)``."""
    shape = tuple(layer.weight.shape)
    return (*shape, 1) if isinstance(layer, nn.Linear) else shape


def _warehouse_sizes(
    name: str, entry: WarehousePlan, layers: Mapping[str, Any], norm_layer: NormLayer
) -> WarehouseSizes:
    shapes = {layer: kernel_shape(module) for layer, module in layers.items()}
    cell_shape, grids, cells = cut_kernels(list(shapes.values()), *entry.ratios)
    attention = attention_weights(entry, list(layers.values()), grids, cells, norm_layer)
    return WarehouseSizes(
        name,
        tuple(layers),
        tuple(shapes.values()),
        cell_shape,
        cells,
        sum(math.prod(grid) for grid in grids),
        sum(math.prod(shape) for shape in shapes.values()),
        cells * math.prod(cell_shape),
        attention,
        _culprits(entry, layers, shapes, attention, norm_layer),
    )


def _culprits(
    entry: WarehousePlan,
    layers: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    attention: int,
    norm: NormLayer,
) -> tuple[str, ...]:
    """Return the layers, one or all of the same channels, without which the others' cells are much larger."""
    # Who is to blame takes time to find; small attentions are nobody's fault.
    if attention <= _LEAST_LIMIT / 10:
        return ()

    def weights(names: list[str]) -> float:
        try:
            _, grids, cells = cut_kernels([shapes[name] for name in names], *entry.ratios)
        except ValueError:
            return math.inf
        return attention_weights(entry, [layers[name] for name in names], grids, cells, norm)

    tiers = [[[name] for name in layers]]
    for axis in (1, 0):
        channels = sorted({shape[axis] for shape in shapes.values()})
        tiers.append([[name for name in layers if shapes[name][axis] == count] for count in channels])
    culprits, least = [], attention / 2
    for tier in tiers:
        for some in tier:
            others = [name for name in layers if name not in some]
            apart = weights(some) + weights(others) if others else math.inf
            if apart < least:
                culprits, least = some, apart
        if least < attention / 10:  # So much that blaming more layers would be unfair.
            break
    return tuple(culprits)


def attention_weights(
    entry: WarehousePlan, layers: list[Any], grids: list[tuple[int, int, int]], cells: int, norm_layer: NormLayer
) -> int:
    """Return the weights of all attentions of a warehouse, norms and biases included.

    Args:
        entry: Ratios.
        layers: The layers, linear or convolutional.
        grids: Their mixtures' grids.
        cells: Cells of the warehouse.
        norm_layer: Norm within the attention.
    """
    total = 0
    for layer, grid in zip(layers, grids, strict=True):
        channels, mixtures = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels, math.prod(grid)
        hidden = hidden_width(channels, entry.reduction)
        norm = _norm_weights(norm_layer, hidden)
        bias = hidden if norm_layer is not nn.BatchNorm1d else 0
        logits = mixtures * (cells + 1)
        if entry.nonlocal_basis_ratio < 1:
            local = int(entry.cell_num_ratio * mixtures)
            size = basis_size(cells - local, entry.nonlocal_basis_ratio)
            second = hidden * mixtures * (local + size + 1) + size * (cells - local) + logits
        else:
            second = hidden * logits + logits
        total += channels * hidden + bias + norm + second
    return total


@lru_cache(maxsize=256)
def _norm_weights(norm_layer: NormLayer, hidden: int) -> int:
    return sum(p.numel() for p in norm_layer(hidden).parameters())


def _short(number: float) -> str:
    for size, unit in ((1e12, ' T'), (1e9, ' G'), (1e6, ' M')):
        if number >= size:
            return f'{number / size:.1f}{unit}'
    return f'{number:,.0f}'
