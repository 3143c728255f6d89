"""Measuring calls: time in alternation, peak memory, difference of what they return."""

import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from ..ops.buffers import empty_cache
from .machine import synchronize

__all__ = ['Call', 'Timing', 'alternate', 'peak_memory', 'relative_difference']

# Computes something once; returns the tensors by which it is compared.
Call = Callable[[], Sequence[torch.Tensor]]

MOST_ROUNDS = 10_000


@dataclass(frozen=True)
class Timing:
    """Times of one call, in seconds.

    Attributes:
        median: Median over the rounds.
        quartiles: First and third quartile.
        rounds: Number of rounds.
    """

    median: float
    quartiles: tuple[float, float]
    rounds: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> 'Timing':
        """Summarize the times of all rounds."""
        if len(seconds) == 1:
            return cls(seconds[0], (seconds[0], seconds[0]), 1)
        first, median, third = statistics.quantiles(seconds, n=4, method='inclusive')
        return cls(median, (first, third), len(seconds))


def alternate(
    calls: Mapping[str, Call],
    device: torch.device,
    rounds: int,
    min_time: float = 0.0,
    on_round: Callable[[int], None] = lambda _: None,
) -> dict[str, Timing]:
    """Time calls in alternation: every round runs each one once, so that a machine's drift meets all of them.

    The round's first is another one each round, so that none always follows the same.

    Args:
        calls: What to time, by name.
        device: Device that they compute on.
        rounds: Least number of rounds.
        min_time: Rounds go on until they took this many seconds in all.
        on_round: Told how many rounds are done.

    Returns:
        Times by name.
    """
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    collects = gc.isenabled()
    gc.disable()
    try:
        total, done = 0.0, 0
        while names and (done < rounds or (total < min_time and done < MOST_ROUNDS)):
            first = done % len(names)
            for name in names[first:] + names[:first]:
                synchronize(device)
                start = time.perf_counter()
                calls[name]()
                synchronize(device)
                times[name].append(time.perf_counter() - start)
                total += times[name][-1]
            done += 1
            on_round(done)
    finally:
        if collects:
            gc.enable()
    return {name: Timing.of(seconds) for name, seconds in times.items()}


def peak_memory(call: Call, device: torch.device) -> int:
    """Return the most memory that tensors took at once during a call, in bytes, beyond what was allocated before it.

    Counted is what torch's allocator hands out: activations, kernels, results, temporary buffers. Not counted are the
    buffers of libraries that allocate for themselves (oneDNN's reordered weights on the CPU), and on the CPU the
    release of what was allocated before the call. The call is run twice, so that what it allocates once and for
    all, gradients that it keeps for instance, is there already; memory that KW layers keep for the next kernels is
    counted.
    """
    call()
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    empty_cache()
    with _silent_profiler(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    now = peak = 0
    for event in _memory_events(profiler):
        now += event
        peak = max(peak, now)
    return peak


def _memory_events(profiler: Any) -> list[int]:
    """Return the bytes of every allocation (positive) and release (negative) on the CPU, in their order."""
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == '[memory]']
    events = [e for e in events if e.device_type() == torch.profiler.DeviceType.CPU]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


@contextmanager
def _silent_profiler() -> Iterator[None]:
    """Drop what the profiler's C++ code writes on stderr: that it begins, ends, and finds no GPU."""
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def relative_difference(
    found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], jointly: bool = False
) -> float:
    """Return the largest absolute difference, relative to the largest expected magnitude.

    Args:
        found: Tensors.
        expected: Tensors of the same shapes.
        jointly: Relate to the largest magnitude of all tensors. Otherwise each tensor is held against its own, and
            the largest of those differences returned. Gradients that cancel to nothing, as of a bias before a
            BatchNorm, have no magnitude of their own that could be meant.

    Raises:
        ValueError: If the shapes differ.
    """
    shapes = [[tuple(tensor.shape) for tensor in tensors] for tensors in (found, expected)]
    if shapes[0] != shapes[1]:
        raise ValueError(f'Expected tensors of shapes {shapes[1]}, got {shapes[0]}.')
    pairs = [(a.double(), b.double()) for a, b in zip(found, expected, strict=True) if b.numel()]
    differences = [float((a - b).abs().max()) for a, b in pairs]
    magnitudes = [float(b.abs().max()) for _, b in pairs]
    if jointly:
        differences, magnitudes = [max(differences, default=0.0)], [max(magnitudes, default=0.0)]
    return max((d / m if m else float(d > 0) for d, m in zip(differences, magnitudes, strict=True)), default=0.0)
