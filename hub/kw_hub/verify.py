"""Check weights: a folder of the store, a file, or what lies in a repository of the Hub."""

import json
from pathlib import Path
from typing import Any

import timm
from safetensors.torch import load_file

import kw_timm.models  # noqa: F401  (registers the KW networks)
from kw_timm.weights.errors import in_one_line
from kw_timm.weights.sound import check_finite
from kw_timm.weights.store import RECORD, WEIGHTS, check_stored, hub_file, hub_revision, sha256_of

from .errors import HubError
from .known_answer import KNOWN_ANSWER, check_answer
from .manifest import Entry, load_manifest
from .source import read_source, recognise

__all__ = ['verify_file', 'verify_folder', 'verify_repository']


def verify_folder(folder: Path) -> list[str]:
    """Check a folder made by ``kw-hub convert`` or ``kw-hub fetch``.

    Args:
        folder: Folder with ``model.safetensors``, ``config.json`` and a known answer, or with a detector's checkpoint.

    Returns:
        What was checked, a line each.

    Raises:
        HubError: If anything is wrong; the message says what.
        DamagedWeightsError: If the weight file is not what was stored.
    """
    done = []
    if (folder / RECORD).exists():
        file = check_stored(folder)
        # What the file was just compared with; hashing it again would read it twice.
        digest = json.loads((folder / RECORD).read_text())['sha256']
        done.append(f'sha256 {digest[:12]}... is the recorded one')
        if file.suffix == '.pth':
            return done + verify_file(file)
    missing = [name for name in (WEIGHTS, 'config.json', KNOWN_ANSWER) if not (folder / name).is_file()]
    if missing:
        raise HubError(f"'{folder}' lacks {', '.join(missing)}. Convert or fetch the weights again.")
    return done + _check_network(folder)


def verify_file(file: Path) -> list[str]:
    """Check a single weight file: recognised, complete, and convertible both ways to the last bit."""
    source = read_source(file)
    name = recognise(source).name
    where = f" (from its entry '{source.entry}')" if source.entry else ''
    done = [f'{len(source.state_dict)} tensors of {name}{where}, complete, converting both ways to the last bit']
    entry = next((entry for entry in load_manifest() if entry.name == name), None)
    known = {entry.source_sha256, entry.sha256} - {None} if entry else set()
    if known:
        if sha256_of(file) not in known:
            raise HubError(f"'{file}' has the shapes of {name}, but is not the published file: its sha256 differs.")
        done.append('sha256 is that of the published file')
    return done


def verify_repository(repository: str, revision: str | None = None) -> list[str]:
    """Download a repository of the Hub through the client's cache, and check it.

    Args:
        repository: ``'organisation/name'``.
        revision: None for the one that ``pretrained=True`` uses.
    """
    revision = revision or hub_revision()
    name = repository.rpartition('/')[2]
    entry = next((entry for entry in load_manifest() if entry.repository == name), None)
    if entry is not None and entry.kind == 'detector':
        return verify_file(hub_file(repository, entry.file, revision))
    files = [hub_file(repository, name, revision) for name in (WEIGHTS, 'config.json', KNOWN_ANSWER)]
    done = [f'{repository} at {revision}: published sha256 sums agree', *_check_network(files[0].parent)]
    if entry is not None:
        _check_digest(files[0], entry)
    return done


def _check_digest(file: Path, entry: Entry) -> None:
    if entry.sha256 is not None and sha256_of(file) != entry.sha256:
        raise HubError(
            f"'{file}' is not what the manifest knows as {entry.name}: its sha256 differs from {entry.sha256}."
        )


def _check_network(folder: Path) -> list[str]:
    try:
        config: dict[str, Any] = dict(json.loads((folder / 'config.json').read_text()))
        check_finite(load_file(folder / WEIGHTS))
    except Exception as error:
        raise HubError(
            f"'{folder}' cannot be read ({in_one_line(error)}). Convert or fetch the weights again."
        ) from error
    try:
        # As a user loads it: strictly, through timm.
        model = timm.create_model(f'local-dir:{folder}', pretrained=True)
    except Exception as error:
        raise HubError(
            f"'{folder}' does not load, its weights do not fit its config.json: {in_one_line(error)} Convert or fetch "
            f'the weights again.'
        ) from error
    parameters = sum(parameter.numel() for parameter in model.parameters())
    done = [f'{config["architecture"]} loads strictly: {parameters:,} parameters']
    entry = next((e for e in load_manifest() if e.kind != 'detector' and e.network == config['architecture']), None)
    if entry is not None and config.get('num_classes') == 1000 and parameters != entry.parameters:
        raise HubError(f'{entry.name} has {entry.parameters:,} parameters, these weights have {parameters:,}.')
    difference = check_answer(model, folder)
    return [*done, f'known answer agrees: largest relative difference {difference:.1e}']
