"""Groups of layers that share a warehouse, and what keeps their attention small."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from .layers.attention import NormLayer
from .layers.partition import cut_kernels
from .plans import WarehousePlan, attention_weights, kernel_shape

__all__ = ['Group', 'keep_small', 'make_group']

_LEAST_REDUCTION = 1 / 64
_MOST_PARTS = 64


@dataclass(frozen=True, eq=False)
class Group:
    """A warehouse to be.

    Attributes:
        name: Its name.
        plan: Layers and ratios.
        layers: The layers by name.
        norm_layer: Norm within the attention.
        cuts: Input and output sides of cells relative to the layers' divisors, the first that serves is taken.
    """

    name: str
    plan: WarehousePlan
    layers: Mapping[str, Any]
    norm_layer: NormLayer
    cuts: tuple[tuple[float, float], ...]

    @cached_property
    def sizes(self) -> tuple[int, int]:
        """Weights of attentions and of cells; ValueError if kernels cannot be cut so."""
        cell, grids, cells = cut_kernels(self.kernels, *self.plan.ratios)
        width = round(1 / self.plan.cell_num_ratio) if self.plan.cell_num_ratio < 1 else 1
        if any(math.prod(grid) % width for grid in grids):
            raise ValueError(f'Mixtures do not divide by {width}.')
        attention = attention_weights(self.plan, list(self.layers.values()), grids, cells, self.norm_layer)
        return attention, cells * math.prod(cell)

    @cached_property
    def kernels(self) -> list[tuple[int, ...]]:
        """Shapes of the kernels."""
        return [kernel_shape(layer) for layer in self.layers.values()]

    @property
    def attention(self) -> int:
        """Weights of its attentions."""
        return self.sizes[0]

    @cached_property
    def fits(self) -> bool:
        """Whether its kernels can be cut, and its mixtures divide by what the budget asks."""
        try:
            return bool(self.layers) and self.sizes[0] >= 0
        except ValueError:
            return False

    def part(self, name: str, wanted: Callable[[str], bool]) -> 'Group':
        """Return a group of some of its layers, cut anew."""
        layers = {layer: module for layer, module in self.layers.items() if wanted(layer)}
        return replace(self, name=name, plan=replace(self.plan, layers=list(layers)), layers=layers).cut()

    def cut(self) -> 'Group':
        """Return the group with the first cut that serves, or with the first where none does."""
        tried = (
            replace(self, plan=replace(self.plan, cell_inplane_ratio=i, cell_outplane_ratio=o)) for i, o in self.cuts
        )
        first = next(tried)
        return first if first.fits else next((group for group in tried if group.fits), first)


def make_group(
    name: str, layers: Mapping[str, Any], norm_layer: NormLayer, ratios: Mapping[str, Any], is_coarse: bool
) -> tuple[Group | None, list[str]]:
    """Return a group whose cells are cut such that the budget's cells can be assigned, and the layers left out for it.

    Args:
        name: Of the warehouse.
        layers: By name.
        norm_layer: Norm within the attention.
        ratios: Of the warehouse; below a budget of 1, cells are halved on both sides, as in the released networks, if
            nothing else is given and that serves.
        is_coarse: Prefer the largest cells that serve, instead, which make the attention small.
    """
    plan = WarehousePlan(list(layers), **ratios)
    cuts = [(plan.cell_inplane_ratio, plan.cell_outplane_ratio)]
    if plan.cell_num_ratio < 1 and cuts == [(1.0, 1.0)]:
        powers = [2.0**-i for i in range(1 + math.ceil(math.log2(1 / plan.cell_num_ratio)))]
        cuts = sorted(((i, o) for i in powers for o in powers), key=lambda cut: -cut[0] * cut[1])
        cuts = cuts if is_coarse else [(0.5, 0.5), *cuts]
    group = Group(name, plan, layers, norm_layer, tuple(cuts)).cut()
    if not group.fits:
        group = group.part(name, lambda layer: group.part(layer, lambda other: other == layer).fits)
    return (group, [n for n in layers if n not in group.layers]) if group.fits else (None, list(layers))


def keep_small(groups: list[Group], others: int, limit: float) -> tuple[list[Group], dict[str, int]]:
    """Change groups until their attention is at most ``limit`` times all other parameters that the network will have.

    What saves most comes first: half the hidden width of a warehouse's attentions (as far as 1/64 of the channels), or
    its layers in two warehouses of two layers or more: those whose kernels have a size in common apart from the others,
    or the first half of them apart from the second. Where that does not suffice, as few layers as possible are left
    static of those whose attention would be larger than their kernel whatever they share; then layers get warehouses of
    their own; in the end others are left static, too, those first whose attention is largest for their kernel.

    Args:
        groups: The warehouses.
        others: Parameters of the network that no warehouse replaces.
        limit: Most attention parameters for one other parameter.

    Returns:
        The warehouses, and the layers that were left out with their attention's weights.
    """
    singles = _singles(groups)
    relative = {n: alone.attention / _kernels(alone) if alone.fits else math.inf for n, alone in singles.items()}
    order = sorted(singles, key=relative.__getitem__, reverse=True)
    dispensable = sum(relative[name] > 1 for name in order)

    def without(count: int, least: int, start: list[Group]) -> tuple[list[Group], bool]:
        dropped = set(order[:count])
        rest = [group.part(group.name, lambda name: name not in dropped) for group in start]
        more = others + sum(_kernels(singles[name]) for name in dropped)
        found = _shrink([group for group in rest if group.fits], more, limit, least)
        return found, _excess(found, more, limit) <= 0

    count, found = _fewest(lambda n: without(n, 2, groups), 0, dispensable)
    if found is None:
        start, _ = without(dispensable, 2, groups)
        count, found = _fewest(lambda n: without(n, 1, start), dispensable, len(order))
    return found or [], {name: singles[name].attention if singles[name].fits else 0 for name in order[:count]}


def _fewest(attempt: Callable[[int], tuple[list[Group], bool]], low: int, high: int) -> tuple[int, list[Group] | None]:
    """Return the smallest number from ``low`` to ``high`` whose attempt succeeds, and its groups; None if none does."""
    for number in (low, high):
        found, is_enough = attempt(number)
        if is_enough and number == low:
            return low, found
    if not is_enough:
        return high, None
    while high - low > 1:  # `high` succeeds, `low` does not.
        middle = (low + high) // 2
        tried, is_enough = attempt(middle)
        low, high, found = (low, middle, tried) if is_enough else (middle, high, found)
    return high, found


def _excess(groups: list[Group], others: int, limit: float) -> float:
    attention = sum(group.attention for group in groups)
    return attention - limit * (others + sum(group.sizes[1] for group in groups)) if attention else 0


def _shrink(groups: list[Group], others: int, limit: float, least: int) -> list[Group]:
    """Make the change that saves most, one after the other, until the limit holds or nothing saves any more."""
    moves: dict[Group, list[Group] | None] = {}
    while _excess(groups, others, limit) > 0:
        for group in groups:
            if group not in moves:
                moves[group] = _best_move(group, least)
        best = max(groups, key=lambda group: _saving(group, moves[group]))
        move = moves[best]
        if move is None or _saving(best, move) <= 0:
            break
        at = groups.index(best)
        groups = [*groups[:at], *move, *groups[at + 1 :]]
    return groups


def _singles(groups: list[Group]) -> dict[str, Group]:
    """Return every layer in a group of its own, with attentions as small as can be."""
    found = {}
    for group in groups:
        small = replace(group, plan=replace(group.plan, reduction=min(_LEAST_REDUCTION, group.plan.reduction)))
        for layer in group.layers:
            found[layer] = small.part(layer, lambda name, layer=layer: name == layer)  # type: ignore[misc]
    return found


def _kernels(group: Group) -> int:
    return sum(layer.weight.numel() for layer in group.layers.values())


def _saving(group: Group, move: list[Group] | None) -> int:
    return 0 if move is None else group.attention - sum(part.attention for part in move)


def _best_move(group: Group, least: int) -> list[Group] | None:
    """Return what would take the place of a group with the smallest attention, None if nothing saves any."""
    moves: list[list[Group]] = []
    if group.plan.reduction / 2 >= _LEAST_REDUCTION:
        moves.append([replace(group, plan=replace(group.plan, reduction=group.plan.reduction / 2))])
    names = list(group.layers)
    shapes = {name: kernel_shape(layer) for name, layer in group.layers.items()}
    tellings: list[set[str]] = [set(names[: len(names) // 2])]
    for axis in (0, 1, slice(2, None)):
        values = dict.fromkeys(shape[axis] for shape in shapes.values())
        tellings += [{name for name in names if shapes[name][axis] == value} for value in list(values)[:_MOST_PARTS]]
    for some in tellings:
        if 0 < len(some) < len(names):
            parts = [
                group.part(f'{group.name}_{i}', lambda name, some=some, i=i: (name in some) == (i == 0))  # type: ignore[misc]
                for i in range(2)
            ]
            # A layer by itself shares nothing; where it makes the others' cells small, that is the better all the same.
            if all(part.fits for part in parts) and (
                min(len(part.layers) for part in parts) >= least or _saving(group, parts) > group.attention / 2
            ):
                moves.append(parts)
    best = min(moves, key=lambda move: sum(part.attention for part in move), default=None)
    return best if best is not None and _saving(group, best) > 0 else None
