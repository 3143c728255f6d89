"""Run MMDetection's own train and test programs on a config that was checked first."""

import argparse
import os
import runpy
import sys
from pathlib import Path

import mmdet
from mmcv import Config, DictAction

from .checks import check_config

__all__ = ['main', 'program_path']

SPLITS = {'train': ('train', 'val'), 'test': ('test',)}


def program_path(name: str) -> Path:
    """Return the path of MMDetection's ``train.py`` or ``test.py``, which its wheel carries.

    Raises:
        FileNotFoundError: If the installed MMDetection does not carry its programs.
    """
    path = Path(mmdet.__file__).parent / '.mim' / 'tools' / f'{name}.py'
    if not path.is_file():
        raise FileNotFoundError(
            f"MMDetection {mmdet.__version__} has no '{path}'. Install it from its wheel: pip install mmdet==2.28.2"
        )
    return path


def main(name: str) -> None:
    """Check the config on the command line and hand over to MMDetection's program, with the same arguments.

    Args:
        name: ``'train'`` or ``'test'``.
    """
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument('config', nargs='?')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction)
    args, _ = parser.parse_known_args()
    path = program_path(name)
    if args.config is not None and os.environ.get('RANK', '0') == '0':
        try:
            _check(Path(args.config), args.cfg_options or {}, name)
        except (ValueError, OSError, RuntimeError) as error:
            raise SystemExit(f'{Path(sys.argv[0]).name}: error: {error}') from error
    sys.argv[0] = str(path)
    runpy.run_path(str(path), run_name='__main__')


def _check(path: Path, options: dict, name: str) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"There is no config '{path}'. The repository's are under configs/.")
    config = Config.fromfile(str(path))
    config.merge_from_dict(options)
    check_config(config, SPLITS[name])
