"""From the authors' file host into the local store: download (resumable), convert, verify."""

import os
from pathlib import Path

from filelock import FileLock

from kw_timm.weights.store import DamagedWeightsError, check_stored, sha256_of, store_folder

from .convert import Converted, convert_file
from .errors import HubError
from .files import room_for
from .manifest import Entry, record_digests

__all__ = ['download', 'fetch']

HOST = 'https://drive.google.com/uc?id={id}'
RETRIES = 3
TIMEOUT = (20.0, 60.0)


def fetch(
    entry: Entry, force: bool = False, keep: bool = False, weights: str = 'auto', record: bool = False
) -> Converted | None:
    """Get a weight from the authors' host into the store; None if it is there already.

    What was in the store stays until the new weights are converted and checked. A download that breaks off goes on
    where it stopped.

    Args:
        entry: What to get.
        force: Fetch again what is there.
        keep: Keep the authors' file too.
        weights: ``'ema'``, ``'model'`` or ``'auto'``, see :func:`~kw_hub.source.read_source`.
        record: Write the sha256 sums into the manifest, as a maintainer does once.

    Raises:
        HubError: If the file cannot be had or is not what it should be; the message says what to do.
    """
    downloads = store_folder('downloads')
    with room_for(downloads):
        downloads.mkdir(parents=True, exist_ok=True)
    with FileLock(downloads / f'.{entry.name}.lock'):
        if not force and _is_stored(entry):
            return None
        file = download(entry, downloads)
        try:
            converted = convert_file(
                file, store=True, weights=weights, overwrite=True, expected=entry.name, file_id=entry.file_id
            )
        except ValueError as error:
            # Not resumable: what arrived is whole and wrong.
            file.unlink(missing_ok=True)
            raise HubError(f'{error}\nThe download was deleted.') from error
    if record:
        record_digests(entry.name, **{key: converted.record[key] for key in ('source_sha256', 'sha256')})
    if not keep:
        file.unlink(missing_ok=True)
    return converted


def download(entry: Entry, folder: Path) -> Path:
    """Download the authors' file with gdown, going on with a download that broke off.

    Args:
        entry: What to download.
        folder: Where to; parts stay there.

    Returns:
        The file, which is one (no web page) and, where the manifest knows it, has the right sha256.
    """
    try:
        import gdown
        from gdown.exceptions import DownloadError, FileURLRetrievalError
        from requests.exceptions import RequestException
    except ImportError as error:
        raise HubError(f"kw-hub fetch needs gdown ({error}): pip install 'kw-timm[hub]'") from error
    file = folder / f'{entry.name}.pth'
    url = os.environ.get('KW_HUB_FILE_HOST', HOST).format(id=entry.file_id)
    by_hand = f'Or download {HOST.format(id=entry.file_id)} in a browser and run: kw-hub convert FILE --store'
    go_on = f"Run 'kw-hub fetch {entry.name}' again: it goes on where it stopped. {by_hand}"
    try:
        with room_for(file):
            gdown.download(
                url,
                str(file),
                resume=True,
                retries=RETRIES,
                timeout=TIMEOUT,
                cookies_file=str(folder / 'cookies.txt'),
            )
    except FileURLRetrievalError as error:
        raise HubError(
            f'The host did not give out {entry.name}; it answered with a web page, as it does when too many people '
            f'downloaded the file lately. Try again tomorrow. {by_hand}'
        ) from error
    except (DownloadError, RequestException) as error:
        raise HubError(f'{entry.name} was not downloaded from {url}: {error} {go_on}') from error
    _check_download(file, entry, by_hand)
    return file


def _check_download(file: Path, entry: Entry, by_hand: str) -> None:
    """Delete what is not the file, so that it is not resumed, and say so."""
    with file.open('rb') as opened:
        start = opened.read(512).lstrip()
    problem = ''
    if start[:1] == b'<':
        problem = 'the host answered with a web page (often a download quota). Try again tomorrow.'
    elif not start:
        problem = 'the host sent an empty file. Try again later.'
    elif entry.source_sha256 is not None and sha256_of(file) != entry.source_sha256:
        problem = f'its sha256 is not {entry.source_sha256}, as the manifest knows it. Try again.'
    if problem:
        file.unlink()
        raise HubError(f'{entry.name} was not downloaded: {problem} {by_hand}')


def _is_stored(entry: Entry) -> bool:
    try:
        return check_stored(store_folder(entry.name)).exists()
    except DamagedWeightsError:
        return False
