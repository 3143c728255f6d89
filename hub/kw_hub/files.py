"""Write files and folders so that what is there is always whole: under a temporary name first, then renamed."""

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kw_timm import files
from kw_timm.weights.store import RECORD, sha256_of

from .errors import HubError

__all__ = ['new_file', 'new_folder', 'room_for', 'write_record']

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def new_folder(folder: Path, overwrite: bool = False) -> Iterator[Path]:
    """Fill a temporary folder that takes the place of ``folder`` when the block ends well; otherwise nothing changes.

    Args:
        folder: Where the result will be.
        overwrite: Replace what is there.

    Raises:
        HubError: If it is there already, or the disk is full.
    """
    _check_absent(folder, overwrite)
    with room_for(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        filling = Path(tempfile.mkdtemp(prefix=f'.{folder.name}.', suffix='.incomplete', dir=folder.parent))
        try:
            yield filling
            for made in (filling, *filling.iterdir()):
                made.chmod(0o755 if made.is_dir() else 0o644)
            _swap(filling, folder, overwrite)
        finally:
            shutil.rmtree(filling, ignore_errors=True)


@contextmanager
def new_file(file: Path, overwrite: bool = False) -> Iterator[Path]:
    """Fill a temporary file that takes the place of ``file`` when the block ends well; otherwise nothing changes.

    Args:
        file: Where the result will be.
        overwrite: Replace what is there.

    Raises:
        HubError: If it is there already, the disk is full, or the folder cannot be written.
    """
    _check_absent(file, overwrite)
    with room_for(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        with files.new_file(file) as filling:
            yield filling


def write_record(folder: Path, file: str, **facts: Any) -> dict[str, Any]:
    """Write the record of a folder's weight file, by which it is checked later, and return it."""
    path = folder / file
    record = {'file': file, 'size': path.stat().st_size, 'sha256': sha256_of(path), **facts}
    (folder / RECORD).write_text(json.dumps(record, indent=2) + '\n')
    return record


def _check_absent(target: Path, overwrite: bool) -> None:
    if target.exists() and not overwrite:
        raise HubError(f"'{target}' is there already. Give --force to replace it, or name another place.")


def _swap(filling: Path, folder: Path, overwrite: bool) -> None:
    """Rename a filled folder into place; a folder that is there is set aside until the new one is."""
    if not folder.exists():
        try:
            filling.rename(folder)
            return
        except OSError:
            # Another process was faster; both made the same.
            if not folder.is_dir():
                raise
            if not overwrite:
                return
    aside = folder.with_name(f'.{folder.name}.{os.getpid()}.old')
    folder.rename(aside)
    try:
        filling.rename(folder)
    except OSError:
        aside.rename(folder)
        raise
    shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def room_for(target: Path) -> Iterator[None]:
    """Turn a full disk or a folder that cannot be written into an error that says what to do."""
    advice = 'Nothing was changed. Make room, or choose another place (KW_TIMM_HOME, --output).'
    try:
        yield
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise HubError(
                f"The disk of '{target.parent}' is full ({os.strerror(error.errno or 0)}). {advice}"
            ) from error
        if isinstance(error, PermissionError):
            raise HubError(f"'{target.parent}' cannot be written ({error.strerror}). {advice}") from error
        raise
    except Exception as error:
        # safetensors and torch report a full disk in words of their own.
        if any(f'os error {number}' in str(error) or os.strerror(number) in str(error) for number in _NO_ROOM):
            raise HubError(f"The disk of '{target.parent}' is full. {advice}") from error
        raise
