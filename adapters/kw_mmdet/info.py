"""What a config stands for: levels, parameters, what is frozen, which weights are loaded, classes, schedule."""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import timm
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from kw_timm.pyramid import TIMM
from kw_timm.weights.store import TAG, hub_repository, store_folder

from .backbone import KWBackbone
from .datasets import data_sets
from .generation import Config, build, schedule
from .sources import weights_source

__all__ = ['describe']


def describe(config: Config) -> dict[str, str]:
    """Return what a config stands for, a line per name.

    Raises:
        ValueError: If its detector cannot be built.
    """
    logging.disable(logging.INFO)  # of every parameter, how it was initialized
    try:
        detector = build(config)
    except Exception as error:
        # Any constructor of any part may raise anything.
        raise ValueError(f'The detector cannot be built: {type(error).__name__}: {error}') from error
    finally:
        logging.disable(logging.NOTSET)
    lines = {'detector': type(detector).__name__, **_backbone(detector.backbone)}
    lines['parameters'] = f'{_count(detector):,}, of them backbone {_count(detector.backbone):,}'
    frozen = sum(p.numel() for p in detector.parameters() if not p.requires_grad)
    lines['frozen'] = f'{frozen:,}: {", ".join(_frozen(detector))}' if frozen else 'nothing'
    norms = [m for m in detector.train().modules() if isinstance(m, _BatchNorm)]
    lines['BatchNorms'] = f'{len(norms)}, {sum(not m.training for m in norms)} of them keep their running statistics'
    lines |= _weights(config)
    for split in ('train', 'test'):
        for data in data_sets(config, split):
            names = data.classes
            shown = "COCO's own" if names is None else names if isinstance(names, str) else ', '.join(names)
            lines[f'{split} classes'] = shown
            lines[f'{split} annotations'] = str(data.annotations)
    return lines | schedule(config)


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _backbone(backbone: nn.Module) -> dict[str, str]:
    if not isinstance(backbone, KWBackbone):
        return {'backbone': type(backbone).__name__}
    levels = zip(backbone.strides, backbone.out_channels, strict=True)
    return {
        'backbone': backbone.name,
        'levels': ', '.join(f'stride {stride}: {channels} channels' for stride, channels in levels),
    }


def _frozen(module: nn.Module, prefix: str = '') -> Iterator[str]:
    """Yield the names of the largest modules, and of single parameters, that are frozen whole."""
    parameters = list(module.parameters())
    if prefix and parameters and not any(p.requires_grad for p in parameters):
        yield prefix
        return
    for name, parameter in module.named_parameters(recurse=False):
        if not parameter.requires_grad:
            yield f'{prefix}.{name}'.removeprefix('.')
    for name, child in module.named_children():
        yield from _frozen(child, f'{prefix}.{name}'.removeprefix('.'))


def _weights(config: Config) -> dict[str, str]:
    lines = {'backbone weights': _backbone_weights(config.model.get('backbone') or {})}
    for key in ('load_from', 'resume_from'):
        if config.get(key):
            lines['detector weights'] = _file(config[key])
    return lines


def _backbone_weights(backbone: Mapping[str, Any]) -> str:
    name = str(backbone.get('name'))
    source = weights_source(name, backbone.get('pretrained'), backbone.get('init_cfg'))
    if source is None:
        return 'random'
    if source.static and not Path(str(source.weights)).suffix:
        return f"those of the static {str(source.weights).removeprefix(TIMM)}, timm's own"
    if source.weights is not None and not source.weights.startswith(TIMM):
        return _file(source.weights)
    theirs = str(source.weights or '').endswith(f'.{TAG}')
    if not name.startswith('kw') and not theirs:
        pretrained = timm.get_pretrained_cfg(name)
        return f"timm's own, {pretrained.hf_hub_id or pretrained.url if pretrained else 'but it has none'}"
    weight = name if '.' in name else f'{name}.{TAG}'
    if store_folder(weight).is_dir():
        return f'{store_folder(weight)} (in the store)'
    return f'{hub_repository(weight)} on the Hub; the store, {store_folder()}, has none'


def _file(source: str) -> str:
    return source if '://' in source or Path(source).is_file() else f'{source} (there is no such file)'
