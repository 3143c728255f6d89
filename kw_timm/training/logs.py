"""What is seen of a run: a bar, a line per epoch, CSV and TensorBoard."""

import time
from pathlib import Path
from typing import Any

from timm.utils.summary import trim_summary, update_summary

__all__ = ['Logs']


class Logs:
    """Shows a run's progress, by one process only.

    Args:
        folder: Where ``summary.csv`` (a line per epoch, as timm's) and ``tensorboard`` go; None shows nothing.
        steps: Steps of the whole run.
        done: Steps that were taken before.
        epoch: Epoch that comes first; what was logged of it or later by an earlier try is dropped.
    """

    def __init__(self, folder: Path | None, steps: int, done: int, epoch: int) -> None:
        from tqdm import tqdm

        self.folder = folder
        self.bar = tqdm(total=steps, initial=done, unit='step', desc='training', disable=folder is None)
        self.board: Any = None
        if folder is not None:
            trim_summary(str(folder / 'summary.csv'), epoch)
            self.board = _board(folder / 'tensorboard', done)
        self._since, self._images, self._rate = time.perf_counter(), 0, 0.0

    def step(self, epoch: int, images: int) -> None:
        """Note a step of so many images, of all processes."""
        self._images += images
        elapsed = time.perf_counter() - self._since
        if elapsed > 1:
            self._rate, self._images, self._since = self._images / elapsed, 0, time.perf_counter()
        self.bar.set_postfix_str(f'epoch {epoch + 1}, {self._rate:.1f} images/s', refresh=False)
        self.bar.update()

    def epoch(self, epoch: int, step: int, train: dict[str, float], evaluation: dict[str, float]) -> None:
        """Write an epoch's figures."""
        if self.folder is None:
            return
        shown = {**train, **{f'eval {key}': value for key, value in evaluation.items()}}
        self.say(f'epoch {epoch + 1}: ' + ', '.join(f'{key} {value:.4g}' for key, value in shown.items()))
        update_summary(epoch, train, evaluation, str(self.folder / 'summary.csv'))
        if self.board is not None:
            for part, values in (('train', train), ('eval', evaluation)):
                for key, value in values.items():
                    self.board.add_scalar(f'{part}/{key}', value, step)
            self.board.flush()

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if self.folder is not None:
            self.bar.write(text)

    def close(self) -> None:
        """End the bar."""
        self.bar.close()
        if self.board is not None:
            self.board.close()


def _board(folder: Path, done: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=done)
