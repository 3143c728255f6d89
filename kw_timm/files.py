"""Files that are always whole, and the marked sections of Markdown files; needs the standard library alone."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ['check_writable', 'new_file', 'new_files', 'replace_section']


@contextmanager
def new_file(file: Path) -> Iterator[Path]:
    """Fill a temporary file that takes the place of ``file`` when the block ends well; otherwise nothing changes.

    It has the same ending, by which some libraries choose a format. A link stays a link, permissions stay.

    Raises:
        OSError: If it cannot be written there.
    """
    file = file.resolve()
    handle, name = tempfile.mkstemp(prefix=f'.{file.stem}.', suffix=f'.incomplete{file.suffix}', dir=file.parent)
    os.close(handle)
    filling = Path(name)
    try:
        yield filling
        filling.chmod(file.stat().st_mode & 0o777 if file.exists() else 0o644)
        filling.replace(file)
    finally:
        filling.unlink(missing_ok=True)


@contextmanager
def new_files(file: Path) -> Iterator[Path]:
    """As :func:`new_file`, for libraries that write other files beside theirs, which name one another.

    They are filled in a temporary folder under their own names and moved when the block ends well, ``file`` last.

    Raises:
        OSError: If they cannot be written there.
    """
    file = file.resolve()
    with tempfile.TemporaryDirectory(prefix=f'.{file.stem}.', suffix='.incomplete', dir=file.parent) as folder:
        filling = Path(folder, file.name)
        yield filling
        for part in sorted(Path(folder).iterdir(), key=lambda part: part == filling):
            part.replace(file.parent / part.name)


def check_writable(file: Path) -> None:
    """Raise ValueError unless ``file`` can be written: better before hours of work than after."""
    folder = file.resolve().parent
    if file.is_dir():
        raise ValueError(f"'{file}' is a folder; name a file.")
    if not folder.is_dir():
        raise ValueError(f"There is no folder '{folder}' to write '{file.name}' into. Make it first.")
    if not os.access(folder, os.W_OK):
        raise ValueError(f"The folder '{folder}' of '{file.name}' cannot be written. Choose another place.")


def replace_section(file: Path, *sections: tuple[str, str, str]) -> str:
    """Return the text of a Markdown file with what stands between marks replaced.

    Args:
        file: Markdown file; it is not written.
        sections: The mark before, the mark behind, and the new text between them, which gets lines of its own.

    Raises:
        ValueError: If the file cannot be read or lacks a mark.
    """
    try:
        text = file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"'{file}' cannot be read: {error}.") from error
    for begin, end, section in sections:
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if not found or not closed:
            raise ValueError(f"'{file}': it has no line '{begin}' with a line '{end}' after it. Add both.")
        text = f'{before}{begin}\n{section}\n{end}{after}'
    return text
