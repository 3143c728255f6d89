"""MMDetection 2.28 with mmcv 1.7."""

from collections.abc import Mapping
from typing import Any

from mmcv import Config, DictAction
from mmcv.runner import HOOKS, BaseModule, DefaultOptimizerConstructor, Hook
from mmcv.runner.optimizer import OPTIMIZER_BUILDERS as OPTIM_CONSTRUCTORS
from mmdet.models.builder import BACKBONES

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
CLASSES_KEY = 'classes'


def dataset_key(split: str) -> str:
    """Return the dotted key of a config under which the data set of ``'train'``, ``'val'`` or ``'test'`` is."""
    return f'data.{split}'


def dataset_classes(dataset: Mapping[str, Any]) -> Any:
    """Return the classes that a data set's config names: a sequence, a file of names, or None."""
    return dataset.get('classes')


def steps_per_epoch(runner: Any) -> int:
    """Return how many steps a training epoch has."""
    return len(runner.data_loader)
