"""The table of ``kw-hub list``."""

from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from kw_timm.weights.reach import unreachable
from kw_timm.weights.store import RECORD, hub_repository, hub_revision, store_folder

from .manifest import Entry, load_manifest

__all__ = ['listing']


def listing(ask_hub: bool = True) -> str:
    """Return all weights and where they are now, as text.

    Args:
        ask_hub: Ask the Hub what it has, with one request.
    """
    published, remark = _published() if ask_hub else (set(), '')
    rows = [('name', 'parameters', 'published', 'available now')]
    for entry in load_manifest():
        metric = next(iter(entry.metrics))
        figure = f'{entry.metrics[metric]:5.2f} {"top-1" if metric == "top1" else "box AP"}'
        rows.append(
            (
                entry.name.removesuffix('.osvai_in1k'),
                f'{entry.parameters:,}',
                figure,
                ', '.join(_places(entry, published)),
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = [f'{r[0]:<{widths[0]}}  {r[1]:>{widths[1]}}  {r[2]:>{widths[2]}}  {r[3]}'.rstrip() for r in rows]
    return '\n'.join([*lines, *([f'\n{remark}'] if remark else [])])


def _places(entry: Entry, published: set[str]) -> list[str]:
    places = []
    if (store_folder(entry.name) / RECORD).is_file():
        places.append('store')
    if isinstance(try_to_load_from_cache(entry.hub_id, entry.file, revision=hub_revision()), str):
        places.append('Hub cache')
    if entry.hub_id in published:
        places.append('Hub')
    return [*places, "authors' host"]


def _published() -> tuple[set[str], str]:
    """Return the repositories that the Hub has, and a remark if it could not be asked."""
    organisation = hub_repository('').rstrip('/')
    transport: tuple[type[Exception], ...] = (OSError, *HfHubHTTPError.__mro__[1:2])
    reason = None if constants.is_offline_mode() else unreachable(constants.ENDPOINT)
    if reason is not None:
        return set(), f'The Hub ({constants.ENDPOINT}) could not be asked: {reason}'
    try:
        return {model.id for model in HfApi().list_models(author=organisation)}, ''
    except OfflineModeIsEnabled:
        return set(), 'HF_HUB_OFFLINE is set: the Hub was not asked.'
    except transport as error:
        what = (str(error).splitlines() or [type(error).__name__])[0]
        return set(), f'The Hub ({constants.ENDPOINT}) could not be asked: {what}'
