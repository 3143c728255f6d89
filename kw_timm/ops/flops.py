"""What the registered operators cost, for ``torch.utils.flop_counter.FlopCounterMode``.

Importing this registers the formulas. A multiply-add is two operations, as torch counts.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula

from . import attend, mixing  # noqa: F401  (they register the operators)

__all__ = ['attend_flops', 'mixing_flops']

Shape = Sequence[int]


def mixing_flops(coefficients: Shape, cells: Shape, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Return the operations of mixing cells ``(n, *cell)`` or ``(m, n, *cell)`` by coefficients ``(B, m, n)``."""
    return 2 * math.prod(coefficients) * math.prod(cells[2:])


def attend_flops(
    x: Shape,
    first: Shape,
    first_bias: Shape,
    norm: Any,
    norm_bias: Any,
    epsilon: float,
    second: Shape,
    *args: Any,
    out_shape: Any = None,
    **kwargs: Any,
) -> int:
    """Return the operations of an attention's two maps for a batch."""
    return 2 * x[0] * (math.prod(first) + math.prod(second))


for _operator, _formula in ((torch.ops.kw_timm.mix_cells, mixing_flops), (torch.ops.kw_timm.attend, attend_flops)):
    if _operator not in flop_registry:
        register_flop_formula(_operator)(_formula)
