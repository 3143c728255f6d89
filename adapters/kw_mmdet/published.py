"""Checkpoints of the published detectors, by name instead of by file."""

from pathlib import Path

from kw_timm.weights.store import DamagedWeightsError, WeightsNotFoundError, find_weights

from .configs import find_config

__all__ = ['PUBLISHED', 'find_checkpoint', 'published_name']

# In place of a checkpoint: the published one of the config.
PUBLISHED = 'published'


def published_name(checkpoint: str | Path, config: str | Path) -> str | None:
    """Return which published detector a checkpoint stands for, None where it is a file.

    Args:
        checkpoint: A file, ``'published'`` or the name of a published detector.
        config: Config that it is for; ``'published'`` is the detector of its name.

    Raises:
        FileNotFoundError: If it is none of them.
    """
    if Path(checkpoint).is_file():
        return None
    if str(checkpoint) == PUBLISHED:
        return Path(config).stem
    if _is_ours(str(checkpoint)):
        return str(checkpoint)
    raise FileNotFoundError(
        f"There is no checkpoint '{checkpoint}'. Give a file, or '{PUBLISHED}' for the published one of the config."
    )


def find_checkpoint(checkpoint: str | Path, config: str | Path) -> Path:
    """Return the file of a checkpoint, arguments as above.

    Published ones are looked for as ``pretrained=True`` looks for weights: local store, Hub, then the authors' host.

    Raises:
        FileNotFoundError: If there is no such file, or it cannot be had; the message says what to do.
        ValueError: If the stored file is damaged.
    """
    name = published_name(checkpoint, config)
    if name is None:
        return Path(checkpoint)
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
