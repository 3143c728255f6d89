"""Results as a picture: grouped bars."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .cases import MODES
from .errors import BenchmarkError
from .files import new_file
from .report import grouped
from .results import Result

__all__ = ['check_plot', 'plot']

# Distinct to colour-blind eyes too (Okabe and Ito).
COLOURS = {'static': '#999999', 'straightforward': '#D55E00', 'default': '#56B4E9', 'optimized': '#009E73'}
WIDTH = 0.8
LOG_RANGE = 20


def check_plot(file: Path) -> Any:
    """Return matplotlib's Figure class.

    Raises:
        BenchmarkError: If matplotlib is missing or cannot write files of that ending.
    """
    try:
        from matplotlib.backend_bases import FigureCanvasBase
        from matplotlib.figure import Figure
    except ImportError as error:
        raise BenchmarkError("--plot needs matplotlib: pip install 'kw-timm[bench]'") from error
    known = FigureCanvasBase.get_supported_filetypes()
    if file.suffix.removeprefix('.').lower() not in known:
        raise BenchmarkError(f"'{file}' must end in one of: {', '.join('.' + kind for kind in sorted(known))}.")
    return Figure


def plot(results: Sequence[Result], file: Path) -> None:
    """Draw the time of every mode, a panel per task, a group per configuration, with quartiles and bounds."""
    make_figure = check_plot(file)
    tasks = list(dict.fromkeys(result.task for result in results))
    by_task = [list(grouped(r for r in results if r.task == task).values()) for task in tasks]
    widest = max(len(groups) for groups in by_task)
    figure = make_figure(figsize=(max(6.0, 1.6 * widest + 2), 4 * len(tasks)), dpi=150, layout='constrained')
    panels = figure.subplots(len(tasks), squeeze=False)[:, 0]
    for panel, task, groups in zip(panels, tasks, by_task, strict=True):
        _draw(panel, groups)
        panel.set_title(task)
    with new_file(file) as filling:
        figure.savefig(filling)


def _draw(panel: Any, groups: Sequence[dict[str, Result]]) -> None:
    modes = [mode for mode in MODES if any(mode in group for group in groups)]
    width = WIDTH / len(modes)
    for i, mode in enumerate(modes):
        shown = [(g, group[mode]) for g, group in enumerate(groups) if mode in group]
        spread = [
            [1e3 * (r.seconds - r.first_quartile) for _, r in shown],
            [1e3 * (r.third_quartile - r.seconds) for _, r in shown],
        ]
        places = [g + (i - (len(modes) - 1) / 2) * width for g, _ in shown]
        bars = panel.bar(
            places, [1e3 * r.seconds for _, r in shown], width, color=COLOURS[mode], yerr=spread, capsize=2, label=mode
        )
        if mode not in ('static', 'straightforward'):
            panel.bar_label(bars, [f'{r.speedup:.1f}x' if r.speedup else '' for _, r in shown], fontsize=7, padding=2)
    bounds = [(g, next(iter(group.values())).bound) for g, group in enumerate(groups)]
    drawn = [(g, 1e3 * limit) for g, limit in bounds if limit is not None]
    if drawn:
        left, right = [g - WIDTH / 2 for g, _ in drawn], [g + WIDTH / 2 for g, _ in drawn]
        panel.hlines([limit for _, limit in drawn], left, right, colors='black', linestyles='dashed', label='bound')
    times = [r.seconds for group in groups for r in group.values()]
    if max(times) > LOG_RANGE * min(times):
        panel.set_yscale('log')
    panel.margins(y=0.15)
    panel.set_ylabel('median time in ms')
    firsts = [next(iter(group.values())) for group in groups]
    panel.set_xticks(
        range(len(groups)),
        [f'{r.variant}\nbatch {r.batch}\n{r.height} x {r.width}' for r in firsts],
        fontsize=8,
    )
    panel.legend(fontsize=8)
