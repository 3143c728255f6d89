"""What a machine is and what it can do: versions, speed of large matrix products, bandwidth of reading."""

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch

from .. import __version__

__all__ = ['Machine', 'gemm_speed', 'measure_machine', 'read_bandwidth', 'synchronize']

GEMM_SECONDS = 0.05
LARGEST_GEMM = 8192
BUFFER_BYTES = 1 << 30


@dataclass(frozen=True)
class Machine:
    """Where figures were measured, with what, and the limits of it.

    Attributes:
        device: ``'cpu'`` or ``'cuda:N'``.
        device_name: Model of the processor or GPU.
        threads: Threads that torch computes with on the CPU.
        dtype: Type of weights and images, as torch names it: ``'float32'``.
        gemm: Speed of a large matrix product in that type, FLOP/s.
        bandwidth: Speed of reading memory, bytes/s.
        torch: Version of torch; likewise the others.
    """

    device: str
    device_name: str
    threads: int
    dtype: str
    gemm: float
    bandwidth: float
    torch: str
    timm: str
    kw_timm: str
    python: str


def measure_machine(device: torch.device, dtype: torch.dtype) -> Machine:
    """Name a device and measure its limits; takes a few seconds."""
    return Machine(
        device=str(device),
        device_name=device_name(device),
        threads=torch.get_num_threads(),
        dtype=str(dtype).removeprefix('torch.'),
        gemm=gemm_speed(device, dtype),
        bandwidth=read_bandwidth(device),
        torch=torch.__version__,
        timm=timm.__version__,
        kw_timm=__version__,
        python=platform.python_version(),
    )


def gemm_speed(device: torch.device, dtype: torch.dtype) -> float:
    """Return the speed of ``torch.mm`` in FLOP/s: square matrices, doubled until a product takes a while; the best."""
    size, best = 256, 0.0
    while True:
        a = torch.randn(size, size, device=device).to(dtype)
        seconds = best_time(partial(torch.mm, a, a), device)
        best = max(best, 2 * size**3 / seconds)
        if seconds >= GEMM_SECONDS or size >= LARGEST_GEMM:
            return best
        size *= 2


def read_bandwidth(device: torch.device, size: int = BUFFER_BYTES) -> float:
    """Return the speed of reading in bytes/s: reductions over a buffer much larger than any cache; the best.

    Args:
        device: Device whose memory is read.
        size: Bytes of the buffer; a quarter of the free memory, if that is less.
    """
    count = max(min(size, free_memory(device) // 4) // 4, 1)
    buffer = torch.ones(count, device=device)
    return 4 * count / min(best_time(reduce, device) for reduce in (buffer.sum, buffer.amax))


def best_time(call: Callable[[], Any], device: torch.device, repeats: int = 5) -> float:
    """Return the shortest of several times of a call in seconds, after one that is not counted."""
    times = []
    for _ in range(repeats + 1):
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return max(min(times[1:]), 1e-9)


def synchronize(device: torch.device) -> None:
    """Wait for what was started on a GPU."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


def free_memory(device: torch.device) -> int:
    """Return the bytes of memory that are free, as far as it can be told."""
    if device.type == 'cuda':
        return torch.cuda.mem_get_info(device)[0]
    for line in read_lines('/proc/meminfo'):
        if line.startswith('MemAvailable:'):
            return int(line.split()[1]) * 1024
    return 4 * BUFFER_BYTES


def device_name(device: torch.device) -> str:
    """Return the model of a GPU or of the processor."""
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    for line in read_lines('/proc/cpuinfo'):
        name, _, value = line.partition(':')
        if name.strip() == 'model name':
            return value.strip()
    return platform.processor() or platform.machine()


def read_lines(file: str) -> list[str]:
    """Return the lines of a system's file; none, where there is no such file."""
    try:
        return Path(file).read_text().splitlines()
    except OSError:
        return []
