"""What ``pretrained=True`` fetches by where store and Hub have nothing; see :mod:`kw_timm.weights.fetchers`."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from kw_timm.weights.fetchers import FORBID
from kw_timm.weights.store import WeightsNotFoundError, store_folder

from .errors import HubError
from .fetch import fetch
from .manifest import Entry, load_manifest
from .verify import verify_folder

__all__ = ['bring']


def bring(name: str, seconds: float) -> Path | None:
    """Fetch a weight from its authors' host into the store, as ``kw-hub fetch`` does; return its folder.

    Args:
        name: Weight, e.g. ``'kw4x_resnet50.osvai_in1k'``.
        seconds: How long to wait for the host to answer at all.

    Returns:
        None where there is no such weight.

    Raises:
        WeightsNotFoundError: If it cannot be had or is not what it should be; the message says why and what to do.
    """
    entry = next((entry for entry in load_manifest() if entry.name == name), None)
    if entry is None:
        return None
    try:
        with _plain_torch():
            _fetch(entry, seconds)
    except (HubError, ValueError, OSError) as error:
        raise WeightsNotFoundError(str(error)) from error
    return store_folder(name)


def _fetch(entry: Entry, seconds: float) -> None:
    said = f'({FORBID}=0 forbids it)'
    converted = fetch(entry, seconds=seconds, say=lambda line: print(f'kw_timm: {line} {said}', file=sys.stderr))
    if converted is not None:
        checks = verify_folder(converted.folder)
        print(f'kw_timm: {entry.name} is stored; ok: {"; ".join(checks)}', file=sys.stderr)


@contextmanager
def _plain_torch() -> Iterator[None]:
    """Convert as in a process of its own, whatever a caller set: devices, dtypes, what random numbers come next."""
    dtype = torch.get_default_dtype()
    with torch.device('cpu'), torch.random.fork_rng(devices=[]):
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)
