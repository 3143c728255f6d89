"""MMDetection 2.28 with mmcv 1.7."""

from typing import Any

from mmcv import Config, DictAction
from mmcv.runner import HOOKS, BaseModule, DefaultOptimizerConstructor, Hook
from mmcv.runner.optimizer import OPTIMIZER_BUILDERS as OPTIM_CONSTRUCTORS
from mmdet.models.builder import BACKBONES

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


def steps_per_epoch(runner: Any) -> int:
    """Return how many steps a training epoch has."""
    return len(runner.data_loader)
