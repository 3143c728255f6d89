"""Checkpoints of the published detectors, by name instead of by file."""

from pathlib import Path

from kw_timm.weights.store import DamagedWeightsError, WeightsNotFoundError, find_weights

from .configs import find_config

__all__ = ['PUBLISHED', 'find_checkpoint']

# In place of a checkpoint: the published one of the config.
PUBLISHED = 'published'


def find_checkpoint(checkpoint: str | Path, config: str | Path) -> Path:
    """Return the file of a checkpoint: a file, ``'published'`` or the name of a published detector.

    Published ones are looked for as ``pretrained=True`` looks for weights: local store, Hub, then the authors' host.

    Args:
        checkpoint: What was given.
        config: Config that it is for; ``'published'`` is the detector of its name.

    Raises:
        FileNotFoundError: If there is no such file, or it cannot be had; the message says what to do.
        ValueError: If the stored file is damaged.
    """
    if Path(checkpoint).is_file():
        return Path(checkpoint)
    name = Path(config).stem if str(checkpoint) == PUBLISHED else str(checkpoint)
    if str(checkpoint) != PUBLISHED and not _is_ours(name):
        raise FileNotFoundError(
            f"There is no checkpoint '{checkpoint}'. Give a file, or '{PUBLISHED}' for the published one of the config."
        )
    try:
        return find_weights(name, filename=f'{name}.pth')
    except WeightsNotFoundError as error:
        raise FileNotFoundError(str(error)) from error
    except DamagedWeightsError as error:
        raise ValueError(str(error)) from error


def _is_ours(name: str) -> bool:
    """Say whether one of this package's configs has exactly this name."""
    try:
        return find_config(name).stem == name and not Path(name).suffix
    except FileNotFoundError:
        return False
