"""A whole run: its options, all configurations one after another, and its files."""

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .cases import MODES, Case
from .errors import BenchmarkError
from .files import check_writable
from .machine import measure_machine
from .plot import check_plot, plot
from .progress import Progress
from .report import describe, markdown, text_table, update_readme
from .results import Result, write_csv
from .run import Settings, run_case

__all__ = ['Outputs', 'add_options', 'check_device', 'image_size', 'positive', 'run_all', 'settings_of']

DTYPES = ('float32', 'float64', 'bfloat16', 'float16')


@dataclass(frozen=True)
class Outputs:
    """Files that a run writes; None for none."""

    csv: Path | None = None
    plot: Path | None = None
    readme: Path | None = None

    def check(self) -> None:
        """Raise BenchmarkError if one of them could not be written."""
        for file in (self.csv, self.plot, self.readme):
            if file is not None:
                check_writable(file)
        if self.plot is not None:
            check_plot(self.plot)
        if self.readme is not None:
            update_readme(self.readme, None)

    def write(self, results: Sequence[Result], rendered_by: str = '') -> None:
        """Write all of them, and say so."""
        if self.csv is not None:
            write_csv(self.csv, results)
        if self.plot is not None:
            plot(results, self.plot)
        if self.readme is not None:
            update_readme(self.readme, markdown(results, rendered_by))
        written = [f"'{file}'" for file in (self.csv, self.plot, self.readme) if file is not None]
        if written:
            print(f'written: {", ".join(written)}')


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that every benchmark has."""
    parser.add_argument(
        '--modes', nargs='+', choices=MODES, default=list(MODES), metavar='MODE', help=f'of {", ".join(MODES)} (all)'
    )
    cuda = torch.cuda.is_available()
    parser.add_argument('--device', default='cuda' if cuda else 'cpu', help='cpu, cuda or cuda:N (%(default)s)')
    parser.add_argument('--dtype', choices=DTYPES, default='float32', help='of weights and images (%(default)s)')
    parser.add_argument('--threads', type=positive, metavar='N', help="of the CPU (torch's own choice)")
    parser.add_argument('--repeats', type=positive, default=7, metavar='N', help='rounds at least (%(default)s)')
    parser.add_argument(
        '--min-time', type=seconds, default=2.0, metavar='S', help='seconds of rounds per configuration (%(default)s)'
    )
    parser.add_argument(
        '--memory-budget', metavar='BYTES', help='2GB, for instance: what the optimized network may take beyond cells'
    )
    parser.add_argument('--csv', type=Path, metavar='FILE', help='write all figures, after every configuration')
    parser.add_argument('--plot', type=Path, metavar='FILE', help='draw the times')
    parser.add_argument(
        '--readme', type=Path, metavar='FILE', help='write the tables between the marks of a Markdown file'
    )


def settings_of(options: argparse.Namespace) -> Settings:
    """Return how to measure, and set torch's threads.

    Raises:
        BenchmarkError: If the device is not there.
    """
    device = check_device(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    return Settings(device, getattr(torch, options.dtype), options.repeats, options.min_time)


def check_device(name: str) -> torch.device:
    """Return a device, if it is one that can be measured on and is there."""
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device('meta')
    if device.type not in ('cpu', 'cuda'):
        raise BenchmarkError(f"--device {name}: expected 'cpu', 'cuda' or 'cuda:N'.")
    if device.type == 'cuda' and (device.index or 0) >= torch.cuda.device_count():
        raise BenchmarkError(f'--device {name}: torch {torch.__version__} sees {torch.cuda.device_count()} GPUs here.')
    return device


def positive(text: str) -> int:
    """Parse a whole number above 0, for argparse."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got '{text}'")
    return int(text)


def seconds(text: str) -> float:
    """Parse a time of at least 0 in seconds, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float('inf'):
        raise argparse.ArgumentTypeError(f"expected seconds, 0 or more, got '{text}'")
    return value


def image_size(words: Sequence[str]) -> tuple[int, int]:
    """Return height and width in pixels of ``['224']``, ``['800x1333']`` or ``['800', '1333']``.

    Raises:
        BenchmarkError: If the words are none of these.
    """
    numbers = [part for word in words for part in word.lower().split('x')]
    if not 1 <= len(numbers) <= 2 or not all(n.isdecimal() and int(n) > 0 for n in numbers):
        raise BenchmarkError(f"'{' '.join(words)}' is not a size in pixels. Expected 224, 800x1333 or 800 1333.")
    return int(numbers[0]), int(numbers[-1])


def run_all(cases: Iterable[Case], total: int, settings: Settings, outputs: Outputs, command: str) -> int:
    """Measure configurations one after another; print a table each, and keep the CSV file up to date.

    Args:
        cases: Configurations; taken one by one, so that only one variant is in memory.
        total: Their number.
        settings: How to measure.
        outputs: Files to write.
        command: Command line to record.

    Returns:
        Exit code: 0, 1 if a mode had to be left out, 130 when interrupted.
    """
    results: list[Result] = []
    complete = True
    try:
        with Progress(total) as progress:
            progress.show('measuring the limits of the machine')
            machine = measure_machine(settings.device, settings.dtype)
            progress.say(describe([machine]))
            for case in cases:
                found, whole = run_case(case, settings, machine, command, progress.say, progress.show)
                complete = complete and whole
                results += found
                if outputs.csv is not None:
                    write_csv(outputs.csv, results)
                progress.say('\n' + text_table(found) if found else f'{case}: nothing could be measured')
                progress.advance()
                del case
    except KeyboardInterrupt:
        if not results:
            where = 'nothing was measured yet'
        elif outputs.csv is not None:
            where = f"what was measured is in '{outputs.csv}'; --from-csv shows it"
        else:
            where = 'what was measured is above; --csv FILE would have kept it'
        print(f'\ninterrupted: {where}')
        return 130
    print()
    if results:
        outputs.write(results)
    return 0 if complete else 1
