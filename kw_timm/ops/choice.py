"""Which of several ways to compute the same is taken: the one that a rule says, or the one that was the fastest.

Measuring is for devices that the rules do not know. It is done once per layer, shape, type and device, and kept, as
cuDNN does under ``torch.backends.cudnn.benchmark``. That is the switch on a GPU; :func:`measured` is another, anywhere.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from .modes import is_computing

__all__ = ['fastest', 'forget_ways', 'is_measured', 'measured', 'measured_ways']

_ROUNDS = 3

_switched_on = False
_times: dict[tuple[Any, ...], dict[str, float]] = {}


@contextmanager
def measured() -> Iterator[None]:
    """Let every KW layer measure which way is the fastest while the context lasts, the first time it meets a shape.

    Example:
        >>> with measured():
        ...     model(images)
    """
    global _switched_on
    before, _switched_on = _switched_on, True
    try:
        yield
    finally:
        _switched_on = before


def measured_ways() -> dict[tuple[Any, ...], dict[str, float]]:
    """Return what was measured: seconds by way, by what was computed (its name, shapes, constants, type, device)."""
    return {key: dict(times) for key, times in _times.items()}


def forget_ways() -> None:
    """Measure everything anew."""
    _times.clear()


def is_measured(like: torch.Tensor) -> bool:
    """Return whether ways are to be measured for tensors like this one now."""
    if like.device.type != 'cuda':
        return _switched_on and is_computing(like)
    exact = torch.backends.cudnn.deterministic or torch.are_deterministic_algorithms_enabled()
    wanted = (_switched_on or torch.backends.cudnn.benchmark) and not exact
    # In a CUDA graph nothing may wait.
    return wanted and is_computing(like) and not torch.cuda.is_current_stream_capturing()


def fastest(key: tuple[Any, ...], ways: Mapping[str, Callable[[], Any]], like: torch.Tensor) -> str:
    """Return the name of the way that is the fastest.

    Args:
        key: What is computed, as far as its time depends on it, but for type and device.
        ways: Name -> a call that computes it, changes nothing that lasts, and can be repeated.
        like: A tensor of the type and on the device that it is computed with.
    """
    key = (*key, like.dtype, like.device)
    if key not in _times:
        _times[key] = {name: _seconds(way, like.device) if len(ways) > 1 else 0.0 for name, way in ways.items()}
    return _best(_times[key])


def _best(times: Mapping[str, float]) -> str:
    return min(times, key=times.__getitem__)


def _seconds(way: Callable[[], Any], device: torch.device) -> float:
    """Return the shortest of some times; infinity where there is too little memory for the way."""
    wait = (lambda: None) if device.type == 'cpu' else torch.get_device_module(device).synchronize
    best = math.inf
    try:
        way()
        for _ in range(_ROUNDS):
            wait()
            began = time.perf_counter()
            way()
            wait()
            best = min(best, time.perf_counter() - began)
    except torch.OutOfMemoryError:
        return math.inf
    return best
