"""Where ``pretrained=True`` finds weights: local store, Hub, then what fetches. Every file is checked before use.

The store is a folder, ``$KW_TIMM_HOME`` or ``kw_timm`` in the user's cache folder, with one subfolder per weight. Each
is also what timm loads as ``local-dir:PATH``. ``kw-hub`` fills it; reading it needs nothing but this file.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from timm.models import resolve_pretrained_cfg

from .errors import DamagedWeightsError, WeightsNotFoundError
from .fetchers import fetch_missing, why_not
from .reach import SECONDS, unreachable
from .static import STATIC_NETWORKS

__all__ = [
    'DamagedWeightsError',
    'WeightsNotFoundError',
    'check_stored',
    'find_weights',
    'hub_file',
    'hub_repository',
    'hub_revision',
    'pretrained_source',
    'reachable',
    'sha256_of',
    'store_folder',
]

HUB_ORGANISATION = 'kw-timm'
# The tag that publishing sets last: a repository without it is not complete.
HUB_REVISION = 'v1'
TAG = 'osvai_in1k'
WEIGHTS = 'model.safetensors'
RECORD = 'weights.json'

# Without network, Hub and fetcher together have given up by then.
PATIENCE = 4.2

RETRIES = 3
_RETRY_STATUS = (429, 500, 502, 503, 504)
_CHUNK = 1 << 20


def store_folder(name: str = '') -> Path:
    """Return the local store, or the folder in it of a weight, e.g. ``'kw4x_resnet50.osvai_in1k'``."""
    home = os.environ.get('KW_TIMM_HOME')
    if not home:
        home = str(Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'kw_timm')
    return Path(home).expanduser() / name


def hub_repository(name: str) -> str:
    """Return the Hub repository of a weight; ``$KW_TIMM_HUB_ORG`` names another organisation."""
    return f'{os.environ.get("KW_TIMM_HUB_ORG") or HUB_ORGANISATION}/{name}'


def hub_revision() -> str:
    """Return the revision that is loaded; ``$KW_TIMM_HUB_REVISION`` names another tag, branch or commit."""
    return os.environ.get('KW_TIMM_HUB_REVISION') or HUB_REVISION


def pretrained_source(
    variant: str,
    pretrained_cfg: Any = None,
    overlay: Mapping[str, Any] | None = None,
    cache_dir: str | Path | None = None,
) -> dict[str, Any]:
    """Say where timm shall load a variant's pretrained weights from, as entries of its pretrained cfg.

    Args:
        variant: Registered name.
        pretrained_cfg: As for ``timm.create_model``; a cfg, a tag, or None.
        overlay: The user's changes to that cfg; a source that is named there is left alone.
        cache_dir: Folder instead of the Hub's usual cache.

    Returns:
        ``{'file': PATH}`` of a checked file, or nothing if the cfg names a file, a folder, a URL or a state dict.

    Raises:
        WeightsNotFoundError: If there are none.
        DamagedWeightsError: If they are damaged.
    """
    cfg = resolve_pretrained_cfg(variant, pretrained_cfg, dict(overlay or {}))
    if cfg.source == 'local-dir' or (cfg.source != 'hf-hub' and (cfg.state_dict or cfg.file or cfg.url)):
        return {}
    name = f'{variant}.{cfg.tag or TAG}'
    if cfg.source != 'hf-hub' and cfg.hf_hub_id in (None, f'{HUB_ORGANISATION}/{name}'):
        return {'file': str(find_weights(name, cache_dir))}
    repository, _, revision = cfg.hf_hub_id.partition('@')
    try:
        file = hub_file(repository, cfg.hf_hub_filename or WEIGHTS, revision or None, cache_dir)
    except WeightsNotFoundError as error:
        if isinstance(error.__cause__, EntryNotFoundError) and not isinstance(error.__cause__, LocalEntryNotFoundError):
            return {}  # No safetensors there: timm knows the other formats.
        raise
    return {'source': '', 'file': str(file)}


def find_weights(name: str, cache_dir: str | Path | None = None, filename: str = WEIGHTS) -> Path:
    """Return a checked weight file: from the store, else from the Hub (or its cache), else from what fetches.

    Args:
        name: Weight, e.g. ``'kw4x_resnet50.osvai_in1k'``; also the repository's name on the Hub.
        cache_dir: Folder instead of the Hub's usual cache.
        filename: Name of the file in the repository.

    Raises:
        WeightsNotFoundError: If there are none; the message names the commands that get them.
        DamagedWeightsError: If they are in the store or cache, but damaged.
    """
    folder = store_folder(name)
    if folder.is_dir():
        return check_stored(folder)
    repository, began = hub_repository(name), time.monotonic()
    try:
        return hub_file(repository, filename, hub_revision(), cache_dir)
    except WeightsNotFoundError as error:
        asked = error
    reason = why_not()
    if reason is None:
        try:
            fetched = fetch_missing(name, min(SECONDS, max(1.0, PATIENCE - (time.monotonic() - began))))
        except WeightsNotFoundError as error:
            reason = f'Nor were they fetched: {error}'
        else:
            if fetched is not None:
                return check_stored(fetched)
            reason = 'Nothing installed fetches them.'
    variant = name.removesuffix(f'.{TAG}')
    raise WeightsNotFoundError(
        f"No pretrained weights of {variant}. They are not in the local store '{folder}', and the Hub did not give "
        f'them: {asked}\n{reason}\nOne of these helps:\n'
        f"  kw-hub fetch {variant}\n      downloads and converts the authors' file\n"
        f"  kw-hub convert FILE --store\n      takes the authors' file, downloaded by other means\n"
        f'  hf download {repository} --revision {hub_revision()}\n'
        f'      fills the cache, where the Hub can be reached\n'
        f'Or go on without them: random weights are pretrained=False, init_cfg=None in a config.'
    ) from asked


def check_stored(folder: Path) -> Path:
    """Return the weight file of a folder in the store, after comparing it with what was recorded when it was stored.

    Raises:
        DamagedWeightsError: If the file or its record is missing or damaged.
    """
    advice = f"Delete the folder and run 'kw-hub fetch {folder.name}' (or 'kw-hub convert FILE --store') again."
    try:
        record = json.loads((folder / RECORD).read_text())
        file = folder / record['file']
        size, digest = int(record['size']), str(record['sha256'])
    except (OSError, ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
        raise DamagedWeightsError(
            f"The stored weights in '{folder}' have no readable {RECORD} ({error}). {advice}"
        ) from error
    if not file.is_file() or file.stat().st_size != size:
        found = f'{file.stat().st_size} bytes' if file.is_file() else 'missing'
        raise DamagedWeightsError(f"The stored weights '{file}' are damaged: {found}, expected {size} bytes. {advice}")
    if sha256_of(file) != digest:
        raise DamagedWeightsError(f"The stored weights '{file}' are damaged: their sha256 is not {digest}. {advice}")
    return file


def sha256_of(file: Path, progress: Callable[[int], Any] | None = None) -> str:
    """Return the sha256 of a file in hexadecimal; ``progress`` is told every number of bytes read."""
    digest = hashlib.sha256()
    with file.open('rb') as opened:
        for chunk in iter(partial(opened.read, _CHUNK), b''):
            digest.update(chunk)
            if progress is not None:
                progress(len(chunk))
    return digest.hexdigest()


def hub_file(repository: str, filename: str, revision: str | None, cache_dir: str | Path | None = None) -> Path:
    """Download a file from the Hub through its client and cache, and compare large files with their published sha256.

    What the client does not retry (the Hub busy, 429 and 5xx) is tried again, a few times. Where the Hub does not
    answer at all, which the client would try for minutes, the cache is asked alone.

    Args:
        repository: ``'organisation/name'``.
        filename: File in the repository.
        revision: Tag, branch or commit.
        cache_dir: Folder instead of the Hub's usual cache.

    Raises:
        WeightsNotFoundError: If it cannot be had; the message says why and what to do.
        DamagedWeightsError: If what arrived is not what was published. It is removed from the cache.
    """
    from huggingface_hub import constants, errors, hf_hub_download, try_to_load_from_cache

    # The client's own transport errors, whichever HTTP library it is built on.
    http_error: type[Exception] = getattr(errors, 'HTTPError', OSError)
    cache_alone = constants.is_offline_mode() or unreachable(constants.ENDPOINT) is not None

    for attempt in range(RETRIES + 1):
        try:
            if cache_alone:
                # Without the client, which asks the Hub once for other things even then.
                cached = try_to_load_from_cache(repository, filename, cache_dir, revision)
                if not isinstance(cached, str):
                    raise errors.LocalEntryNotFoundError(f'{filename} is not in the cache')
                path = Path(cached)
                break
            path = Path(
                hf_hub_download(
                    repository,
                    filename,
                    revision=revision,
                    cache_dir=cache_dir,
                    library_name='kw_timm',
                )
            )
            break
        except Exception as error:
            status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
            if attempt < RETRIES and status in _RETRY_STATUS:
                time.sleep(2**attempt)
                continue
            if isinstance(error, OSError | ValueError | http_error):
                raise WeightsNotFoundError(_reason(error, repository, filename, revision)) from error
            raise
    blob = path.resolve()
    # The cache names a large file's blob by its sha256; the client itself compares sizes alone.
    if len(blob.name) == 64 and sha256_of(blob) != blob.name:
        blob.unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        raise DamagedWeightsError(
            f"The file '{filename}' of '{repository}' arrived damaged: its sha256 is not the published {blob.name}. It "
            f'was removed from the cache; try again. If it stays so, a proxy or mirror ($HF_ENDPOINT) changes files.'
        )
    return path


def _reason(error: Exception, repository: str, filename: str, revision: str | None) -> str:
    """Say in words why a download failed, and what to do."""
    from huggingface_hub import constants, errors

    where = f"'{repository}' at {constants.ENDPOINT}"
    cause = error.__cause__ if isinstance(error.__cause__, errors.HfHubHTTPError) else error
    status = cause.response.status_code if isinstance(cause, errors.HfHubHTTPError) else None
    if constants.is_offline_mode():
        return (
            f'HF_HUB_OFFLINE is set and {where} is not in the cache. Unset it, or copy the cache from another machine.'
        )
    if isinstance(cause, errors.GatedRepoError):
        return f'{where} is gated: accept its conditions on its page, then log in with: hf auth login'
    if status == 401:
        return f'{where} does not exist or is private (401). Log in with: hf auth login, or set HF_TOKEN.'
    if isinstance(cause, errors.RepositoryNotFoundError):
        return f'{where} does not exist (404). $KW_TIMM_HUB_ORG names another organisation.'
    if isinstance(cause, errors.RevisionNotFoundError):
        return (
            f"{where} has no revision '{revision}': it is not published completely. $KW_TIMM_HUB_REVISION is another."
        )
    if isinstance(cause, errors.EntryNotFoundError) and status == 404:
        return f"{where} has no file '{filename}'."
    if status == 429:
        return f'{where}: too many requests (429). Wait some minutes, or log in with: hf auth login'
    if status is not None and status >= 500:
        return f'{where}: the Hub is busy or down ({status}), {RETRIES} retries included. Try again later.'
    if status is not None:
        return f'{where}: {cause}'
    if isinstance(error.__cause__, errors.FileMetadataError):
        return f'{where} does not answer as a Hub does. Check $HF_ENDPOINT, proxy and firewall.'
    if isinstance(error, errors.LocalEntryNotFoundError):
        return f'{where} cannot be reached. Check the network; $HF_ENDPOINT names a mirror.'
    if isinstance(error, OSError) and error.errno is not None:
        return (
            f"'{filename}' of {where} could not be written: {os.strerror(error.errno)}. Make room in "
            f"'{constants.HF_HUB_CACHE}', or set HF_HUB_CACHE to a folder on another disk."
        )
    return f"'{filename}' of {where} did not arrive whole: {str(error).splitlines()[0]} Try again."


def reachable(name: str, overlay: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Say where to load from, after asking whether the host answers.

    Args:
        name: timm network, with a tag or not; the method's authors' static networks have the tag ``osvai_in1k``.
        overlay: Changes to timm's cfg of it.

    Returns:
        Name for ``timm.create_model``, and the overlay to use.

    Raises:
        WeightsNotFoundError: If it does not answer, and nothing is in the cache.
    """
    variant, _, tag = name.partition('.')
    if tag == TAG and variant in STATIC_NETWORKS and not overlay:
        return variant, {'file': str(find_weights(name))}
    if ':' in name or 'state_dict' in overlay or (variant.startswith('kw') and not overlay):
        return name, overlay  # A file, or a network that asks by itself.
    cfg = resolve_pretrained_cfg(variant, tag or None, overlay)
    if not overlay and cfg.hf_hub_id:
        return name, pretrained_source(variant, tag or None, {'url': ''})
    copy = Path(torch.hub.get_dir(), 'checkpoints', Path(urlsplit(cfg.url or '').path).name)
    reason = unreachable(cfg.url) if cfg.url and not copy.is_file() else None
    if reason is not None:
        raise WeightsNotFoundError(f"'{cfg.url}' does not answer ({reason}). Check address, network and proxy.")
    return name, overlay
