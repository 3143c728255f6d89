"""Measuring calls: time in alternation, peak memory, difference of what they return; and the limits of the machine."""

import gc
import math
import os
import statistics
import sys
import time
import timeit
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.profiler import DeviceType, ProfilerActivity, profile

from ..ops.buffers import empty_cache

__all__ = ['Settings', 'alternate', 'gemm_speed', 'peak_memory', 'quartiles', 'read_bandwidth', 'relative_difference']


@dataclass(frozen=True)
class Settings:
    """How to measure: rounds go on until every median is known well enough, or for ``max_time``."""

    device: torch.device
    dtype: torch.dtype  # of weights and images
    rounds: int = 3  # at least
    precision: float = 0.03  # relative uncertainty that is small enough
    max_time: float = 8.0  # seconds of a configuration's rounds
    min_time: float = 0.0
    cpu_time: bool = False  # what the process computed instead of what passed, of one thread

    @property
    def clock(self) -> Callable[[], float]:
        """What tells the time in seconds."""
        return time.process_time if self.cpu_time else time.perf_counter


def alternate(
    calls: Mapping[str, Callable[[], Any]], settings: Settings, on_round: Callable[[int], None] = lambda _: None
) -> dict[str, list[float]]:
    """Return times in seconds of calls, by name, that are made in alternation.

    Every round runs each one once, so that a machine's drift meets all of them, and begins with another one, so that
    none always follows the same. They should have run before.
    """
    names, done, spent = list(calls), 0, 0.0
    times: dict[str, list[float]] = {name: [] for name in names}
    wait, clock = _waiting(settings.device), settings.clock

    def enough() -> bool:
        if done < settings.rounds or spent < settings.min_time:
            return not names
        known = all(uncertainty(done, *quartiles(own)) <= settings.precision for own in times.values())
        return known or spent >= settings.max_time or done >= 1000

    gc.disable()
    try:
        while not enough():
            first = done % len(names)
            for name in names[first:] + names[:first]:
                wait()
                start = clock()
                calls[name]()
                wait()
                times[name].append(clock() - start)
            spent += sum(own[-1] for own in times.values())
            done += 1
            on_round(done)
    finally:
        gc.enable()
    return times


def quartiles(times: Sequence[float]) -> list[float]:
    """Return the first quartile, the median and the third quartile."""
    return statistics.quantiles(times if len(times) > 1 else [*times, *times], n=4, method='inclusive')


def uncertainty(count: int, first_quartile: float, median: float, third_quartile: float) -> float:
    """Return a median's relative uncertainty: a box plot's notch. Where two do not overlap, medians differ (95 %).

    Source: McGill, Tukey, Larsen: Variations of Box Plots, The American Statistician 32 (1978), section 7.
    """
    return 1.57 * (third_quartile - first_quartile) / math.sqrt(count) / median if count > 1 else math.inf


def peak_memory(call: Callable[[], Any], device: torch.device) -> tuple[int, Any]:
    """Run a call; return the most memory that its tensors took at once, in bytes, and what it returns.

    Counted is what torch's allocator hands out beyond what was allocated before: activations, kernels, results,
    temporary buffers, and memory that KW layers keep for the next kernels. Not counted are the buffers of libraries
    that allocate for themselves (oneDNN's reordered weights), and on the CPU the release of what was there before.
    """
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        returned = call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before, returned
    empty_cache()
    with _silent_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        returned = call()
    now = peak = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == '[memory]' and event.device_type() == DeviceType.CPU:
            now += event.nbytes()
            peak = max(peak, now)
    return peak, returned


def relative_difference(
    found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], jointly: bool = False
) -> float:
    """Return the largest absolute difference, relative to the largest expected magnitude in its tensor, or in all.

    Gradients are compared jointly: those that cancel to nothing, as of a bias before a BatchNorm, have no magnitude.
    Other shapes than expected are a ValueError.
    """
    got, wanted = ([tuple(tensor.shape) for tensor in tensors] for tensors in (found, expected))
    if got != wanted:
        raise ValueError(f'Expected tensors of shapes {wanted}, got {got}.')
    pairs = [(a.double(), b.double()) for a, b in zip(found, expected, strict=True) if b.numel()]
    parts = torch.tensor([[(a - b).abs().max(), b.abs().max()] for a, b in pairs] or [[0.0, 1.0]]).double()
    differences, magnitudes = (parts.amax(0, keepdim=True) if jointly else parts).T
    return float((differences / magnitudes).nan_to_num(0.0, posinf=math.inf).max())


def gemm_speed(settings: Settings, dtype: torch.dtype | None = None) -> float:
    """Return the speed of ``torch.mm`` in FLOP/s: square matrices, doubled until a product takes a while; the best."""
    size, best, seconds = 256, 0.0, 0.0
    while seconds < 0.05 and size <= 8192:
        a = torch.randn(size, size, device=settings.device).to(dtype or settings.dtype)
        seconds = _best_time(partial(torch.mm, a, a), settings)
        best = max(best, 2 * size**3 / seconds)
        size *= 2
    return best


def read_bandwidth(settings: Settings, size: int = 1 << 29) -> float:
    """Return the speed of reading in bytes/s: reductions over so many bytes, more than any cache has; the best."""
    buffer = torch.ones(size // 4, device=settings.device)
    return size / min(_best_time(reduce, settings) for reduce in (buffer.sum, buffer.amax))


def _best_time(call: Callable[[], Any], settings: Settings) -> float:
    """Return the shortest of several times of a call in seconds."""
    wait = _waiting(settings.device)
    return min(timeit.repeat(lambda: (call(), wait()), timer=settings.clock, number=1, repeat=6))


def _waiting(device: torch.device) -> Callable[[], None]:
    """Return what waits for all that was started on a GPU."""
    return partial(torch.cuda.synchronize, device) if device.type == 'cuda' else lambda: None


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Drop what the profiler's C++ code writes: that it begins, ends, and finds no GPU."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, 'w') as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
