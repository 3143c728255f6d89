"""A run's state: what a checkpoint holds, so that resuming gives what never stopping gives."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..files import new_file

__all__ = ['BEST', 'LAST', 'Stream', 'load', 'random_state', 'restore_random_state', 'save', 'seed_all']

LAST = 'last.pth.tar'
BEST = 'model_best.pth.tar'


def seed_all(*numbers: int) -> None:
    """Let everything that is drawn follow from some numbers."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


class Stream:
    """Random numbers apart from all others: those by which images are drawn, whatever is drawn between them.

    Args:
        *numbers: What they follow from.
    """

    def __init__(self, *numbers: int) -> None:
        with self._put_back():
            seed_all(*numbers)

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Draw from this stream."""
        with self._put_back():
            restore_random_state(self.state)
            yield

    @contextmanager
    def _put_back(self) -> Iterator[None]:
        before = random_state()
        try:
            yield
        finally:
            self.state = random_state()
            restore_random_state(before)


def random_state() -> dict[str, Any]:
    """Return the state of all generators of this process, as what may be loaded without unpickling."""
    kind, keys, *rest = np.random.get_state()
    state: dict[str, Any] = dict(
        torch=torch.get_rng_state(),
        python=random.getstate(),
        numpy=(str(kind), torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
    )
    if torch.cuda.is_available():
        state['cuda'] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """Continue from :func:`random_state`."""
    torch.set_rng_state(state['torch'])
    version, numbers, gauss = state['python']
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = state['numpy']
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    if 'cuda' in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state['cuda'])


def save(state: dict[str, Any], *files: Path) -> None:
    """Write a checkpoint to each file; one that is there stays whole until the new one is.

    Raises:
        OSError: If there is no room.
    """
    for file in files:
        with new_file(file) as filling:
            try:
                torch.save(state, filling)
            except RuntimeError as error:  # torch's writer, of a full disk.
                raise OSError(f"'{file}' could not be written: {' '.join(str(error).split()):.200}") from error


def load(file: Path) -> dict[str, Any]:
    """Read a checkpoint of a run.

    Raises:
        ValueError: If it is none.
    """
    if not file.is_file():
        raise ValueError(f"There is no checkpoint '{file}' to resume from; leave --resume out to begin.")
    try:
        state: dict[str, Any] = torch.load(file, map_location='cpu', weights_only=True)
        if 'run' not in state:
            raise ValueError('it holds weights, but no run')
    except Exception as error:
        raise ValueError(
            f"'{file}' is no checkpoint of kw-timm train: {' '.join(str(error).split()):.200}. Resume from a "
            f'{LAST}, or begin with its weights: --initial-checkpoint.'
        ) from error
    return state
