"""A whole run: its options, all configurations one after another, and its files."""

import argparse
import re
import sys
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from ..files import check_writable, new_file, replace_section
from .cases import OWN_MODES, Case, run_case
from .measure import Settings
from .report import BEGIN, END, check_plot, describe, markdown, plot, text_table
from .results import Result, measure_machine, write_csv

__all__ = ['add_options', 'check_files', 'image_size', 'positive', 'run_all', 'settings_of', 'write_files']


def _at_least(least: float, kind: type, text: str) -> float:
    """Parse a number, for argparse."""
    pattern = r'\d+' if kind is int else r'\d+\.?\d*|\.\d+'
    if not re.fullmatch(pattern, text) or kind(text) < least:
        what = 'whole number' if kind is int else 'number'
        raise argparse.ArgumentTypeError(f"expected a {what}, {least} or more, got '{text}'")
    return kind(text)


positive = partial(_at_least, 1, int)


def image_size(words: Sequence[str]) -> tuple[int, int]:
    """Return height and width in pixels of ``['224']``, ``['800x1333']`` or ``['800', '1333']``; or a ValueError."""
    found = re.fullmatch(r'0*([1-9]\d*)(?:[x ]0*([1-9]\d*))?', ' '.join(words).lower())
    if not found:
        raise ValueError(f"'{' '.join(words)}' is not a size in pixels. Expected 224, 800x1333 or 800 1333.")
    return int(found[1]), int(found[2] or found[1])


def add_options(parser: argparse.ArgumentParser, modes: Sequence[str] = OWN_MODES) -> None:
    """Add the options that every benchmark has; ``modes`` may be asked for."""
    add, number = parser.add_argument, partial(_at_least, 0, float)
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    known, usual = (' '.join(names) for names in (modes, OWN_MODES))
    add('--modes', nargs='+', choices=modes, default=OWN_MODES, metavar='MODE', help=f'of {known} ({usual})')
    add('--device', default=device, help='cpu, cuda or cuda:N (%(default)s)')
    add('--dtype', choices=('float32', 'float64', 'bfloat16', 'float16'), default='float32', help='(%(default)s)')
    add('--threads', type=positive, metavar='N', help="of the CPU (torch's own choice)")
    add('--cpu-time', action='store_true', help='what the process computed: with --threads 1, where others compute too')
    add('--precision', type=number, default=3.0, metavar='P', help='measure medians to so many percent (%(default)s)')
    add('--repeats', type=positive, default=3, metavar='N', help='... in so many rounds at least (%(default)s)')
    add('--min-time', type=number, default=1.0, metavar='S', help='... and in so many seconds (%(default)s)')
    add('--max-time', type=number, default=8.0, metavar='S', help='... but stop after so many (%(default)s)')
    add('--memory-budget', metavar='BYTES', help='what an optimized network may take beyond cells: 2GB, for instance')
    add('--csv', type=Path, metavar='FILE', help='write all figures, after every configuration')
    add('--plot', type=Path, metavar='FILE', help='draw the times')
    add('--readme', type=Path, metavar='FILE', help='write the tables between the marks of a Markdown file')


def check_files(options: argparse.Namespace) -> None:
    """Raise ValueError if a file that is asked for could not be written."""
    for file in filter(None, (options.csv, options.plot, options.readme)):
        check_writable(file)
    if options.plot:
        check_plot(options.plot)
    if options.readme:
        replace_section(options.readme, (BEGIN, END, ''))


def write_files(results: Sequence[Result], options: argparse.Namespace, rendered_by: str = '') -> None:
    """Write the files that are asked for, and say so."""
    if options.csv:
        write_csv(options.csv, results)
    if options.plot:
        plot(results, options.plot)
    if options.readme:
        text = replace_section(options.readme, (BEGIN, END, f'\n{markdown(results, rendered_by)}\n'))
        with new_file(options.readme) as filling:
            filling.write_text(text)
    written = [f"'{file}'" for file in (options.csv, options.plot, options.readme) if file]
    if written:
        print(f'written: {", ".join(written)}')


def settings_of(options: argparse.Namespace) -> Settings:
    """Return how to measure, and set torch's threads; raise ValueError for a device that is not there."""
    name, count = options.device, torch.cuda.device_count()
    if not re.fullmatch(r'cpu|cuda(:\d+)?', name):
        raise ValueError(f"--device {name}: expected 'cpu', 'cuda' or 'cuda:N'.")
    device = torch.device(name)
    if device.type == 'cuda' and (device.index or 0) >= count:
        raise ValueError(
            f'--device {name}: torch {torch.__version__} sees {count} GPUs here; --device cpu measures the processor.'
        )
    if options.cpu_time and (options.threads, device.type) != (1, 'cpu'):
        raise ValueError('--cpu-time is the time of one thread on the CPU; add --threads 1 --device cpu.')
    if options.threads:
        torch.set_num_threads(options.threads)
    rounds = (options.repeats, options.precision / 100, options.max_time, options.min_time, options.cpu_time)
    return Settings(device, getattr(torch, options.dtype), *rounds)


def run_all(cases: Iterable[Case], total: int, settings: Settings, options: argparse.Namespace, command: str) -> int:
    """Measure so many configurations; print a table each, keep the CSV file up to date, write the others at the end.

    They are taken one by one, so that only one variant is in memory. ``options`` name the files: ``csv``, ``plot``,
    ``readme``. Returns the exit code: 0, 1 if a mode had to be left out, 130 when interrupted.
    """

    def say(text: str) -> None:
        with tqdm.external_write_mode():
            print(text, flush=True)

    results: list[Result] = []
    complete = True
    try:
        # disable=None: no bar where stderr is no terminal.
        with tqdm(total=total, file=sys.stderr, disable=None, unit='configuration', leave=False) as bar:
            bar.set_description_str('measuring the limits of the machine')
            machine = measure_machine(settings)
            say(describe([machine]))
            for case in cases:
                found = run_case(case, settings, machine, command, say, bar.set_description_str)
                complete = complete and len(found) == len(case.modes)
                results += found
                if options.csv:
                    write_csv(options.csv, results)
                say('\n' + text_table(found) if found else f'{case}: nothing could be measured')
                bar.update()
                del case
    except KeyboardInterrupt:
        where = f"in '{options.csv}'; --from-csv shows it" if options.csv else 'above; --csv FILE would have kept it'
        print(f'\ninterrupted: {f"what was measured is {where}" if results else "nothing was measured yet"}')
        return 130
    print()
    if results:
        write_files(results, options)
    return 0 if complete else 1
