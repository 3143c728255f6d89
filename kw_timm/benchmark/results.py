"""Measured figures, and their CSV file."""

import csv
import platform
import re
import typing
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import timm
import torch

from .. import __version__
from ..files import new_file
from ..ops import native
from .measure import Settings, gemm_speed, read_bandwidth, uncertainty

__all__ = ['Machine', 'Result', 'bound', 'device_name', 'grouped', 'measure_machine', 'read_csv', 'write_csv']


@dataclass(frozen=True)
class Machine:
    """Where figures were measured, with what, and the limits of it."""

    device: str  # 'cpu' or 'cuda:N'
    device_name: str  # model of the processor or GPU
    threads: int  # that torch computes with on the CPU
    dtype: str  # of weights and images: 'float32'
    gemm: float  # speed of a large matrix product in that type, FLOP/s
    bandwidth: float  # speed of reading memory, bytes/s
    torch: str  # versions
    timm: str
    kw_timm: str
    python: str
    instructions: str | None = None  # of the processor that torch computes with: 'AVX2'
    float32_gemm: float | None = None  # speed of the product in float32, if the type is of fewer bits
    clock: str | None = None  # 'CPU time', if that was measured

    @property
    def remark(self) -> str:
        """What is to be known of a type that this device computes slower than float32; else nothing."""
        if self.float32_gemm is None or self.gemm >= self.float32_gemm:
            return ''
        return (
            f'{self.dtype} without instructions for it, {self.float32_gemm / self.gemm:.0f} times slower than float32'
        )


@dataclass(frozen=True)
class Result:
    """One mode of one configuration; a row of the CSV file, with the columns of :class:`Machine` behind its own."""

    variant: str  # the KW network's name
    task: str  # 'inference', 'features', 'training step', ...
    batch: int  # images
    height: int  # of the images, in pixels
    width: int
    mode: str
    seconds: float  # median time of a batch
    first_quartile: float  # in seconds
    third_quartile: float
    rounds: int  # number of times
    speedup: float | None  # straightforward time / this time
    over_static: float | None  # this time / static time
    peak_memory: int | None  # bytes, see measure.peak_memory
    difference: float | None  # largest from the straightforward result, relative; of gradients in training
    bound: float | None  # static time + what mixing takes at the machine's limits, in seconds
    over_bound: float | None  # this time / bound
    mixing_flops: float | None  # of making the kernels of a batch
    mixing_bytes: float | None  # that are read for it
    preparation: float  # seconds that making the network ready took
    stored_bytes: int | None  # of parameters and buffers, or of the file that another runtime reads
    machine: Machine
    command: str  # command line that measured it

    @property
    def uncertainty(self) -> float:
        """Of the median, relative."""
        return uncertainty(self.rounds, self.first_quartile, self.seconds, self.third_quartile)


COLUMNS = typing.get_type_hints(Result) | typing.get_type_hints(Machine)
del COLUMNS['machine']
ADDED = {'stored_bytes', 'instructions', 'float32_gemm', 'clock'}  # columns that files of earlier versions lack


def device_name(device: torch.device) -> str:
    """Return the model of a GPU, or of the processor."""
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    file = Path('/proc/cpuinfo')
    found = re.search(r'model name\s*: (.*)', file.read_text() if file.is_file() else '')
    return found[1].strip() if found else platform.processor() or platform.machine()


def _instructions() -> str:
    """Name the instructions that torch computes with, and those of KW layers where they are others."""
    of_torch, own = torch.backends.cpu.get_cpu_capability(), native.instructions()
    if own is None:
        return f'{of_torch}, KW layers not compiled'
    return of_torch if own.upper() == of_torch else f'{of_torch}, KW layers {own}'


def measure_machine(settings: Settings) -> Machine:
    """Name a device and measure its limits; takes a few seconds."""
    device = settings.device
    what = (str(device), device_name(device), torch.get_num_threads(), str(settings.dtype).removeprefix('torch.'))
    versions = (torch.__version__, timm.__version__, __version__, platform.python_version())
    limits = (gemm_speed(settings), read_bandwidth(settings))
    instructions = _instructions() if device.type == 'cpu' else None
    float32 = gemm_speed(settings, torch.float32) if settings.dtype.itemsize < 4 else None
    return Machine(*what, *limits, *versions, instructions, float32, 'CPU time' if settings.cpu_time else None)


def bound(static: float, flops: float, moved: float, gemm: float, bandwidth: float) -> float:
    """Return the time in seconds that no way of mixing beats: static time, and FLOPs or bytes at measured speeds."""
    return static + max(flops / gemm, moved / bandwidth)


def grouped(results: Sequence[Result]) -> list[dict[str, Result]]:
    """Return results by mode, for every configuration; a later run of a configuration replaces an earlier one."""
    groups: dict[Any, dict[str, Result]] = {}
    for r in results:
        groups.setdefault((r.variant, r.task, r.batch, r.height, r.width), {})[r.mode] = r
    return list(groups.values())


def write_csv(file: Path, results: Sequence[Result]) -> None:
    """Write results, a row each."""
    with new_file(file) as filling, filling.open('w', newline='') as stream:
        writer = csv.DictWriter(stream, list(COLUMNS), lineterminator='\n')
        writer.writeheader()
        for result in results:
            row = asdict(result)
            writer.writerow(row | row.pop('machine'))


def read_csv(file: Path) -> list[Result]:
    """Read results; raise ValueError if there is no such file, or it is not one that this package wrote."""
    try:
        with file.open(newline='') as stream:
            reader = csv.DictReader(stream)
            missing = sorted(set(COLUMNS) - ADDED - set(reader.fieldnames or ()))
            if missing:
                raise ValueError(f'it is not a result file of `kw-timm bench`, it has no column {", ".join(missing)}')
            return [_result(row) for row in reader]
    except (OSError, csv.Error, TypeError, ValueError) as error:
        why = getattr(error, 'strerror', None) or error
        raise ValueError(f"'{file}' cannot be read: {why}. `kw-timm bench --csv FILE` writes such a file.") from error


def _result(row: dict[str, str]) -> Result:
    values: dict[str, Any] = {}
    for name, hint in COLUMNS.items():
        parse, *may_be_none = typing.get_args(hint) or (hint,)
        values[name] = None if may_be_none and not row.get(name) else parse(row[name])
    return Result(machine=Machine(**{field.name: values.pop(field.name) for field in fields(Machine)}), **values)
