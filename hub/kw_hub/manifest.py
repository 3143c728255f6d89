"""The manifest: every weight that there is, where its original lies, what was published about it."""

import difflib
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from kw_timm.weights.store import hub_repository

from .errors import HubError
from .files import new_file

__all__ = ['MANIFEST', 'Entry', 'find_entry', 'load_manifest', 'record_digests']

MANIFEST = Path(__file__).with_name('manifest.json')


@dataclass(frozen=True)
class Entry:
    """One weight.

    Attributes:
        name: Name in the store, e.g. ``'kw4x_resnet50.osvai_in1k'``; a detector's is that of its config.
        kind: ``'kw'``, ``'static'`` or ``'detector'``.
        network: timm name of the network, or of the detector's backbone.
        repository: Name of the Hub repository, without organisation.
        tag: What it was trained by and on.
        licence: SPDX name.
        parameters: Exact number of parameters.
        metrics: As published: ``top1`` and ``top5``, or ``box_ap`` and ``mask_ap``, in percent.
        file_id: The authors' file on their host.
        source_sha256: sha256 of the authors' file, once somebody has fetched it.
        sha256: sha256 of the converted weight file, likewise.
        baseline: Network without KernelWarehouse that it is compared with.
        config: A detector's config.
        note: Remark for the tables.
    """

    name: str
    kind: str
    network: str
    repository: str
    tag: str
    licence: str
    parameters: int
    metrics: dict[str, float]
    file_id: str
    source_sha256: str | None = None
    sha256: str | None = None
    baseline: str | None = None
    config: str | None = None
    note: str | None = None

    @property
    def hub_id(self) -> str:
        """Return the repository with its organisation."""
        return hub_repository(self.repository)

    @property
    def file(self) -> str:
        """Return the name of the weight file in a folder of the store."""
        return f'{self.name}.pth' if self.kind == 'detector' else 'model.safetensors'


@lru_cache(maxsize=1)
def load_manifest() -> tuple[Entry, ...]:
    """Return all weights, in the order of the published tables."""
    return tuple(Entry(**entry) for entry in json.loads(MANIFEST.read_text())['weights'])


def find_entry(name: str) -> Entry:
    """Return a weight by its name; a classification network's tag may be left out.

    Raises:
        HubError: If there is none; the message suggests names.
    """
    for entry in load_manifest():
        if name in (entry.name, entry.network if entry.kind != 'detector' else entry.name):
            return entry
    names = [entry.name.removesuffix('.osvai_in1k') for entry in load_manifest()]
    close = difflib.get_close_matches(name, names, n=3)
    hint = f'Did you mean {", ".join(close)}?' if close else "'kw-hub list' shows all names."
    raise HubError(f"There are no weights called '{name}'. {hint}")


def record_digests(name: str, **digests: str) -> None:
    """Write sha256 sums into the manifest, in a maintainer's checkout."""
    content: dict[str, Any] = json.loads(MANIFEST.read_text())
    for entry in content['weights']:
        if entry['name'] == name:
            entry.update(digests)
    with new_file(MANIFEST, overwrite=True) as file:
        file.write_text(json.dumps(content, indent=2) + '\n')
    load_manifest.cache_clear()
