"""Progress on stderr: a bar where tqdm is installed, lines otherwise."""

import sys
from types import TracebackType
from typing import Any, Self

__all__ = ['Progress']


class Progress:
    """Shows how many of ``total`` configurations are done, and what is being done.

    Example:
        >>> with Progress(2) as progress:
        ...     progress.show('measuring')
        ...     progress.advance()
    """

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0
        self.bar: Any = None
        try:
            from tqdm import tqdm
        except ImportError:
            return
        # disable=None: no bar where stderr is no terminal.
        self.bar = tqdm(total=total, file=sys.stderr, disable=None, unit='configuration', leave=False)

    def show(self, text: str) -> None:
        """Say what is being done."""
        if self.bar is not None:
            self.bar.set_description_str(text)
        elif ': round ' not in text:  # A line per round would be too many.
            print(f'[{self.done + 1}/{self.total}] {text}', file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """Print something that stays, on stdout."""
        if self.bar is not None:
            self.bar.clear()
        print(text, flush=True)

    def advance(self) -> None:
        """Count one configuration as done."""
        self.done += 1
        if self.bar is not None:
            self.bar.update()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.close()
