"""Where the configs are: they travel with this package."""

from pathlib import Path

__all__ = ['configs_path']

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
