"""From the authors' file host into the local store: download (resumable), convert, verify."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from filelock import FileLock, Timeout

from kw_timm.weights.reach import unreachable
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
    entry: Entry,
    force: bool = False,
    keep: bool = False,
    weights: str = 'auto',
    record: bool = False,
    seconds: float | None = None,
    say: Callable[[str], None] = lambda _: None,
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
        seconds: How long to wait for the host to answer at all, 3 by default.
        say: Is told in a line where the weights come from, and for whom this process waits.

    Raises:
        HubError: If the file cannot be had or is not what it should be; the message says what to do.
    """
    downloads = store_folder('downloads')
    with room_for(downloads):
        downloads.mkdir(parents=True, exist_ok=True)
    with _alone(downloads / f'.{entry.name}.lock', entry, say):
        if not force and _is_stored(entry):
            return None
        say(
            f"{entry.name} comes from its authors' host, {urlsplit(_address(entry)).netloc}, and is converted into "
            f"'{store_folder(entry.name)}'"
        )
        file = download(entry, downloads, seconds)
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


@contextmanager
def _alone(lock: Path, entry: Entry, say: Callable[[str], None]) -> Iterator[None]:
    """Let one process of all fetch a weight."""
    locked = FileLock(lock)
    try:
        locked.acquire(timeout=1)
    except Timeout:
        say(f'{entry.name} is being fetched by another process; waiting for it')
        locked.acquire()
    try:
        yield
    finally:
        locked.release()


def _address(entry: Entry) -> str:
    return os.environ.get('KW_HUB_FILE_HOST', HOST).format(id=entry.file_id)


def download(entry: Entry, folder: Path, seconds: float | None = None) -> Path:
    """Download the authors' file with gdown, going on with a download that broke off.

    Args:
        entry: What to download.
        folder: Where to; parts stay there.
        seconds: How long to wait for the host to answer at all, 3 by default.

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
    url = _address(entry)
    by_hand = f'Or download {HOST.format(id=entry.file_id)} in a browser and run: kw-hub convert FILE --store'
    go_on = f"Run 'kw-hub fetch {entry.name}' again: it goes on where it stopped. {by_hand}"
    reason = unreachable('{0.scheme}://{0.netloc}/'.format(urlsplit(url)), seconds)
    if reason is not None:
        raise HubError(f'{urlsplit(url).netloc} does not answer ({reason}). Check network and proxy. {go_on}')
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
