"""Where the configs are: they travel with this package."""

import difflib
from pathlib import Path

__all__ = ['configs_path', 'find_config']

# The folder in which mmengine looks for `_base_ = 'kw_mmdet::...'`.
FOLDER = Path(__file__).parent / '.mim' / 'configs'


def configs_path(name: str = '') -> str:
    """Return the path of a config, or of the folder of all.

    A config outside a checkout inherits by it: ``_base_ = __import__('kw_mmdet').configs_path('mask_rcnn/....py')``.

    Args:
        name: Path inside the folder, e.g. ``'mask_rcnn/mask_rcnn_kw4x_resnet50_fpn_1x_coco.py'``.

    Raises:
        FileNotFoundError: If there is no such config.
    """
    path = FOLDER / name
    if not path.exists():
        near = ', '.join(sorted(str(p.relative_to(FOLDER)) for p in FOLDER.glob(f'{Path(name).parent}/*.py')))
        raise FileNotFoundError(
            f"kw_mmdet has no config '{name}'. {f'Beside it are: {near}.' if near else f'They are in {FOLDER}.'}"
        )
    return str(path)


def find_config(name: str) -> Path:
    """Return a config: a file, or one of ours by its path inside the folder of all, or by its file name.

    Args:
        name: E.g. ``'my_config.py'``, ``'mask_rcnn/mask_rcnn_kw4x_resnet50_fpn_1x_coco.py'``, or the last part of it,
            with or without ``.py``.

    Raises:
        FileNotFoundError: If there is neither; the message suggests similar names.
    """
    if Path(name).is_file():
        return Path(name)
    ours = {path.relative_to(FOLDER).as_posix(): path for path in sorted(FOLDER.glob('[!_]*/*.py'))}
    wanted = f'{name.removeprefix("configs/").removesuffix(".py")}.py'
    for known, path in ours.items():
        if wanted in (known, path.name):
            return path
    close = difflib.get_close_matches(wanted, ours, n=3, cutoff=0.5)
    hint = f'Similar ones are {", ".join(close)}.' if close else f'Those are in {FOLDER}.'
    raise FileNotFoundError(f"There is no config '{name}': it is no file, and none of kw_mmdet's own. {hint}")
