"""Measured figures, and their CSV file."""

import csv
import types
import typing
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from .errors import BenchmarkError
from .files import new_file
from .machine import Machine

__all__ = ['Result', 'bound', 'read_csv', 'write_csv']


@dataclass(frozen=True)
class Result:
    """One mode of one configuration; a row of the CSV file, with the columns of :class:`Machine` behind its own.

    Attributes:
        variant: Name of the KW network.
        task: ``'inference'``, ``'features'``, ``'training step'``, ...
        batch: Images.
        height: Of the images, in pixels; likewise ``width``.
        mode: ``'static'``, ``'straightforward'``, ``'default'`` or ``'optimized'``.
        seconds: Median time.
        first_quartile: Of the times, in seconds; likewise ``third_quartile``.
        rounds: Number of times.
        speedup: Straightforward time / this time.
        over_static: This time / static time.
        peak_memory: Bytes beyond parameters, buffers and gradients, see ``measure.peak_memory``.
        difference: Largest difference from the straightforward result, relative; of gradients in training.
        bound: Static time + what mixing takes at the machine's limits, in seconds.
        over_bound: This time / bound.
        mixing_flops: FLOPs of making the kernels, per pass.
        mixing_bytes: Bytes read for making the kernels, per pass.
        preparation: Seconds that making the mode's network ready took.
        machine: Where.
        command: Command line that measured it.
    """

    variant: str
    task: str
    batch: int
    height: int
    width: int
    mode: str
    seconds: float
    first_quartile: float
    third_quartile: float
    rounds: int
    speedup: float | None
    over_static: float | None
    peak_memory: int | None
    difference: float | None
    bound: float | None
    over_bound: float | None
    mixing_flops: float | None
    mixing_bytes: float | None
    preparation: float
    machine: Machine
    command: str

    @property
    def configuration(self) -> tuple[str, str, int, int, int]:
        """What a mode is one of: variant, task, batch, height, width."""
        return (self.variant, self.task, self.batch, self.height, self.width)


def bound(static: float, flops: float, moved: float, gemm: float, bandwidth: float) -> float:
    """Return the time that no way of mixing beats, in seconds.

    Args:
        static: Time of the static network, in seconds.
        flops: FLOPs of mixing.
        moved: Bytes that mixing reads and writes.
        gemm: Measured speed of matrix products, FLOP/s.
        bandwidth: Measured speed of memory, bytes/s.
    """
    return static + max(flops / gemm, moved / bandwidth)


def write_csv(file: Path, results: Sequence[Result]) -> None:
    """Write results, a row each; under a temporary name first."""
    with new_file(file) as filling, filling.open('w', newline='') as stream:
        writer = csv.DictWriter(stream, _columns(), lineterminator='\n')
        writer.writeheader()
        for result in results:
            row = asdict(result)
            writer.writerow(row | row.pop('machine'))


def read_csv(file: Path) -> list[Result]:
    """Read results.

    Raises:
        BenchmarkError: If there is no such file, or it is not one that this package wrote.
    """
    try:
        with file.open(newline='') as stream:
            reader = csv.DictReader(stream)
            missing = set(_columns()) - set(reader.fieldnames or ())
            if missing:
                raise BenchmarkError(
                    f"'{file}' is not a result file of this version of `kw-timm bench`: it has no column "
                    f'{", ".join(sorted(missing))}. Measure again with --csv.'
                )
            return [_result(row) for row in reader]
    except OSError as error:
        raise BenchmarkError(f"'{file}' cannot be read: {error.strerror}.") from error
    except (UnicodeDecodeError, csv.Error, TypeError, ValueError) as error:
        if isinstance(error, BenchmarkError):
            raise
        raise BenchmarkError(f"'{file}' is damaged: {error}. Measure again with --csv.") from error


def _columns() -> list[str]:
    own = [field.name for field in fields(Result) if field.name != 'machine']
    return own + [field.name for field in fields(Machine)]


def _result(row: dict[str, str]) -> Result:
    machine = Machine(**{name: _parse(row[name], kind) for name, kind in typing.get_type_hints(Machine).items()})
    own = {name: kind for name, kind in typing.get_type_hints(Result).items() if name != 'machine'}
    return Result(machine=machine, **{name: _parse(row[name], kind) for name, kind in own.items()})


def _parse(text: str, kind: Any) -> Any:
    if isinstance(kind, types.UnionType):
        if not text:
            return None
        kind = typing.get_args(kind)[0]
    return kind(text)
