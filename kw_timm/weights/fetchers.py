"""Ways to weights besides store and Hub, which other packages offer as entry points; nothing here knows any of them.

An entry point of the group ``kw_timm.fetchers`` is a function ``(name, seconds) -> Path | None``: it brings a weight
into the local store and returns its folder there, or None where it has no such weight. ``seconds`` is how long it may
wait for a sign of life. It raises :class:`~kw_timm.weights.errors.WeightsNotFoundError` with a reason.
"""

import os
from importlib.metadata import entry_points
from pathlib import Path

__all__ = ['FORBID', 'GROUP', 'fetch_missing', 'why_not']

GROUP = 'kw_timm.fetchers'
# Set to 0, nothing is fetched but by commands.
FORBID = 'KW_TIMM_FETCH'


def why_not() -> str | None:
    """Return in a sentence why weights are not fetched without being told to, None if they are."""
    from huggingface_hub import constants

    if os.environ.get(FORBID, '').strip().lower() in ('0', 'false', 'no', 'off'):
        return f'{FORBID}={os.environ[FORBID]} forbids to fetch them.'
    if constants.is_offline_mode():
        return 'HF_HUB_OFFLINE forbids to fetch them.'
    if not entry_points(group=GROUP):
        return "With the extra [hub] they are fetched without a command: pip install 'kw-timm[hub]'"
    return None


def fetch_missing(name: str, seconds: float) -> Path | None:
    """Let the installed fetchers bring a weight into the store; return its folder, None where none has such a weight.

    Args:
        name: Weight, e.g. ``'kw4x_resnet50.osvai_in1k'``.
        seconds: How long to wait for a host to answer at all.

    Raises:
        WeightsNotFoundError: If one has it and could not get it; the message says why.
    """
    for point in sorted(entry_points(group=GROUP), key=lambda point: point.name):
        folder: Path | None = point.load()(name, seconds)
        if folder is not None:
            return folder
    return None
