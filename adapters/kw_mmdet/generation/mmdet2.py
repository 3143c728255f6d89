"""MMDetection 2.28 with mmcv 1.7."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from mmcv import Config, DictAction
from mmcv.runner import HOOKS, BaseModule, DefaultOptimizerConstructor, Hook
from mmcv.runner.optimizer import OPTIMIZER_BUILDERS as OPTIM_CONSTRUCTORS
from mmdet.apis.inference import inference_detector, init_detector
from mmdet.models import build_detector
from mmdet.models.builder import BACKBONES
from mmdet.utils import get_device

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


def steps_per_epoch(runner: Any) -> int:
    """Return how many steps a training epoch has."""
    return len(runner.data_loader)


def translate_options(arguments: Sequence[str]) -> list[str]:
    """Return MMDetection's own arguments for those of our commands; here they are the same."""
    return list(arguments)


def build(config: Config) -> Any:
    """Return a config's detector with random weights."""
    return build_detector(config.model, train_cfg=config.get('train_cfg'), test_cfg=config.get('test_cfg'))


def untrained_detector(config: Config, device: str) -> Any:
    """Return a config's detector, ready for :func:`detect` but for its weights."""
    return init_detector(config, device=device)


def detect(model: Any, image: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
    """Return boxes ``(N, 4)``, scores, labels and masks (``(N, height, width)`` or None) of an image, BGR."""
    result = inference_detector(model, image)
    boxes, masks = result if isinstance(result, tuple) else (result, None)
    labels = np.concatenate([np.full(len(found), label) for label, found in enumerate(boxes)])
    found = np.concatenate(boxes)
    if masks is not None:
        flat = [np.asarray(mask, dtype=bool) for of_class in masks for mask in of_class]
        masks = np.stack(flat) if flat else np.zeros((0, *image.shape[:2]), dtype=bool)
    return found[:, :4], found[:, 4], labels, masks


def schedule(config: Config) -> dict[str, str]:
    """Return how a config trains, for reading."""
    rates = {key: value for key, value in config.lr_config.items() if value is not None}
    runner = config.runner
    return {
        'length': f'{runner.get("max_epochs")} epochs' if 'max_epochs' in runner else f'{runner.max_iters} iterations',
        'batch': f'{config.data.samples_per_gpu} images per process',
        'optimizer': ', '.join(f'{key}={value}' for key, value in config.optimizer.items()),
        'learning rate': ', '.join(f'{key}={value}' for key, value in rates.items()),
    }
