"""Write a file aside and rename it, so that what is there is always whole."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import BenchmarkError

__all__ = ['check_writable', 'new_file']


@contextmanager
def new_file(file: Path) -> Iterator[Path]:
    """Fill a temporary file, of the same ending, that takes the place of ``file`` when the block ends well."""
    file = file.resolve()  # A link stays a link.
    handle, name = tempfile.mkstemp(prefix=f'.{file.stem}.', suffix=file.suffix, dir=file.parent)
    os.close(handle)
    filling = Path(name)
    try:
        yield filling
        filling.chmod(file.stat().st_mode & 0o777 if file.exists() else 0o644)
        filling.replace(file)
    finally:
        filling.unlink(missing_ok=True)


def check_writable(file: Path) -> None:
    """Raise BenchmarkError unless ``file`` can be written: better before hours of measuring than after."""
    folder = file.resolve().parent
    if file.is_dir():
        raise BenchmarkError(f"'{file}' is a folder; name a file.")
    if not folder.is_dir():
        raise BenchmarkError(f"There is no folder '{folder}' to write '{file.name}' into. Make it first.")
    if not os.access(folder, os.W_OK):
        raise BenchmarkError(f"The folder '{folder}' of '{file.name}' cannot be written. Choose another place.")
