"""Check a config before hours are spent on it: neck against backbone, classes against heads and annotations."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from .features import PyramidFeatures
from .generation import CLASSES_KEY, dataset_classes, dataset_key

__all__ = ['check_config', 'check_data', 'check_neck']


def check_config(config: Mapping[str, Any], splits: tuple[str, ...] = ('train', 'val', 'test')) -> None:
    """Raise an error that says what to change where parts of an MMDetection config contradict each other.

    Args:
        config: Loaded config.
        splits: Data sets that will be used.

    Raises:
        ValueError: If neck and backbone, or classes and heads or annotations, disagree.
        FileNotFoundError: If an annotation file does not exist.
    """
    check_neck(config['model'])
    for split in splits:
        section, _, name = dataset_key(split).partition('.')
        for dataset in _datasets((config.get(section) or {}).get(name)):
            check_data(dataset, split, set(_num_classes(config['model'])))


def check_neck(model: Mapping[str, Any]) -> None:
    """Raise ValueError if a detector config's neck does not take what its KW backbone returns.

    Args:
        model: ``config.model``; other backbones than KWBackbone pass.
    """
    backbone, neck = model.get('backbone') or {}, model.get('neck') or {}
    if backbone.get('type') != 'KWBackbone' or 'in_channels' not in neck:
        return
    ignored = ('type', 'pretrained', 'init_cfg')
    # Channels alone are wanted; the detector's own backbone is made later.
    with torch.device('meta'):
        features = PyramidFeatures(**{key: value for key, value in backbone.items() if key not in ignored})
    expected, given = list(features.out_channels), list(neck['in_channels'])
    if expected != given:
        raise ValueError(
            f'Neck and backbone disagree: {backbone["name"]} returns channels {expected} at strides '
            f'{list(features.strides)}, the neck takes in_channels={given}. Set neck.in_channels={expected}, or '
            f'choose other levels with backbone.out_indices.'
        )


def check_data(dataset: Mapping[str, Any], split: str, num_classes: set[int]) -> None:
    """Check one COCO-format data set of a config.

    Args:
        dataset: Data set config.
        split: Its name, for the message.
        num_classes: ``num_classes`` of the detector's heads.

    Raises:
        FileNotFoundError: If the annotation file does not exist.
        ValueError: If it is not COCO's format, lacks a named class, or heads have another number of classes.
    """
    if 'ann_file' not in dataset or dataset.get('type') != 'CocoDataset':
        return
    path = Path(dataset.get('data_root') or '', dataset['ann_file'])
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no annotation file '{path}' ({dataset_key(split)}.ann_file). "
            f'Check data_root and ann_file of the config.'
        )
    classes = dataset_classes(dataset)
    if classes is None:
        return  # COCO's own 80 classes; the file is large, and MMDetection reads it
    names = Path(classes).read_text().split('\n') if isinstance(classes, str) else list(classes)
    names = [name for name in names if name]
    if num_classes and num_classes != {len(names)}:
        raise ValueError(
            f'{dataset_key(split)} has {len(names)} classes, but the heads have num_classes={sorted(num_classes)}. '
            f'Set num_classes={len(names)} in model.roi_head.bbox_head and model.roi_head.mask_head.'
        )
    try:
        found = {category['name'] for category in json.loads(path.read_text())['categories']}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"'{path}' is not a COCO annotation file: {type(error).__name__}: {error}.") from error
    missing = [name for name in names if name not in found]
    if missing:
        raise ValueError(
            f"The annotation file '{path}' has no class named {', '.join(missing)}; it has {', '.join(sorted(found))}. "
            f'Set {dataset_key(split)}.{CLASSES_KEY} to names that the file has.'
        )


def _datasets(config: Any) -> Iterator[Mapping[str, Any]]:
    """Yield the innermost data set configs of wrappers (RepeatDataset, ConcatDataset) and lists."""
    if isinstance(config, list | tuple):
        for item in config:
            yield from _datasets(item)
    elif isinstance(config, Mapping):
        inner = config.get('dataset') or config.get('datasets')
        if inner is not None:
            yield from _datasets(inner)
        else:
            yield config


def _num_classes(config: Any) -> Iterator[int]:
    """Yield ``num_classes`` of every head."""
    if isinstance(config, Mapping):
        for key, value in config.items():
            if key == 'num_classes':
                yield value
            else:
                yield from _num_classes(value)
    elif isinstance(config, list | tuple):
        for item in config:
            yield from _num_classes(item)
