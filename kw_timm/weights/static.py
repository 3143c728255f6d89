"""The static networks that KernelWarehouse is compared with: the reference's weight files <-> timm's own networks."""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from .key_tables import rename, timm_names
from .skeletons import create_skeleton
from .variants import shapes_of

__all__ = ['STATIC_NETWORKS', 'identify_static', 'static_names', 'static_to_reference', 'static_to_timm']

# timm name -> key table.
STATIC_NETWORKS = {
    'resnet18': 'resnet',
    'resnet50': 'resnet',
    'mobilenetv2_050': 'mobilenetv2',
    'mobilenetv2_100': 'mobilenetv2',
    'convnext_tiny': 'convnext',
}
_CLASSIFIER = 'classifier.1'
# What a file may lack (detectors have no classifier) and whose shape depends on classes or input channels.
_HEADS = ('fc.', 'classifier.', 'head.')
_STEMS = ('conv1.weight', 'conv_stem.weight', 'stem.0.weight')


@lru_cache(maxsize=1)
def _trunk_shapes() -> dict[str, dict[str, tuple[int, ...]]]:
    """Return, per network, the shapes that tell it from the others, under timm's names."""
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for name in STATIC_NETWORKS:
        found = shapes_of(create_skeleton(name).state_dict())
        shapes[name] = {key: shape for key, shape in found.items() if not key.startswith((*_HEADS, *_STEMS))}
    return shapes


@lru_cache(maxsize=1)
def static_names() -> set[str]:
    """Return the names of all static networks' tensors but the classifier's, timm's and the reference's."""
    names: set[str] = set()
    for name, shapes in _trunk_shapes().items():
        names |= {*shapes, *static_to_reference(shapes, name), *_STEMS}
    return names


def identify_static(state_dict: Mapping[str, Any]) -> str | None:
    """Return the timm name of the static network that weights belong to, or None.

    Args:
        state_dict: Weights under timm's names or the reference's; a classifier may be missing.
    """
    for name, expected in _trunk_shapes().items():
        found = shapes_of(static_to_timm(state_dict, name))
        # A detection backbone has output norms besides.
        if {key: shape for key, shape in found.items() if key in expected} == expected:
            return name
    return None


def static_to_timm(state_dict: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Rename weights of a static network to timm's names; weights that have them already stay as they are.

    Args:
        state_dict: Weights under the reference's names or timm's.
        name: Static network, see :data:`STATIC_NETWORKS`.
    """
    names = timm_names(STATIC_NETWORKS[name])
    return {rename(key, names): value for key, value in state_dict.items()}


def static_to_reference(state_dict: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Rename weights of one of timm's static networks to the reference's names.

    Args:
        state_dict: Weights under timm's names.
        name: Static network, see :data:`STATIC_NETWORKS`.
    """
    names = {timm_name: reference for reference, timm_name in timm_names(STATIC_NETWORKS[name], _CLASSIFIER).items()}
    return {rename(key, names): value for key, value in state_dict.items()}
