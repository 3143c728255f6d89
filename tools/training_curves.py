"""Compare runs of ``kw-timm train``: top-1 over epochs, mean and spread over seeds, in a table and a picture.

A kind of run is NAME=PATTERN, the folders of its seeds. Each optimizer and learning rate has a panel of its own.

Example:
    python tools/training_curves.py curves.png 'static=runs/static-*' 'KW 1x=runs/kw1x-*'
"""

import argparse
import csv
import statistics
from collections.abc import Mapping, Sequence
from glob import glob
from pathlib import Path

import yaml

from kw_timm.files import new_file

Curves = Mapping[tuple[str, str], list[list[float]]]


def read_runs(kinds: Sequence[str]) -> Curves:
    """Return the top-1 after every epoch, in percent, of every run, by optimizer and learning rate, and by name.

    Raises:
        SystemExit: If there are no such runs, or those of one kind have other numbers of epochs.
    """
    found: dict[tuple[str, str], list[list[float]]] = {}
    for kind in kinds:
        name, _, pattern = kind.partition('=')
        folders = sorted(Path(folder) for folder in glob(pattern) if Path(folder, 'summary.csv').is_file())
        if not folders:
            raise SystemExit(f"'{kind}' names no run: expected NAME=PATTERN of folders that kw-timm train has written.")
        for folder in folders:
            with (folder / 'summary.csv').open() as lines:
                top1 = [float(line['eval_top1']) for line in csv.DictReader(lines)]
            options = yaml.safe_load((folder / 'args.yaml').read_text())
            images = options['batch_size'] * options['grad_accum_steps'] * options['processes']
            rate = options['lr'] or options['lr_base'] * images / options['lr_base_size']
            found.setdefault((f'{options["opt"]} {rate:g}', name), []).append(top1)
    for (rate, name), runs in found.items():
        if len({len(run) for run in runs}) > 1:
            raise SystemExit(f"The runs of '{name}' by {rate} have {[len(run) for run in runs]} epochs; finish them.")
    return found


def table(curves: Curves) -> str:
    """Return a line of Markdown for every kind: the top-1 of each seed after the last epoch, and how it came there."""
    lines = ['| by | network | half way, % | at the end, % | seeds, % |', '| --- | --- | --- | --- | --- |']
    for (rate, name), runs in curves.items():
        half, last = ([run[at] for run in runs] for at in (len(runs[0]) // 2 - 1, -1))
        seeds = ', '.join(f'{value:.1f}' for value in last)
        lines.append(f'| {rate} | {name} | {_spread(half)} | {_spread(last)} | {seeds} |')
    return '\n'.join(lines)


def _spread(values: Sequence[float]) -> str:
    spread = f' ± {statistics.stdev(values):.1f}' if len(values) > 1 else ''
    return f'{statistics.mean(values):.1f}{spread}'


def draw(curves: Curves, file: Path) -> None:
    """Draw means as lines, and every seed as a thin one."""
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    rates, names = (list(dict.fromkeys(part)) for part in zip(*curves, strict=True))
    figure, axes = plt.subplots(
        1, len(rates), figsize=(3.6 * len(rates), 3.4), sharey=True, squeeze=False, layout='constrained'
    )
    for axis, rate in zip(axes[0], rates, strict=True):
        for number, name in enumerate(names):
            runs = curves.get((rate, name), [])
            if not runs:
                continue
            epochs = range(1, len(runs[0]) + 1)
            for run in runs:
                axis.plot(epochs, run, color=f'C{number}', alpha=0.35, linewidth=0.8)
            means = [statistics.mean(values) for values in zip(*runs, strict=True)]
            axis.plot(epochs, means, color=f'C{number}', marker='o', markersize=3, label=name)
        axis.set(title=rate, xlabel='epoch', ylim=(0, 102))
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel('top-1, %')
    labels = {label: line for axis in axes[0] for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(labels.values(), labels.keys(), loc='outside lower center', ncols=len(labels))
    with new_file(file) as filling:
        figure.savefig(filling, dpi=100, format=file.suffix[1:] or 'png')
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table and draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('picture', type=Path, help='file to write')
    parser.add_argument('kinds', nargs='+', metavar='NAME=PATTERN', help='folders of runs that differ in the seed only')
    args = parser.parse_args(argv)
    curves = read_runs(args.kinds)
    print(table(curves))
    draw(curves, args.picture)
    print(f'curves: {args.picture}')


if __name__ == '__main__':
    main()
