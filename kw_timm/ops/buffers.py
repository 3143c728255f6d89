"""Memory of large tensors on a CPU, used again instead of asked for anew.

Beyond some size the C library takes every buffer from the system and gives it back, and the system backs it page by
page with zeros: that takes longer than making kernels in it. Here memory of kernels that are no longer needed is kept
for the next ones, and what all layers of a warehouse add to its gradient goes into one buffer.
"""

import ctypes
import math
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.weak import TensorWeakRef

from . import native
from .modes import is_plain

__all__ = ['empty_buffer', 'empty_cache', 'kept_bytes', 'slices', 'sum_buffer']

# The C library keeps smaller buffers for the next request.
_LARGE = 16 * 2**20
_MOST_KEPT = 64 * 2**20

_kept: list[torch.Tensor] = []
_lock = threading.RLock()  # The same thread may give memory back while it takes some: collecting garbage does.


def kept_bytes() -> int:
    """Return how much memory is kept for the next tensors and used by none."""
    return sum(memory.nbytes for memory in list(_kept))


def empty_cache() -> None:
    """Give memory that is kept back to the system."""
    _kept.clear()


def empty_buffer(shape: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    """Return an uninitialized contiguous tensor of the type and device of ``like``."""
    if not is_plain(like) or math.prod(shape) * like.element_size() < _LARGE:
        return like.new_empty(shape)
    return _lend(shape, like.dtype)[0]


def _lend(shape: Sequence[int], dtype: torch.dtype) -> tuple[torch.Tensor, Any]:
    """Return a tensor and what lives as long as any tensor that shares its memory."""
    size = math.prod(shape) * dtype.itemsize
    memory = _take(size)
    loan = (ctypes.c_char * size).from_address(memory.data_ptr())
    weakref.finalize(loan, _keep, memory).atexit = False
    return _borrowed(loan, shape, dtype), loan


def _borrowed(loan: Any, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    return torch.frombuffer(loan, dtype=dtype, count=math.prod(shape)).view(tuple(shape))


def _take(size: int) -> torch.Tensor:
    with _lock:
        fitting = [memory for memory in _kept if size <= memory.nbytes <= 2 * size]
        if fitting:
            best = min(fitting, key=lambda memory: memory.nbytes)
            _kept[:] = [memory for memory in _kept if memory is not best]
            return best
    memory = torch.empty(size, dtype=torch.uint8, device='cpu')
    native.use_huge_pages(memory)
    return memory


def _keep(memory: torch.Tensor) -> None:
    with _lock:
        if memory.nbytes <= _MOST_KEPT:
            _kept.append(memory)
        while kept_bytes() > _MOST_KEPT:
            del _kept[0]


# By backward pass and parameter, the loan of the buffer that the pass adds the parameter's gradient up in. A parameter
# is known by its address, which another may inherit: hence the reference to it.
_sums: dict[tuple[int, int], tuple[weakref.ref[Any], TensorWeakRef]] = {}
_pass_id: Callable[[], int] = getattr(torch._C, '_current_graph_task_id', lambda: -1)


def slices(length: int, count: int) -> Iterator[slice]:
    """Yield slices of like sizes, ``count`` or as many as there are elements: what is in memory at one time."""
    count = min(length, count)
    for i in range(count):
        yield slice(length * i // count, length * (i + 1) // count)


def sum_buffer(cells: torch.Tensor, parameter: torch.Tensor | None = None) -> tuple[torch.Tensor, bool]:
    """Return where a layer's backward adds the gradient of its cells, and whether it is the first of this pass to.

    The first gets an uninitialized buffer, fills it and returns it as its gradient. The pass keeps that until every
    layer with the same parameter is done; meanwhile the others add to it, and return no gradient. When the pass lets go
    of the buffer (because it added something itself, or needs no gradient of the cells), the next layer is a first one.

    Args:
        cells: The cells as the backward pass got them, ``(n, co, ci, *window)``: what hooks on saved tensors gave back.
        parameter: The leaf of the graph that the forward pass was given as cells; None if they were computed, or are
            not to be shared.
    """
    shared = parameter is not None and _pass_id() >= 0 and is_plain(cells) and cells.nbytes >= _LARGE
    if not shared or parameter is None:
        return empty_buffer(cells.shape, cells), True
    key = _pass_id(), id(parameter)
    entry = _sums.get(key)
    loan = entry[0]() if entry is not None and entry[1]() is parameter else None
    if loan is not None:
        return _borrowed(loan, cells.shape, cells.dtype), False
    buffer, loan = _lend(cells.shape, cells.dtype)
    _sums[key] = weakref.ref(loan, lambda dead: _forget(key, dead)), TensorWeakRef(parameter)
    return buffer, True


def _forget(key: tuple[int, int], dead: weakref.ref[Any]) -> None:
    if key in _sums and _sums[key][0] is dead:
        del _sums[key]
