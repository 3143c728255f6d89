"""From the local store to the Hub. Publishing twice changes nothing; a broken-off publish goes on."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile

from kw_timm.weights.reach import unreachable
from kw_timm.weights.store import WEIGHTS, hub_revision, sha256_of, store_folder

from .card import check_card, model_card
from .errors import HubError
from .known_answer import KNOWN_ANSWER
from .manifest import Entry
from .verify import verify_folder

__all__ = ['HubNotReachedError', 'Plan', 'plan', 'publish']

CARD = 'README.md'


class HubNotReachedError(HubError):
    """The Hub did not answer at all."""


@dataclass
class Plan:
    """What publishing a weight would do.

    Attributes:
        repository: ``'organisation/name'``.
        revision: Tag that is set last.
        create: Whether the repository has to be made.
        files: Contents to upload, by name: paths, or bytes of generated files.
        tag: Whether the tag has to be set.
    """

    repository: str
    revision: str
    create: bool = False
    files: dict[str, Path | bytes] = field(default_factory=dict)
    tag: bool = False

    def lines(self) -> list[str]:
        """Return what is to be done, a line each."""
        lines = [f'create the repository {self.repository}'] if self.create else []
        lines += [f'upload {name} ({_size(content):,} bytes)' for name, content in self.files.items()]
        return lines + ([f'set the tag {self.revision}'] if self.tag else [])


def contents(entry: Entry, repository: str, revision: str) -> dict[str, Path | bytes]:
    """Return what a weight's repository holds; the weights are those of the store, checked."""
    folder = store_folder(entry.name)
    if not folder.is_dir():
        raise HubError(f"{entry.name} is not in the local store. Run 'kw-hub fetch {entry.name}' first.")
    verify_folder(folder)
    names = (entry.file,) if entry.kind == 'detector' else (WEIGHTS, 'config.json', KNOWN_ANSWER)
    return {CARD: model_card(entry, repository, revision).encode(), **{name: folder / name for name in names}}


def plan(
    entry: Entry, organisation: str, revision: str | None = None, api: HfApi | None = None, compare: bool = True
) -> Plan:
    """Compare a weight in the store with its repository on the Hub.

    Args:
        entry: Weight, which the store has.
        organisation: Organisation or user on the Hub.
        revision: Tag to publish as; None for the one that ``pretrained=True`` uses.
        api: Client.
        compare: Ask the Hub what it has; otherwise as if it had nothing.

    Raises:
        HubError: If the revision is published already with other weights, or the Hub cannot be asked.
    """
    api = api or HfApi()
    revision = revision or hub_revision()
    result = Plan(f'{organisation}/{entry.repository}', revision)
    wanted = contents(entry, result.repository, revision)
    if not compare:
        return Plan(result.repository, revision, True, wanted, True)
    reason = None if constants.is_offline_mode() else unreachable(api.endpoint)
    if reason is not None:
        raise HubNotReachedError(f'{api.endpoint} does not answer ({reason}). Check network and proxy.')
    try:
        tags = {tag.name for tag in api.list_repo_refs(result.repository).tags}
        published = _tree(api, result.repository, 'main')
        pinned = _tree(api, result.repository, revision) if revision in tags else None
    except RepositoryNotFoundError:
        result.create = result.tag = True
        result.files = wanted
        return result
    except Exception as error:
        raise _explained(error, result.repository) from error
    if pinned is not None:
        changed = [name for name, content in wanted.items() if name != CARD and not _same(content, pinned.get(name))]
        if changed:
            raise HubError(
                f'{result.repository} is published as {revision} with another {", ".join(changed)}. A published '
                f'revision does not change: give a new one with --revision.'
            )
    result.files = {name: content for name, content in wanted.items() if not _same(content, published.get(name))}
    result.tag = pinned is None
    return result


def publish(entry: Entry, organisation: str, revision: str | None = None, api: HfApi | None = None) -> Plan:
    """Bring a weight's repository to what the store and the manifest say; return what was done.

    Files that are there are not sent again; the tag comes last, so that nobody loads a repository that is not complete.

    Args:
        entry: Weight, which the store has.
        organisation: Organisation or user on the Hub.
        revision: Tag to publish as; None for the one that ``pretrained=True`` uses.
        api: Client.

    Raises:
        HubError: If the Hub refuses; the message says what to do. Run it again to go on.
    """
    api = api or HfApi()
    todo = plan(entry, organisation, revision, api)
    try:
        if CARD in todo.files:
            card = todo.files[CARD]
            assert isinstance(card, bytes)
            check_card(card.decode(), entry)
        if todo.create:
            api.create_repo(todo.repository, exist_ok=True)
        if todo.files:
            operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=c) for name, c in todo.files.items()]
            api.create_commit(todo.repository, operations, commit_message=f'Publish {entry.name}')
        if todo.tag:
            api.create_tag(todo.repository, tag=todo.revision)
    except HubError:
        raise
    except Exception as error:
        raise _explained(error, todo.repository) from error
    return todo


def _tree(api: HfApi, repository: str, revision: str) -> dict[str, RepoFile]:
    entries = api.list_repo_tree(repository, revision=revision, recursive=True)
    return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}


def _same(content: Path | bytes, published: RepoFile | None) -> bool:
    """Say whether a file on the Hub is the local one: by sha256 if it is a large file, else by git's hash."""
    if published is None or published.size != _size(content):
        return False
    if published.lfs is not None:
        digest = sha256_of(content) if isinstance(content, Path) else hashlib.sha256(content).hexdigest()
        return digest == published.lfs.sha256
    data = content.read_bytes() if isinstance(content, Path) else content
    return hashlib.sha1(b'blob %d\0' % len(data) + data).hexdigest() == published.blob_id


def _size(content: Path | bytes) -> int:
    return content.stat().st_size if isinstance(content, Path) else len(content)


def _explained(error: Exception, repository: str) -> Exception:
    """Return an error of the client in words of what to do; others as they are."""
    again = 'Run the command again: it goes on where it stopped.'
    cause: Any = error
    while cause is not None and not isinstance(cause, HfHubHTTPError):
        cause = cause.__cause__
    if isinstance(error, OfflineModeIsEnabled):
        return HubNotReachedError('HF_HUB_OFFLINE is set. Unset it to publish.')
    if cause is not None:
        status = cause.response.status_code
        if status in (401, 403):
            return HubError(
                f'The Hub refused {repository} ({status}): log in with a token that may write there (hf auth login, or '
                f'HF_TOKEN), or choose another organisation with --to.'
            )
        return HubError(f'The Hub answered {status} for {repository}: {str(cause).splitlines()[0]} {again}')
    transport: tuple[type[Exception], ...] = (OSError, ConnectionError, *HfHubHTTPError.__mro__[1:2])
    if isinstance(error, (*transport, RuntimeError)):
        return HubNotReachedError(f'{repository} at {constants.ENDPOINT}: {str(error).splitlines()[0]} {again}')
    return error
