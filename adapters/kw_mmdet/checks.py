"""Check a config before hours are spent on it: backbone and neck, classes against heads and annotations."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from kw_timm.weights import check_weight_file
from kw_timm.weights.static_start import is_weight_file

from .annotations import Needs, check_annotations
from .datasets import DataSet, data_sets, evaluators, type_name
from .features import PyramidFeatures
from .sources import weights_source

__all__ = ['check_config', 'check_data', 'check_neck']

COCO_CLASSES = 80
# Beyond, a file that is taken for COCO's own, since no classes are named, is left to MMDetection.
LARGE_FILE = 100_000_000
# Whose num_classes are not those of the data.
_OTHER_HEADS = ('rpn_head', 'semantic_head')
_NECKS = ('FPN', 'PAFPN', 'NASFPN', 'FPN_CARAFE')


def check_config(config: Mapping[str, Any], splits: tuple[str, ...] = ('train', 'val', 'test')) -> None:
    """Raise an error that says what to change where parts of an MMDetection config contradict each other.

    Args:
        config: Loaded config, in the form of MMDetection 2.x or 3.x.
        splits: Data sets that will be used.

    Raises:
        ValueError: If the backbone's arguments are another's, or neck and backbone, or classes and heads or
            annotations, disagree, or annotations lack what is read from them.
        FileNotFoundError: If an annotation file, an image (some are looked for) or a weight file does not exist.
    """
    model = config.get('model')
    if not isinstance(model, Mapping):
        raise ValueError("The config has no model=dict(...); inherit one, e.g. from this package's configs.")
    check_neck(model)
    if 'train' in splits:
        _check_weights(model)
    for split in splits:
        evaluates = evaluators(config, split)
        for data in data_sets(config, split):
            check_data(data, model, evaluates)
        for evaluator in evaluates:
            file = evaluator.get('ann_file')
            if isinstance(file, str) and '://' not in file and not Path(file).is_file():
                raise FileNotFoundError(
                    f"There is no annotation file '{file}' ({split}_evaluator.ann_file). Give that of the data set."
                )


def check_neck(model: Mapping[str, Any]) -> None:
    """Raise ValueError if a detector config's KW backbone cannot be, or its neck does not take what it returns.

    Args:
        model: ``config.model``; other backbones than KWBackbone pass.
    """
    backbone = model.get('backbone') or {}
    if not isinstance(backbone, Mapping) or type_name(backbone) != 'KWBackbone':
        return
    if 'name' not in backbone:
        raise ValueError("The backbone names no network; give KWBackbone e.g. name='kw4x_resnet50'.")
    ignored = ('type', 'pretrained', 'init_cfg', 'ignore_padding')
    # Channels alone are wanted; the detector's own backbone is made later.
    with torch.device('meta'):
        features = PyramidFeatures(**{key: value for key, value in backbone.items() if key not in ignored})
    given = model.get('neck')
    necks = [neck for neck in (given if isinstance(given, list | tuple) else [given]) if isinstance(neck, Mapping)]
    if not necks:
        return
    expected = list(features.out_channels)
    takes = necks[0].get('in_channels', expected)
    taken = list(takes) if isinstance(takes, list | tuple) else [takes]
    if expected != taken:
        raise ValueError(
            f'Neck and backbone disagree: {backbone["name"]} returns channels {expected} at strides '
            f'{list(features.strides)}, the neck takes in_channels={takes}. Set neck.in_channels={expected}, or '
            f'choose other levels with backbone.out_indices.'
        )
    for neck in necks:
        _check_levels(neck)
    _check_anchors(model, necks[-1])


def check_data(data: DataSet, model: Mapping[str, Any], evaluates: Sequence[Mapping[str, Any]] = ()) -> None:
    """Check one COCO-format data set of a config.

    Args:
        data: Data set.
        model: ``config.model``.
        evaluates: What evaluates the data set.

    Raises:
        FileNotFoundError: If the annotation file does not exist.
        ValueError: If heads have another number of classes, or as :func:`~.annotations.check_annotations`.
    """
    if data.kind != 'CocoDataset' or not data.is_local:
        return
    path = data.annotations
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no annotation file '{path}' ({data.key}.ann_file). Check data_root and ann_file of the config."
        )
    names = _class_names(data)
    count = COCO_CLASSES if names is None else len(names)
    wrong = {head: number for head, number in _num_classes(model) if number != count}
    if wrong:
        heads = ', '.join(f'{head}.num_classes={number}' for head, number in wrong.items())
        if names is None:
            raise ValueError(
                f"{data.key} names no classes, so COCO's {count} are used, but the model has {heads}. "
                f'Set {data.classes_key} to the names, as for the other data sets.'
            )
        raise ValueError(
            f'{data.key} has {count} classes, but the model has {heads}. Set num_classes={count} in '
            f'{" and ".join(wrong)}.'
        )
    if names is None:
        if path.stat().st_size > LARGE_FILE:
            return
        names = _coco_names()
        if not wrong and not list(_num_classes(model)):
            return  # A detector without classes of its own, such as an RPN.
    has_masks = any('mask_head' in head for head, _ in _num_classes(model)) or _has_mask_head(model)
    pipeline = data.config.get('pipeline')
    if data.trains and has_masks and pipeline and not data.loads_masks and _loads_annotations(pipeline):
        raise ValueError(
            f'The detector has a mask_head, but the pipeline of {data.key} loads no masks. Write '
            f"dict(type='LoadAnnotations', with_bbox=True, with_mask=True) there."
        )
    metrics = [metric for evaluator in evaluates for metric in _listed(evaluator.get('metric', 'bbox'))]
    reads_file = any(data.generation == 2 or evaluator.get('ann_file') for evaluator in evaluates)
    compares = data.split == 'val' if data.generation == 2 else reads_file
    needs = Needs(
        masks=(data.trains and has_masks) or (data.loads_masks and (data.trains or data.generation == 3)),
        evaluates=compares,
        evaluates_masks=compares and 'segm' in metrics,
    )
    check_annotations(data, names, needs)


def _check_weights(model: Mapping[str, Any]) -> None:
    """Check what can be known of a KW backbone's weights without loading them."""
    backbone = model.get('backbone') or {}
    if not isinstance(backbone, Mapping) or type_name(backbone) != 'KWBackbone':
        return
    # 2.x hands the detector's own `pretrained` on to its backbone.
    pretrained = model.get('pretrained') or backbone.get('pretrained')
    source = weights_source(str(backbone['name']), pretrained, backbone.get('init_cfg'))
    if source is not None and source.static and not is_weight_file(str(source.weights)):
        return
    if source is not None and source.weights is not None and '://' not in source.weights:
        check_weight_file(source.weights)


def _check_levels(neck: Mapping[str, Any]) -> None:
    """Check the numbers of an FPN's levels, which it would only assert."""
    if type_name(neck) not in _NECKS or not isinstance(neck.get('in_channels'), list | tuple):
        return
    count, start, end = len(neck['in_channels']), neck.get('start_level', 0), neck.get('end_level', -1)
    outs = neck.get('num_outs')
    if not 0 <= start < count:
        raise ValueError(f'neck.start_level={start} is out of range: the backbone has levels 0 to {count - 1}.')
    if end >= count:
        raise ValueError(f'neck.end_level={end} is out of range: the backbone has levels 0 to {count - 1}.')
    all_levels = end in (-1, count - 1)
    needed = count - start if all_levels else end - start + 1
    if outs is not None and (outs < needed if all_levels else outs != needed):
        raise ValueError(
            f'neck.num_outs={outs} cannot be: from level {start} of {count} the neck has '
            f'{"at least " if all_levels else ""}{needed}. Set num_outs={needed}, or another start_level.'
        )


def _check_anchors(model: Mapping[str, Any], neck: Mapping[str, Any]) -> None:
    outs = neck.get('num_outs')
    for name in ('rpn_head', 'bbox_head'):
        head = model.get(name)
        anchors = head.get('anchor_generator') if isinstance(head, Mapping) else None
        strides = anchors.get('strides') if isinstance(anchors, Mapping) else None
        if outs is not None and isinstance(strides, list | tuple) and len(strides) != outs:
            raise ValueError(
                f'{name}.anchor_generator has {len(strides)} strides, {list(strides)}, but the neck returns '
                f'num_outs={outs} levels. Give one stride for each.'
            )


def _class_names(data: DataSet) -> list[str] | None:
    """Return the names of a data set's classes, None for COCO's own."""
    classes = data.classes
    if classes is None:
        return None
    if isinstance(classes, str):
        if not Path(classes).is_file():
            raise ValueError(
                f"{data.classes_key}='{classes}' is a lone string, no tuple, and MMDetection takes it for a text file "
                f"of names, which does not exist. For one class write classes=('{classes}',), with the comma."
            )
        names = Path(classes).read_text().splitlines()
    elif isinstance(classes, list | tuple) and all(isinstance(name, str) for name in classes):
        names = list(classes)
    else:
        raise ValueError(f'{data.classes_key}={classes!r} must be a tuple or list of names, or a text file of them.')
    odd = next((name for name in names if not name.strip() or names.count(name) > 1), None)
    if odd is not None:
        raise ValueError(f"{data.classes_key} has '{odd}' {'as a name' if not odd.strip() else 'twice'}; remove it.")
    return names


def _coco_names() -> list[str]:
    from mmdet.datasets import CocoDataset

    names = getattr(CocoDataset, 'CLASSES', None) or CocoDataset.METAINFO['classes']
    return list(names)


def _has_mask_head(model: Mapping[str, Any]) -> bool:
    roi_head = model.get('roi_head')
    return any(isinstance(part, Mapping) and part.get('mask_head') for part in (model, roi_head))


def _loads_annotations(pipeline: Sequence[Any]) -> bool:
    return any(isinstance(step, Mapping) and type_name(step) == 'LoadAnnotations' for step in pipeline)


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _num_classes(config: Any, key: str = 'model') -> Iterator[tuple[str, int]]:
    """Yield where a head is, and its ``num_classes``, for every head that tells classes of the data apart."""
    if isinstance(config, list | tuple):
        for i, item in enumerate(config):
            yield from _num_classes(item, f'{key}[{i}]')
    elif isinstance(config, Mapping):
        name = key.rpartition('.')[2].partition('[')[0]
        if name.endswith('_head') and 'num_classes' in config:
            yield key, config['num_classes']
        for inner, value in config.items():
            if inner == 'roi_head' or (inner.endswith('_head') and inner not in _OTHER_HEADS):
                yield from _num_classes(value, f'{key}.{inner}')
