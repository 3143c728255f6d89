"""Findings as one page that needs nothing but itself."""

import base64
import struct
from collections.abc import Mapping, Sequence
from html import escape

from .measure import Inspection
from .pictures import DPI
from .text import HEAD, rows, unused_cells, verdict, warehouse_rows

__all__ = ['page']

_STYLE = """
:root { color-scheme: light; }
body { margin: 0 auto; max-width: 1100px; padding: 1rem; background: #fff; color: #1b1f24;
  font: 16px/1.5 system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 0.4rem; }
.verdict { border-left: 5px solid #4477aa; background: #f1f3f6; padding: 0.8rem 1rem; font-weight: 600; }
.note { color: #57606a; font-size: 0.9rem; margin: 0.3rem 0; }
.wide { overflow-x: auto; -webkit-overflow-scrolling: touch; }
table { border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.2rem 0.7rem; text-align: right; white-space: nowrap; }
th { border-bottom: 2px solid #888; }
td { border-bottom: 1px solid #e3e6ea; }
th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left; }
.numbers th:nth-child(2), .numbers td:nth-child(2) { text-align: right; }
tbody tr:hover { background: #f1f3f6; }
img { display: block; width: min(var(--width), 100%); height: auto; }
@media (max-width: 700px) { img { width: calc(0.72 * var(--width)); } }
"""


def page(title: str, facts: Sequence[str], found: Inspection, pictures: Mapping[str, bytes]) -> str:
    """Return the page as HTML.

    Args:
        title: What was inspected.
        facts: Sentences on how.
        found: Findings.
        pictures: PNG files by name: ``plan``, ``variation``, and one per warehouse by ``attention`` and its place.
    """
    warehouses = warehouse_rows(found)
    parts = [
        f'<h1>{escape(title)}</h1>',
        f'<p class="verdict">{escape(verdict(found))}</p>',
        f'<p>{escape(unused_cells(found))}</p>',
        *(f'<p class="note">{escape(fact)}</p>' for fact in facts),
        '<h2>How far kernels vary between images</h2>',
        _note('Standard deviation of the kernels over the images, relative to their size; coloured by warehouse.'),
        _picture(pictures['variation'], 'Kernel variation of every layer, in percent'),
        '<h2>Who shares what</h2>',
        _note(
            'A line per layer in the order of the network, a column per warehouse; a box holds the number of mixtures.'
        ),
        _picture(pictures['plan'], 'Layers and the warehouses that they share'),
        '<h2>Warehouses</h2>',
        _table(warehouses[0], warehouses[1:], 'numbers'),
        '<h2>Layers</h2>',
        _note(
            'Effective cells: of how many cells a mixture consists, the exponential of its entropy. '
            'The last two columns: spread over images relative to size, of coefficients and of the kernels they make.'
        ),
        _table(HEAD, rows(found), 'layers'),
        '<h2>Attention over cells</h2>',
        _note(
            'A line per mixture, a column per cell; the scale is logarithmic but around zero. Above, the largest '
            'coefficient of each cell, red where nobody uses it, and the largest spread. Of more values than pixels '
            'the largest of neighbours is shown.'
        ),
    ]
    for i, warehouse in enumerate(found.warehouses):
        count = f'{len(warehouse.layers)} layer{"s" if len(warehouse.layers) > 1 else ""}'
        parts += [
            f'<h3>{escape(warehouse.name)}: {warehouse.cells} cells, {count}</h3>',
            _picture(pictures[f'attention{i}'], f'Attention of the layers of {warehouse.name} over its cells'),
        ]
    body = '\n'.join(parts)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n'
    )


def _note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def _picture(png: bytes, text: str) -> str:
    data = base64.b64encode(png).decode('ascii')
    (pixels,) = struct.unpack('>I', png[16:20])  # The width, in the first chunk of every PNG file.
    style = f'--width: {100 * pixels // DPI}px'
    return f'<div class="wide"><img style="{style}" alt="{escape(text)}" src="data:image/png;base64,{data}"></div>'


def _table(head: Sequence[str], lines: Sequence[Sequence[str]], kind: str) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        return f'<tr>{"".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells)}</tr>'

    body = '\n'.join(row(line, 'td') for line in lines)
    table = f'<table class="{kind}"><thead>{row(head, "th")}</thead><tbody>\n{body}\n</tbody></table>'
    return f'<div class="wide">{table}</div>'
