"""Draw the two pictures of docs/index.md: how a kernel is made, and who shares a warehouse.

Example:
    python tools/draw_docs.py docs
"""

import argparse
import io
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from kw_timm.files import new_file

COLOURS = ('#4c78a8', '#f58518', '#54a24b', '#b279a2')
GREY = '#8a8a8a'


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', type=Path, help='where kernel.svg and warehouse.svg are written')
    folder: Path = parser.parse_args().folder
    mpl.rcParams.update({'svg.hashsalt': 'kw-timm', 'svg.fonttype': 'none', 'font.size': 11, 'text.color': GREY})
    for name, draw in (('kernel', _kernel), ('warehouse', _warehouse)):
        figure, axes = plt.subplots(figsize=(9, 3.6))
        axes.set_axis_off()
        draw(axes)
        text = io.BytesIO()
        figure.savefig(text, format='svg', transparent=True, bbox_inches='tight', metadata={'Date': None})
        plt.close(figure)
        with new_file(folder / f'{name}.svg') as file:
            file.write_bytes(b'\n'.join(line.rstrip() for line in text.getvalue().splitlines()) + b'\n')


def _box(axes: Axes, x: float, y: float, width: float, text: str) -> None:
    axes.add_patch(FancyBboxPatch((x, y), width, 0.7, boxstyle='round,pad=0.05', fc='none', ec=GREY))
    axes.text(x + width / 2, y + 0.35, text, ha='center', va='center')


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], bend: float = 0) -> None:
    style = f'arc3,rad={bend}'
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle='-|>', mutation_scale=12, color=GREY, connectionstyle=style))


def _cell(axes: Axes, x: float, y: float, weights: np.ndarray) -> None:
    """Draw a sum of cells as stripes of their colours, as wide as they weigh."""
    left = x
    for colour, weight in zip(COLOURS, weights / weights.sum(), strict=True):
        axes.add_patch(Rectangle((left, y), weight * 0.8, 0.8, fc=colour, ec='none'))
        left += weight * 0.8
    axes.add_patch(Rectangle((x, y), 0.8, 0.8, fc='none', ec=GREY))


def _kernel(axes: Axes) -> None:
    weights = np.array([[8, 1, 2, 1], [1, 5, 1, 5], [2, 2, 9, 1], [4, 1, 1, 6]], float)
    _box(axes, 0, 3, 2, 'input of the layer')
    _box(axes, 2.9, 3, 1.2, 'mean')
    _box(axes, 5, 3, 1.8, 'attention')
    _arrow(axes, (2.1, 3.35), (2.8, 3.35))
    _arrow(axes, (4.2, 3.35), (4.9, 3.35))
    axes.text(0, 1.75, 'cells of the warehouse', va='bottom')
    for i in range(4):
        _cell(axes, i * 0.95, 0.8, np.eye(4)[i])
    axes.text(5, 2.15, 'weights', va='bottom', ha='right')
    for mixture, row in enumerate(weights / weights.sum(1, keepdims=True)):
        for cell, weight in enumerate(row):
            corner = (5.2 + cell * 0.36, 2.0 - mixture * 0.36)
            axes.add_patch(Rectangle(corner, 0.33, 0.33, fc=COLOURS[cell], alpha=float(weight), ec=GREY, lw=0.5))
    axes.text(5.9, 0.45, 'one row per mixture', ha='center', va='top')
    _arrow(axes, (5.9, 2.9), (5.9, 2.5))
    _arrow(axes, (3.9, 1.2), (5.05, 1.4))
    _arrow(axes, (6.8, 1.4), (7.5, 1.4))
    for i, row in enumerate(weights):
        _cell(axes, 7.7 + (i % 2) * 0.8, 1.5 - (i // 2) * 0.8, row)
    axes.text(8.5, 2.4, 'kernel for this image', va='bottom', ha='center')
    axes.set(xlim=(-0.2, 9.6), ylim=(0, 4))


def _warehouse(axes: Axes) -> None:
    layers = (
        'stage 1\nlayers 1 to 4',
        'stage 2\nfirst layer',
        'stage 2\nothers',
        'stage 3\nfirst layer',
        'stage 3\nothers',
    )
    for i, text in enumerate(layers):
        _box(axes, i * 2, 2.4, 1.6, text)
        if i:
            _arrow(axes, (i * 2 - 0.3, 2.75), (i * 2 - 0.1, 2.75))
    for stage, users in enumerate(((0, 1), (2, 3), (4,))):
        middle = sum(users) / len(users) * 2 + 0.8
        for i in range(4):
            x = middle - 0.9 + (i % 4) * 0.47
            axes.add_patch(Rectangle((x, 0.55), 0.42, 0.42, fc=COLOURS[stage], alpha=0.4 + 0.2 * i, ec=GREY, lw=0.5))
        axes.text(middle, 0.4, f'warehouse of stage {stage + 1}', ha='center', va='top')
        for user in users:
            _arrow(axes, (middle, 1.1), (user * 2 + 0.8, 2.3))
    axes.set(xlim=(-0.2, 9.9), ylim=(0, 3.3))


if __name__ == '__main__':
    main()
