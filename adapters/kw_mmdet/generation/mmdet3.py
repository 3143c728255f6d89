"""MMDetection 3.x with mmcv 2 and mmengine."""

from collections.abc import Mapping
from typing import Any

from mmengine.config import Config, DictAction
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.hooks import Hook
from mmengine.model import BaseModule
from mmengine.optim import DefaultOptimWrapperConstructor as DefaultOptimizerConstructor

# Of mmengine rather than of mmdet: all scopes look there, MMDetection's and those of what is built on it.
from mmengine.registry import HOOKS
from mmengine.registry import MODELS as BACKBONES
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS as OPTIM_CONSTRUCTORS

__all__ = [
    'BACKBONES',
    'CLASSES_KEY',
    'HOOKS',
    'OPTIM_CONSTRUCTORS',
    'BaseModule',
    'Config',
    'DefaultOptimizerConstructor',
    'DictAction',
    'Hook',
    'dataset_classes',
    'dataset_key',
    'steps_per_epoch',
]

# Where a data set's config names its classes.
CLASSES_KEY = 'metainfo.classes'

# For configs that inherit by `_base_ = 'kw_mmdet::...'`; mmengine has no public way to add a package.
MODULE2PACKAGE['kw_mmdet'] = 'kw_mmdet'


def dataset_key(split: str) -> str:
    """Return the dotted key of a config under which the data set of ``'train'``, ``'val'`` or ``'test'`` is."""
    return f'{split}_dataloader.dataset'


def dataset_classes(dataset: Mapping[str, Any]) -> Any:
    """Return the classes that a data set's config names: a sequence, or None."""
    return (dataset.get('metainfo') or {}).get('classes')


def steps_per_epoch(runner: Any) -> int:
    """Return how many steps a training epoch has."""
    return len(runner.train_dataloader)
