"""Findings as pictures."""

import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from .measure import UNUSED, Inspection, LayerFindings, WarehouseFindings
from .text import LITTLE, MUCH, percent

__all__ = ['DPI', 'check_matplotlib', 'draw_attention', 'draw_plan', 'draw_variation', 'pooled']

# Distinct beside each other; as many as a network of a plan has warehouses, then again from the start.
_COLOURS = (
    '#4477AA', '#EE6677', '#228833', '#CCBB44', '#66CCEE', '#AA3377', '#EE8866', '#44AA99', '#882255', '#999933',
    '#332288', '#DDAA33', '#117733', '#CC6677', '#88AADD', '#774411',
)  # fmt: skip
_ROW = 0.19  # Inches of a layer's line.
_MOST_ROWS = 400  # Lines of a picture; of more layers, those between are left out.
DPI = 120
_STEPS = 41  # Colours of a heat map: few, for the size of the file; odd, for one of zero.
_GRID = '#DDDDDD'
_MEAN_AND_SPREAD = ('mean over images', 'spread over images (standard deviation)')


def check_matplotlib() -> Any:
    """Return matplotlib's Figure class; raise ValueError if it is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("kw-timm inspect needs matplotlib: pip install 'kw-timm[inspect]'") from error
    return Figure


def draw_plan(found: Inspection) -> Any:
    """Draw who shares what: lines are layers, columns warehouses, and a box holds the number of mixtures."""
    layers, warehouses = _shown(found), found.warehouses
    height, width = _ROW * len(layers), max(4.0, 0.5 * len(warehouses))
    labels = _room_for(layer.name for layer in layers)
    top = _room_for(w.name for w in warehouses) + 0.45
    figure, panel = _one_panel(labels, width, height, top, 0.2)
    columns = {w.name: i for i, w in enumerate(warehouses)}
    _bands(panel, layers)
    for w, (column, colour) in zip(warehouses, enumerate(_colours(found).values()), strict=True):
        lines = [i for i, layer in enumerate(layers) if layer.warehouse == w.name]
        panel.plot([column, column], [lines[0], lines[-1]], color=colour, linewidth=2, alpha=0.5, zorder=1)
        for line in lines:
            box = dict(boxstyle='round,pad=0.2', facecolor=colour, edgecolor='none')
            panel.text(
                column,
                line,
                str(layers[line].mixtures),
                color=_ink(colour),
                fontsize=7.5,
                ha='center',
                va='center',
                bbox=box,
            )
    titles = [f'{w.name}   {w.cells} cells' for w in warehouses]
    panel.set_xticks(list(columns.values()), titles, rotation=90, fontsize=8)
    panel.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False, length=0)
    panel.set_xlim(-0.7, len(warehouses) - 0.3)
    _name_lines(panel, layers)
    return figure


def draw_variation(found: Inspection, over: str = 'images') -> Any:
    """Draw how far the kernels of every layer vary ``over`` images, in percent, on a scale that has a zero."""
    from matplotlib.ticker import FuncFormatter

    layers, colours = _shown(found), _colours(found)
    height, labels = _ROW * len(layers), _room_for(layer.name for layer in layers)
    figure, panel = _one_panel(labels, 3.7, height, 0.5, 0.5)
    _bands(panel, layers)
    values = [100 * layer.kernel_variation for layer in layers]
    shown = [0.0 if value != value else value for value in values]
    panel.barh(range(len(layers)), shown, color=[colours[layer.warehouse] for layer in layers], height=0.7, zorder=2)
    box = dict(boxstyle='square,pad=0.1', facecolor='white', edgecolor='none', alpha=0.8)
    for line, (value, layer) in enumerate(zip(shown, layers, strict=True)):
        panel.annotate(
            percent(layer.kernel_variation),
            (value, line),
            (4, 0),
            textcoords='offset points',
            fontsize=7.5,
            va='center',
            bbox=box,
        )
    panel.set_xscale('symlog', linthresh=0.01, linscale=0.5)
    panel.set_xlim(0, 400)
    panel.set_xticks([0, 0.01, 0.1, 1, 10, 100])
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f'{value:g} %'))
    panel.tick_params(axis='x', labelsize=8)
    for value, text in ((LITTLE, 'a little'), (MUCH, 'at work')):
        panel.axvline(100 * value, color='#555555', linewidth=1, linestyle='--', zorder=1)
        panel.annotate(
            f'{text} →',
            (100 * value, 1),
            (0, 5),
            xycoords=('data', 'axes fraction'),
            textcoords='offset points',
            fontsize=8,
        )
    panel.set_xlabel(f'spread of the kernels over {over}, relative to their size', fontsize=8)
    _name_lines(panel, layers)
    return figure


def draw_attention(
    found: Inspection, warehouse: WarehouseFindings, most: int, titles: tuple[str, str] = _MEAN_AND_SPREAD
) -> Any:
    """Draw the attention of all layers of a warehouse over its cells: mean and spread over images, and what is used.

    Heat maps have at most ``most`` values along an axis, and ``titles`` above.
    """
    from matplotlib import colormaps
    from matplotlib.colors import SymLogNorm
    from matplotlib.ticker import MaxNLocator

    layers = [layer for layer in found.layers if layer.warehouse == warehouse.name]
    mean, spread = (torch.cat([getattr(layer, part) for layer in layers]) for part in ('mean', 'spread'))
    mixtures, cells = mean.shape
    least = min(layer.mixtures for layer in layers)
    height = min(max(_ROW * mixtures / least, 0.028 * mixtures, 1.3), 16.0)
    labels = max(_room_for(layer.name for layer in layers), 0.8)
    left, map_width, gap, strip, below, above = labels, 3.7, 0.3, 0.8, 0.75, 0.35
    whole = (left + 2 * map_width + gap + 1.0, below + height + 0.2 + strip + above)
    figure = check_matplotlib()(figsize=whole, dpi=DPI)

    def place(x: float, y: float, width: float, tall: float, **options: Any) -> Any:
        return figure.add_axes((x / whole[0], y / whole[1], width / whole[0], tall / whole[1]), **options)

    limit = UNUSED / cells
    norm, colours = SymLogNorm(limit, vmin=-1, vmax=1), colormaps['RdBu_r'].resampled(_STEPS)
    used = [warehouse.largest, spread.abs().amax(0)]
    for side, (values, title) in enumerate(zip((mean, spread), titles, strict=True)):
        x = left + side * (map_width + gap)
        panel = place(x, below, map_width, height)
        image = panel.imshow(
            pooled(values, most).numpy(),
            cmap=colours,
            norm=norm,
            extent=(-0.5, cells - 0.5, mixtures, 0),
            aspect='auto',
            interpolation='nearest',
        )
        panel.set_xlabel('cell', fontsize=8)
        panel.xaxis.set_major_locator(MaxNLocator('auto', integer=True))
        panel.tick_params(labelsize=8)
        _separate(panel, layers, height, named=side == 0)
        bars = place(x, below + height + 0.15, map_width, strip, sharex=panel)
        _strip(bars, used[side], limit, warehouse if side == 0 else None)
        bars.set_title(title, fontsize=9)
        bars.tick_params(labelbottom=False, labelleft=side == 0, labelsize=7)
    scale = figure.colorbar(image, cax=place(left + 2 * map_width + gap + 0.12, below, 0.14, height))
    ticks = [sign * value for value in _decades(limit) for sign in (-1, 1)]
    scale.set_ticks([*ticks, 0], labels=[*(f'{value:g}' for value in ticks), '0'], minor=False)
    scale.ax.minorticks_off()
    scale.ax.tick_params(labelsize=7)
    return figure


def pooled(values: torch.Tensor, most: int) -> torch.Tensor:
    """Return a matrix of at most so many rows and columns: of each block what is largest in magnitude."""
    size = [min(length, most) for length in values.shape]
    if list(values.shape) == size:
        return values
    _, places = F.adaptive_max_pool2d(values.abs()[None], size, return_indices=True)
    return values.flatten()[places[0]]


def _decades(limit: float) -> list[float]:
    """Return three numbers at most, powers of ten from 1 down to above the linear part of the scale."""
    powers = [10.0**-power for power in range(8) if 10.0**-power > limit]
    return powers[:: max(1, -(-len(powers) // 3))]


def _strip(panel: Any, largest: torch.Tensor, limit: float, warehouse: WarehouseFindings | None) -> None:
    """Draw the largest value per cell; red, as high as the limit, where the cell is used by nobody."""
    floor, edges = limit / 100, torch.arange(len(largest) + 1) - 0.5
    values = largest.clamp_min(floor)
    panel.stairs(values.tolist(), edges.tolist(), baseline=floor, fill=True, color='#666666', linewidth=0)
    panel.set_yscale('log')
    panel.set_ylim(floor, 3)
    panel.set_yticks([1, limit], ['1', f'{UNUSED:g} / n'])
    panel.minorticks_off()
    if warehouse is not None:
        unused = torch.full_like(values, floor)
        unused[list(warehouse.unused)] = limit
        panel.stairs(unused.tolist(), edges.tolist(), baseline=floor, fill=True, color='#CC3311', linewidth=0)
        panel.axhline(limit, color='#CC3311', linewidth=0.8, linestyle='--')
        panel.set_ylabel('largest', fontsize=8)


def _separate(panel: Any, layers: list[LayerFindings], height: float, named: bool) -> None:
    """Draw lines between layers, and name those whose part is high enough."""
    total = sum(layer.mixtures for layer in layers)
    start, ticks, names = 0, [], []
    for layer in layers:
        if start:
            panel.axhline(start, color='#888888', linewidth=0.6)
        if layer.mixtures / total * height > 0.11:
            ticks.append(start + layer.mixtures / 2)
            names.append(layer.name)
        start += layer.mixtures
    panel.set_yticks(ticks, names if named else [''] * len(ticks), fontsize=8)
    panel.tick_params(axis='y', length=0)


def _one_panel(left: float, width: float, height: float, above: float, below: float) -> tuple[Any, Any]:
    """Return a figure of one panel, sizes in inches."""
    whole = (left + width + 0.2, above + height + below)
    figure = check_matplotlib()(figsize=whole, dpi=DPI)
    panel = figure.add_axes((left / whole[0], below / whole[1], width / whole[0], height / whole[1]))
    for side in ('top', 'right', 'left', 'bottom'):
        panel.spines[side].set_visible(False)
    return figure, panel


def _room_for(names: Iterable[str]) -> float:
    """Return how wide names are, in inches."""
    return 0.07 * max(map(len, names)) + 0.3


def _name_lines(panel: Any, layers: list[LayerFindings]) -> None:
    panel.set_yticks(range(len(layers)), [layer.name for layer in layers], fontsize=8)
    panel.tick_params(axis='y', length=0)
    panel.set_ylim(len(layers) - 0.5, -0.5)


def _bands(panel: Any, layers: list[LayerFindings]) -> None:
    """Shade every other stage."""
    for i, (start, stop) in enumerate(_stages(layers)):
        if i % 2 == 0:
            panel.axhspan(start - 0.5, stop - 0.5, color='#F1F3F6', linewidth=0, zorder=0)
        panel.axhline(stop - 0.5, color=_GRID, linewidth=0.6, zorder=0)


def _stages(layers: list[LayerFindings]) -> Iterator[tuple[int, int]]:
    """Return first and one past the last layer of every stage: names that are the same up to their first number."""
    begins = [re.match(r'\D*\d*', layer.name) for layer in layers]
    keys = [match[0] if match else '' for match in begins]
    start = 0
    for i in range(1, len(keys) + 1):
        if i == len(keys) or keys[i] != keys[start]:
            yield start, i
            start = i


def _colours(found: Inspection) -> dict[str, str]:
    return {w.name: _COLOURS[i % len(_COLOURS)] for i, w in enumerate(found.warehouses)}


def _ink(colour: str) -> str:
    """Return black or white, whichever is read better on a colour."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return 'black' if 0.3 * red + 0.59 * green + 0.11 * blue > 140 else 'white'


def _shown(found: Inspection) -> list[LayerFindings]:
    """Return the layers to draw: all, or of very many evenly spread ones with at least one of each warehouse."""
    layers = found.layers
    if len(layers) <= _MOST_ROWS:
        return list(layers)
    first = {next(i for i, layer in enumerate(layers) if layer.warehouse == w.name) for w in found.warehouses}
    spread = {i * len(layers) // _MOST_ROWS for i in range(_MOST_ROWS)}
    return [layers[i] for i in sorted(first | spread)]
