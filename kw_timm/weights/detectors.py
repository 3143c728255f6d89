"""Detectors in MMDetection: the reference's checkpoints <-> detectors with this project's ``KWBackbone``.

Neck and heads have MMDetection's own names on both sides. The backbone's network is ``backbone.model.*`` here, under
timm's names; ConvNeXt's output norms are ``backbone.norm0`` to ``backbone.norm3`` on both sides. The reference's ResNet
and MobileNetV2 detectors carry an unused classifier, which is kept apart so that nothing is lost on the way back.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from .exact import (
    Network,
    assert_same_tensors,
    check_complete,
    recognise_network,
    rename_exact,
    to_reference_exact,
    to_timm_exact,
)

__all__ = [
    'OUT_NORM',
    'Detector',
    'backbone_part',
    'detector_to_ours',
    'detector_to_reference',
    'export_backbone',
    'is_detector',
]

_BACKBONE = 'backbone.'
_OURS = 'backbone.model.'
_CLASSIFIERS = ('fc.', 'classifier.', 'head.')
_OUT_NORMS = tuple(f'norm{i}.' for i in range(4))
OUT_NORM = re.compile(r'norm\d\.')


@dataclass(frozen=True)
class Detector:
    """A detector's weights.

    Attributes:
        name: Name of its config, e.g. ``'mask_rcnn_kw4x_resnet50_fpn_1x_coco'``.
        backbone: Its network, without classifier.
        state_dict: Weights for the config's detector, which it loads strictly.
        unused: The reference's unused classifier, under the reference's names.
    """

    name: str
    backbone: Network
    state_dict: dict[str, torch.Tensor]
    unused: dict[str, torch.Tensor]


def is_detector(state_dict: Mapping[str, torch.Tensor]) -> bool:
    """Say whether weights are a detector's rather than a classification network's."""
    return any(key.startswith(_BACKBONE) for key in state_dict) and any(
        key.startswith('rpn_head.') for key in state_dict
    )


def backbone_part(
    state_dict: dict[str, torch.Tensor], prefix: str | None = None, source: str = 'given'
) -> dict[str, torch.Tensor]:
    """Return the tensors of the backbone in a detector's weights, without what their names begin with.

    Args:
        state_dict: Weights of a detector, of its backbone alone, or of a classification network.
        prefix: What the names begin with, with or without the last dot. None looks for ``backbone.``.
        source: Where the weights come from, for the message.

    Returns:
        The backbone's tensors; ``state_dict`` itself if there is no prefix and no backbone.

    Raises:
        ValueError: If no name begins with the prefix.
    """
    if prefix:
        wanted = prefix if prefix.endswith('.') else f'{prefix}.'
        part = _part(state_dict, wanted)
        if not part:
            heads = sorted({key.partition('.')[0] for key in state_dict})
            raise ValueError(
                f"No tensor of the weights '{source}' has a name that begins with prefix='{wanted}'; theirs begin with "
                f'{", ".join(heads[:6])}{", ..." if len(heads) > 6 else ""}. Give the one before the backbone, or none.'
            )
        return part
    if any(key.startswith(_BACKBONE) for key in state_dict):
        return _part(state_dict, _BACKBONE)
    if any(key.startswith('model.') for key in state_dict) and all(
        key.startswith('model.') or OUT_NORM.match(key) for key in state_dict
    ):
        return dict(state_dict)  # A KWBackbone's own.
    return state_dict


def detector_to_ours(
    state_dict: Mapping[str, torch.Tensor], unused: Mapping[str, torch.Tensor] | None = None
) -> Detector:
    """Convert a detector's weights to the names of the detectors in ``configs/``.

    Args:
        state_dict: Weights of a detector of the reference, or of one of ours (which stay as they are).
        unused: What was kept apart when a detector of ours was converted.

    Raises:
        ValueError: If the backbone is not recognised or not complete, or conversion would lose anything.
    """
    if any(key.startswith(_OURS) for key in state_dict):
        network = recognise_network(_part(state_dict, _OURS))
        return Detector(_name(state_dict, network), network, dict(state_dict), dict(unused or {}))
    backbone = _part(state_dict, _BACKBONE)
    unused = {key: value for key, value in backbone.items() if _is_unused(key, value)}
    norms = {key: value for key, value in backbone.items() if key.startswith(_OUT_NORMS)}
    trunk = {key: value for key, value in backbone.items() if key not in unused and key not in norms}
    network = replace(recognise_network(trunk), num_classes=0)
    converted = {f'{_OURS}{key}': value for key, value in _trunk_to_timm(trunk, network).items()}
    converted |= {f'{_BACKBONE}{key}': value for key, value in norms.items()}
    converted |= {key: value for key, value in state_dict.items() if not key.startswith(_BACKBONE)}
    detector = Detector(_name(state_dict, network), network, converted, unused)
    assert_same_tensors(detector_to_reference(detector), state_dict)
    return detector


def detector_to_reference(detector: Detector) -> dict[str, torch.Tensor]:
    """Return a detector's weights under the reference's names, with the unused classifier where there was one."""
    network, state_dict = detector.backbone, detector.state_dict
    trunk = to_reference_exact(_part(state_dict, _OURS), network)
    converted = {f'{_BACKBONE}{key}': value for key, value in (*trunk.items(), *detector.unused.items())}
    converted |= {key: value for key, value in state_dict.items() if not key.startswith(_OURS)}
    return converted


def export_backbone(detector: Detector) -> dict[str, torch.Tensor]:
    """Return the backbone as weights of timm's network without classifier, ``detector.backbone.create()``.

    The detector's output norms are left out; ConvNeXt's own last norm, which no detector has, gets its initial values.
    """
    weights = _part(detector.state_dict, _OURS)
    own = detector.backbone.skeleton().state_dict()
    for key, value in own.items():
        if key.startswith('head.norm.'):
            weights.setdefault(key, torch.full(value.shape, float(key.endswith('weight'))))
    return to_timm_exact(weights, detector.backbone)


def _part(state_dict: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}


def _is_unused(key: str, value: torch.Tensor) -> bool:
    # The cells of a KW classifier are the only ones of a linear layer, (n, co, ci, 1).
    is_kw_classifier = key.startswith('warehouse_manager.') and value.dim() == 4
    return key.startswith(_CLASSIFIERS) or is_kw_classifier


def _trunk_to_timm(trunk: Mapping[str, torch.Tensor], network: Network) -> dict[str, torch.Tensor]:
    """Rename a network without classifier and last norm, and check that the rest is complete."""
    renamed = rename_exact(trunk, network.name)
    expected = {k: v for k, v in network.skeleton().state_dict().items() if not k.startswith('head.')}
    check_complete(renamed, expected, f'a detector with {network.name}')
    return {key: value.contiguous() for key, value in renamed.items()}


def _name(state_dict: Mapping[str, torch.Tensor], network: Network) -> str:
    head = 'mask_rcnn' if any(key.startswith('roi_head.mask_head.') for key in state_dict) else 'faster_rcnn'
    return f'{head}_{network.name}_fpn_1x_coco'
