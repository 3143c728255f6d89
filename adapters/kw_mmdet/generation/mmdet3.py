"""MMDetection 3.x with mmcv 2 and mmengine."""

import argparse
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from mmdet.apis.inference import inference_detector, init_detector
from mmengine.config import Config, DictAction
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.device import get_device
from mmengine.hooks import Hook
from mmengine.model import BaseModule
from mmengine.optim import DefaultOptimWrapperConstructor as DefaultOptimizerConstructor

# Of mmengine rather than of mmdet: all scopes look there, MMDetection's and those of what is built on it.
from mmengine.registry import HOOKS, init_default_scope
from mmengine.registry import MODELS as BACKBONES
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS as OPTIM_CONSTRUCTORS

__all__ = [
    'BACKBONES',
    'HOOKS',
    'OPTIM_CONSTRUCTORS',
    'BaseModule',
    'Config',
    'DefaultOptimizerConstructor',
    'DictAction',
    'Hook',
    'build',
    'detect',
    'get_device',
    'schedule',
    'steps_per_epoch',
    'translate_options',
    'untrained_detector',
]

# For configs that inherit by `_base_ = 'kw_mmdet::...'`; mmengine has no public way to add a package.
MODULE2PACKAGE['kw_mmdet'] = 'kw_mmdet'

# Options of MMDetection 2.x's programs that are values of the config in 3.x: switches, and ones with a value.
FLAGS = {'--deterministic': 'randomness.deterministic', '--diff-seed': 'randomness.diff_rank_seed'}
VALUES = {'--seed': 'randomness.seed', '--show-score-thr': 'default_hooks.visualization.score_thr'}


def steps_per_epoch(runner: Any) -> int:
    """Return how many steps a training epoch has."""
    return len(runner.train_dataloader)


def translate_options(arguments: Sequence[str]) -> list[str]:
    """Return MMDetection's own arguments for those of our commands, which are those of MMDetection 2.x too."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument('--eval', nargs='+')
    parser.add_argument('--auto-resume', action='store_true')
    parser.add_argument('--resume-from')
    parser.add_argument('--no-validate', action='store_true')
    for option in FLAGS:
        parser.add_argument(option, action='store_true')
    for option in VALUES:
        parser.add_argument(option)
    known, others = parser.parse_known_args(arguments)
    given = {option: getattr(known, option.removeprefix('--').replace('-', '_')) for option in (*FLAGS, *VALUES)}
    options = [f'{key}=True' for option, key in FLAGS.items() if given[option]]
    options += [f'{key}={given[option]}' for option, key in VALUES.items() if given[option] is not None]
    if known.eval:
        options.append(f'test_evaluator.metric=[{",".join(known.eval)}]')
    if known.no_validate:
        options += [f'val_{part}=None' for part in ('cfg', 'dataloader', 'evaluator')]
    if options:
        others += ['--cfg-options', *options]
    if known.resume_from:
        others += ['--resume', known.resume_from]
    elif known.auto_resume:
        others += ['--resume']
    return others


def build(config: Config) -> Any:
    """Return a config's detector with random weights."""
    init_default_scope(config.get('default_scope') or 'mmdet')
    return BACKBONES.build(config.model)


def untrained_detector(config: Config, device: str) -> Any:
    """Return a config's detector, ready for :func:`detect` but for its weights."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of the class names, which are not its to know
        return init_detector(config, palette='random', device=device)


def detect(model: Any, image: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
    """Return boxes ``(N, 4)``, scores, labels and masks (``(N, height, width)`` or None) of an image, BGR."""
    found = inference_detector(model, image).pred_instances.numpy()
    return found.bboxes, found.scores, found.labels, found.masks if 'masks' in found else None


def schedule(config: Config) -> dict[str, str]:
    """Return how a config trains, for reading."""
    length = config.train_cfg
    wrapper = {key: value for key, value in config.optim_wrapper.items() if key != 'optimizer'}
    return {
        'length': f'{length.max_epochs} epochs' if 'max_epochs' in length else f'{length.max_iters} iterations',
        'batch': f'{config.train_dataloader.batch_size} images per process',
        'optimizer': ', '.join(
            f'{key}={value}' for key, value in {**config.optim_wrapper.optimizer, **wrapper}.items()
        ),
        'learning rate': '; '.join(', '.join(f'{k}={v}' for k, v in part.items()) for part in config.param_scheduler),
    }
