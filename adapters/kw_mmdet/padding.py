"""How a backbone that leaves padding out learns the images' sizes: a detector calls it with the images alone.

What a detector is called with has them, in MMDetection 2.x ``img_metas[i]['img_shape']``, in 3.x
``data_samples[i].metainfo['img_shape']``. A hook in front of the detector notes them in its backbone.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

__all__ = ['BatchSizes', 'follow_detectors', 'sizes_of']

# Shape of images (B, C, H, W), and their sizes without padding.
BatchSizes = tuple[tuple[int, ...], list[tuple[int, int]]]


@cache
def follow_detectors() -> None:
    """From now on let every module that gets a backbone with ``ignore_padding`` tell it the sizes of its batches."""
    register_module_module_registration_hook(_registered)


def sizes_of(x: torch.Tensor, noted: list[BatchSizes]) -> list[tuple[int, int]]:
    """Return the sizes of images, among those that were noted; those of several scales are taken in turn.

    Raises:
        ValueError: If there are none of that shape.
    """
    for i, (shape, sizes) in enumerate(noted):
        if shape == tuple(x.shape):
            noted.append(noted.pop(i))
            return sizes
    raise ValueError(
        f'The backbone has ignore_padding=True, but the sizes of the images {tuple(x.shape)} without padding are not '
        f"known: call the detector with its batch's meta data (img_shape), or the backbone with "
        f'sizes=[(height, width), ...].'
    )


def _registered(parent: nn.Module, name: str, module: nn.Module | None) -> None:
    if getattr(module, 'ignore_padding', False) and _note_sizes not in parent._forward_pre_hooks.values():
        parent.register_forward_pre_hook(_note_sizes, with_kwargs=True)
        parent.register_forward_hook(_forget_sizes, always_call=True)


def _note_sizes(detector: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    given = dict(enumerate(args)) | kwargs
    images = next((given[key] for key in ('img', 'inputs', 0) if key in given), None)
    metas = next((given[key] for key in ('img_metas', 'data_samples', 1) if key in given), None)
    noted = list(_batches(images, metas))
    for backbone in _backbones(detector):
        backbone.batch_sizes = list(noted)


def _forget_sizes(detector: nn.Module, *_: Any) -> None:
    for backbone in _backbones(detector):
        backbone.batch_sizes = []


def _backbones(detector: nn.Module) -> list[Any]:
    return [child for child in detector.children() if getattr(child, 'ignore_padding', False)]


def _batches(images: Any, metas: Any) -> list[BatchSizes]:
    """Return shape and sizes of one batch, or of a list of batches (one per scale or flip of a test)."""
    if isinstance(images, torch.Tensor) and isinstance(metas, Sequence):
        shapes = [_img_shape(meta) for meta in metas]
        known = [(int(shape[0]), int(shape[1])) for shape in shapes if shape is not None]
        return [(tuple(images.shape), known)] if len(known) == len(images) else []
    if isinstance(images, Sequence) and isinstance(metas, Sequence):
        return [batch for pair in zip(images, metas, strict=False) for batch in _batches(*pair)]
    return []


def _img_shape(meta: Any) -> Any:
    return (meta if isinstance(meta, Mapping) else getattr(meta, 'metainfo', {})).get('img_shape')
