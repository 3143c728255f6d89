"""Read pickled checkpoints without running what is in them: an allow-list of classes, everything else is refused."""

import argparse
import contextlib
import importlib
import pickle
import re
import sys
from pathlib import Path
from typing import Any

import torch

from .entries import select_weights

__all__ = ['RefusedFileError', 'allowed_globals', 'load_pickled', 'select_weights', 'unreadable']

_ZIP_MAGIC = b'PK\x03\x04'
_PICKLE_MAGIC = b'\x80'
_HISTORY_MODULE = 'mmengine.logging.history_buffer'


class RefusedFileError(ValueError):
    """A weight file holds objects that are not on the allow-list; nothing of it was run."""


class _LogHistory:
    """What the history of a log in mmengine's checkpoints is read as where mmengine is not in use."""


def _log_history() -> type:
    mmengine = sys.modules.get(_HISTORY_MODULE)
    return mmengine.HistoryBuffer if mmengine else _LogHistory


def _statistic(owner: Any, name: Any) -> Any:
    """Stand for ``getattr``, by which such a history names its methods; gives nothing else."""
    if owner is not _log_history() or name not in ('min', 'max', 'mean', 'current'):
        raise pickle.UnpicklingError(f'Unsupported global: GLOBAL getattr of {owner!r}: {name!r}')
    return getattr(owner, name, None)


def allowed_globals() -> list[Any]:
    """Return what may be unpickled besides torch's own tensors and containers.

    Training arguments are an ``argparse.Namespace``; MMCV keeps metrics in its ``meta`` as numpy scalars and arrays,
    under the module names of numpy 1 or numpy 2; mmengine keeps the histories of its logs, which hold such arrays.
    """
    allowed: list[Any] = [argparse.Namespace, (_log_history(), f'{_HISTORY_MODULE}.HistoryBuffer')]
    allowed.append((_statistic, 'builtins.getattr'))
    with contextlib.suppress(ImportError):
        np: Any = importlib.import_module('numpy')
        codecs: Any = importlib.import_module('_codecs')
        multiarray = importlib.import_module(
            'numpy._core.multiarray' if hasattr(np, '_core') else 'numpy.core.multiarray'
        )
        for function in ('scalar', '_reconstruct'):
            allowed += [
                (getattr(multiarray, function), f'{module}.multiarray.{function}')
                for module in ('numpy.core', 'numpy._core')
            ]
        # numpy writes the bytes of a scalar as text that this function turns into bytes again; it does no more.
        allowed += [np.ndarray, np.dtype, (codecs.encode, '_codecs.encode')]
        allowed += [type(np.dtype(kind)) for kind in '?bhilqBHILQefd']
    return allowed


def load_pickled(file: Path, mmap: bool = False) -> Any:
    """Unpickle a ``torch.save`` file from an allow-list.

    Args:
        file: File that exists.
        mmap: Leave the tensors in the file until they are used, where its format allows it.

    Returns:
        What was saved: tensors on the CPU, containers, numbers, strings, ``argparse.Namespace``, numpy values.

    Raises:
        RefusedFileError: If the file holds anything else; the message names it. Nothing of the file was run.
        ValueError: If the file is a web page, cut off, or no checkpoint.
    """
    with file.open('rb') as opened:
        start = opened.read(512)
    if start.lstrip()[:1] == b'<':
        raise ValueError(
            f"The file '{file}' cannot be read: it is a web page, not a weight file. Its host answered with a page "
            f'(often a download quota). Open the link in a browser, or try again later.'
        )
    # What is on torch's own list stays there: the context takes away afterwards all that it was given.
    missing = [entry for entry in allowed_globals() if entry not in torch.serialization.get_safe_globals()]
    with torch.serialization.safe_globals(missing):
        try:
            return torch.load(file, map_location='cpu', weights_only=True, mmap=mmap and start.startswith(_ZIP_MAGIC))
        except pickle.UnpicklingError as error:
            names = _refused_names(file, str(error))
            if names or start[:1] == _PICKLE_MAGIC:
                what = ', '.join(names) or str(error).splitlines()[-1]
                raise RefusedFileError(
                    f"The weight file '{file}' was refused and nothing of it was run: it holds {what}. Only tensors, "
                    f'containers, numbers, argparse.Namespace and numpy values are read. Use a file from its authors, '
                    f'or let whoever made it save the state dict alone.'
                ) from error
            raise unreadable(file, error) from error
        except Exception as error:
            # Damaged bytes bring out any error of torch's, zip's and pickle's; all mean the same.
            raise unreadable(file, error) from error


def _refused_names(file: Path, message: str) -> list[str]:
    names: list[str] = []
    with contextlib.suppress(Exception):  # Only files of the zip format can be asked.
        names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(file)))
    return names or sorted(set(re.findall(r'GLOBAL ([\w.]+)', message)))


def unreadable(file: Path, error: Exception) -> ValueError:
    """Return the error of a file that is cut off, damaged or no weight file."""
    first_line = (str(error).splitlines() or [''])[0]
    return ValueError(
        f"The weight file '{file}' ({file.stat().st_size} bytes) cannot be read: it is cut off or not a weight file "
        f'({type(error).__name__}: {first_line}). Fetch it again.'
    )
