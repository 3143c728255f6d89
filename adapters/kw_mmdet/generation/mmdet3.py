"""MMDetection 3.x with mmcv 2 and mmengine."""

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
    'HOOKS',
    'OPTIM_CONSTRUCTORS',
    'BaseModule',
    'Config',
    'DefaultOptimizerConstructor',
    'DictAction',
    'Hook',
    'steps_per_epoch',
]

# For configs that inherit by `_base_ = 'kw_mmdet::...'`; mmengine has no public way to add a package.
MODULE2PACKAGE['kw_mmdet'] = 'kw_mmdet'


def steps_per_epoch(runner: Any) -> int:
    """Return how many steps a training epoch has."""
    return len(runner.train_dataloader)
