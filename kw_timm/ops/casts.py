"""Cells in the type of autocast, made once for all layers that share them in a pass."""

from dataclasses import dataclass

import torch
from torch.utils.weak import TensorWeakRef, WeakIdKeyDictionary

from .modes import is_straightforward, learns

__all__ = ['cast_once']


@dataclass
class _Cast:
    """The newest cast of some cells. The graphs of the layers that use it keep it alive, nothing else does."""

    dtype: torch.dtype
    version: int
    tensor: TensorWeakRef
    users: set[int]


_newest = WeakIdKeyDictionary()


def cast_once(cells: torch.Tensor, dtype: torch.dtype | None, user: int) -> torch.Tensor:
    """Return cells in a type, the same tensor to everyone who asks in the same pass of a training.

    Who asks a second time is in another pass, and gets another one: cells may have changed unseen (``cells.data``).

    Args:
        cells: ``(n, co, ci, *window)``.
        dtype: The type; None for their own.
        user: Who asks, a number of its own.
    """
    if dtype is None or cells.dtype == dtype:
        return cells
    if not learns(cells) or torch.compiler.is_compiling() or is_straightforward():
        return cells.to(dtype)
    known: _Cast | None = _newest.get(cells)
    if known is not None and (known.dtype, known.version) == (dtype, cells._version) and user not in known.users:
        cast: torch.Tensor | None = known.tensor()
        if cast is not None:
            known.users.add(user)
            return cast
    cast = cells.to(dtype)
    _newest[cells] = _Cast(dtype, cells._version, TensorWeakRef(cast), {user})
    return cast
