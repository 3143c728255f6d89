"""Tables for a terminal."""

from collections.abc import Sequence

__all__ = ['aligned']


def aligned(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Return rows of equal length, the head among them, with so many first columns to the left, others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return '\n'.join(
        '  '.join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
