"""Findings in words and tables."""

import math
import statistics

from ..tables import aligned
from .measure import UNUSED, Inspection

__all__ = ['HEAD', 'LITTLE', 'MUCH', 'percent', 'rows', 'text_table', 'unused_cells', 'verdict', 'warehouse_rows']

# Kernel variation below which the attention hardly does anything, and from which on it is at work.
LITTLE, MUCH = 0.01, 0.1
HEAD = ('layer', 'warehouse', 'mixtures', 'cells', 'effective cells', 'attention varies', 'kernels vary')
_WAREHOUSE_HEAD = ('warehouse', 'layers', 'cells', 'of shape', 'per mixture', 'used by nobody')


def percent(part: float) -> str:
    """Return a part of 1 in percent; a dash for NaN."""
    value = 100 * part
    if math.isnan(value):
        return '-'
    if value in (0, 100) or value >= 99.95:
        return f'{value:.0f} %'
    if value < 0.095:
        return f'{value:.1g} %'
    return f'{value:.1f} %' if value >= 9.995 else f'{value:.2f} %'


def rows(found: Inspection) -> list[tuple[str, ...]]:
    """Return the table of layers, without its head."""
    return [
        (
            layer.name,
            layer.warehouse,
            str(layer.mixtures),
            str(layer.cells),
            f'{layer.effective_cells:.1f}',
            percent(layer.attention_variation),
            percent(layer.kernel_variation),
        )
        for layer in found.layers
    ]


def warehouse_rows(found: Inspection) -> list[tuple[str, ...]]:
    """Return the table of warehouses, its head first."""
    return [
        _WAREHOUSE_HEAD,
        *(
            (
                w.name,
                str(len(w.layers)),
                str(w.cells),
                ' x '.join(map(str, w.cell_shape)),
                f'{w.cell_num_ratio:g}',
                f'{len(w.unused)} ({percent(len(w.unused) / w.cells)})' if w.unused else '0',
            )
            for w in found.warehouses
        ),
    ]


def text_table(table: list[tuple[str, ...]]) -> str:
    """Return rows, the head first, aligned: the first two columns to the left, numbers to the right."""
    return aligned(table, left=2)


def verdict(found: Inspection) -> str:
    """Return one sentence: does the attention do anything?"""
    if found.images < 2:
        return 'One image does not show whether kernels vary between images: give two or more.'
    values = [layer.kernel_variation for layer in found.layers]
    most = max(values)
    where = found.layers[values.index(most)].name
    if not most:
        return (
            'Kernels do not vary between images at all: the attention does nothing yet, as right after a warm start '
            '(0 % in every layer).'
        )
    begin = (
        f'Kernels vary between images by {percent(most)} at most (in {where}), {percent(statistics.median(values))} '
    )
    begin += 'in the median layer: '
    if most < LITTLE:
        return f'{begin}the attention hardly does anything yet (less than {100 * LITTLE:g} % everywhere).'
    if most < MUCH:
        return f'{begin}the attention does a little ({100 * LITTLE:g} % to {100 * MUCH:g} %).'
    working = sum(value >= MUCH for value in values)
    return f'{begin}the attention is at work ({100 * MUCH:g} % or more in {working} of {len(values)} layers).'


def unused_cells(found: Inspection) -> str:
    """Return one sentence on cells that nobody uses."""
    count, total = sum(len(w.unused) for w in found.warehouses), sum(w.cells for w in found.warehouses)
    meaning = f'largest coefficient over layers, mixtures and images below {UNUSED:g} / n in a warehouse of n cells'
    if not count:
        return f'Every one of the {total} cells is used by somebody (none has its {meaning}).'
    return f'{count} of {total} cells, {percent(count / total)}, are used by nobody ({meaning}).'
