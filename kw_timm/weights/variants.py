"""Tell variants apart by the shapes of their tensors, of a part of them too."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import timm
import torch

from ..layers.annealing import without_passes
from .errors import WeightsMismatchError
from .key_tables import rename, timm_names
from .protocol import KWModel
from .skeletons import create_skeleton

__all__ = [
    'OURS',
    'REFERENCE_WAREHOUSE',
    'candidates',
    'check_variant',
    'identify_variant',
    'own_name',
    'own_names',
    'released_names',
    'shapes_of',
    'warehouse_names',
]

Shapes = dict[str, tuple[int, ...]]

REFERENCE_WAREHOUSE = 'warehouse_manager.weights.'
OURS = 'warehouses.'
# Their shapes follow classes and input channels, and tell no variant.
_FREE = ('fc.', 'classifier.', 'head.', 'conv1.', 'conv_stem.', 'stem.')


@dataclass(frozen=True)
class Variant:
    """What a registered variant's weights look like.

    Attributes:
        family: Name of its key table.
        tensors: Shape of every tensor, by name.
        warehouses: Those of the warehouses, by their names and in order.
    """

    family: str
    tensors: Shapes
    warehouses: Shapes


@lru_cache
def variant(name: str) -> Variant:
    """Return what the weights of a registered network look like."""
    model = create_skeleton(name)
    return Variant(model.family, shapes_of(model.state_dict()), model_shapes(model))


def released_names() -> list[str]:
    """Return the names of the networks with released weights."""
    return list(timm.list_models('kw*', pretrained=True, include_tags=False))


def shapes_of(state_dict: Mapping[str, Any]) -> Shapes:
    """Return the shapes of the tensors in a state dict."""
    return {key: tuple(value.shape) for key, value in state_dict.items() if isinstance(value, torch.Tensor)}


def model_shapes(model: Any) -> Shapes:
    """Return the warehouse shapes of a KW network, by name and in order."""
    return {name: tuple(warehouse.weight.shape) for name, warehouse in model.warehouses.items()}


def own_name(model: Any) -> str:
    """Return what messages call a network: its variant, or its class."""
    return (getattr(model, 'pretrained_cfg', None) or {}).get('architecture') or type(model).__name__


def own_names(state_dict: Mapping[str, Any], family: str, warehouses: list[str]) -> dict[str, Any]:
    """Return weights under this package's names; those that have them, and unknown ones, keep theirs.

    Args:
        state_dict: Weights under either naming scheme, or a part of them.
        family: Name of the key table.
        warehouses: Names of the warehouses in the reference's order.
    """
    names = timm_names(family)
    renamed = {}
    for key, value in state_dict.items():
        number = key.removeprefix(REFERENCE_WAREHOUSE)
        if number != key:
            known = number.isdecimal() and int(number) < len(warehouses)
            renamed[f'{OURS}{warehouses[int(number)]}.weight' if known else key] = value
        else:
            renamed[rename(key, names) if names else key] = value
    return renamed


def warehouse_names(state_dict: Mapping[str, Any], model: KWModel) -> list[str]:
    """Return the names that the reference's numbers of warehouses stand for.

    They are the model's own, unless warehouses were removed from it, as for feature extraction, or with a classifier.
    """
    own = model_shapes(model)
    found = {
        key.removeprefix(REFERENCE_WAREHOUSE): value
        for key, value in shapes_of(state_dict).items()
        if key.startswith(REFERENCE_WAREHOUSE)
    }
    if not found or all(_fits(n, found.get(str(i), ()), s) for i, (n, s) in enumerate(own.items())):
        numbers = [int(number) for number in found if number.isdecimal()]
        if not numbers or max(numbers) < len(own):
            return list(own)
    return list(_unpruned(model) or own)


def identify_variant(state_dict: Mapping[str, Any]) -> str | None:
    """Return the name of the registered variant that weights belong to, or None.

    Args:
        state_dict: Weights under this package's names or the reference's, or such a part of them that only one variant
            has it. Input channels of a KW stem and classes of a KW classifier may differ from the published ones.
    """
    found = candidates(state_dict)
    return found[0] if len(found) == 1 else None


def candidates(state_dict: Mapping[str, Any]) -> list[str]:
    """Return the variants that weights can be of: with such warehouses, and with as many tensors like theirs as any.

    Args:
        state_dict: Weights under either naming scheme, or a part of them.
    """
    warehouses = _warehouses(shapes_of(state_dict))
    if not warehouses and not any('.attention.' in key for key in state_dict):
        return []
    fitting = []
    for name in released_names():
        whole = variant(name).warehouses
        if _hold(warehouses, whole):
            fitting.append(name)
            if len(warehouses) >= len(whole.keys() - {'classifier'}):
                return [name]  # All of them: no other variant has these.
    if warehouses and len(fitting) < 2:
        return fitting
    likeness: dict[str, int] = {}
    for name in fitting:
        known = variant(name)
        found = shapes_of(own_names(state_dict, known.family, list(known.warehouses)))
        telling = [key for key in found if not key.startswith((*_FREE, OURS))]
        alike = sum(found[key] == known.tensors.get(key) for key in telling)
        if warehouses or (telling and alike == len(telling)):
            likeness[name] = alike
    return [name for name, alike in likeness.items() if alike == max(likeness.values())]


def _hold(found: Shapes, expected: Shapes) -> bool:
    """Say whether warehouses, by name or by the reference's number, are among those of a variant."""
    names = dict(enumerate(expected))
    return all(
        _fits(name, shape, expected.get(name))
        for name, shape in ((names.get(int(key), key) if key.isdecimal() else key, s) for key, s in found.items())
    )


def check_variant(
    weights: Mapping[str, Any], model: KWModel, strict: bool = True, given: Mapping[str, Any] | None = None
) -> None:
    """Raise WeightsMismatchError if weights are another variant's, or a static network's; a part of them is welcome.

    Args:
        weights: Weights under this package's names.
        model: KW network.
        strict: Refuse weights of a static network, without any warehouse, too.
        given: The weights as they were, where the reference's numbers stood for the warehouses of the model.
    """
    found, expected, name = _warehouses(shapes_of(weights)), model_shapes(model), own_name(model)
    own = shapes_of(without_passes(model.state_dict()))
    if not found and strict and not any('.attention.' in key for key in weights):
        static = _static_layer(weights, model)
        alike = sum(key in own for key in weights)
        if static is not None or 2 * alike < len(weights):
            why = (
                f"'{static}' has no weight of its own" if static else f'{alike} of the {len(weights)} tensors are found'
            )
            raise WeightsMismatchError(
                f'The weights hold no warehouse: they are those of a static network, the model is {name}, where {why}. '
                f"Load weights of a KW variant, or create the static network (timm's own) for these."
            )
    others = {key: shape for key, shape in found.items() if not _fits(key, shape, expected.get(key))}
    if others:
        # A file has all warehouses, a network may have lost some: to feature extraction, or with its classifier.
        whole = _unpruned(model)
        others = {key: s for key, s in others.items() if key in expected or not _fits(key, s, whole.get(key))}
    theirs = []
    if others or any(_tells(key) and own.get(key, shape) != shape for key, shape in shapes_of(weights).items()):
        theirs = candidates(weights if given is None else given)
    if not others and (not theirs or name in theirs):
        return
    about = f'warehouses {_describe(found)}' if found else f'{len(weights)} tensors without warehouses'
    raise WeightsMismatchError(
        f'The weights are of {" or ".join(theirs) or "no released variant"} ({about}), '
        f'the model is {name} (warehouses {_describe(expected)}). '
        + (f"Create the model with timm.create_model('{theirs[0]}')" if theirs else 'Create the model that was trained')
        + f', or load weights of {name}.'
    )


def _tells(key: str) -> bool:
    return '.attention.' in key and not key.startswith(_FREE)


def _warehouses(shapes: Shapes) -> Shapes:
    """Return the warehouses among tensors, by their names or by the numbers of the reference."""
    found = {}
    for key, shape in shapes.items():
        for start in (OURS, REFERENCE_WAREHOUSE):
            if key.startswith(start):
                found[key.removeprefix(start).removesuffix('.weight')] = shape
    return found


def _unpruned(model: Any) -> Shapes:
    """Return all warehouses of the variant that a network is, those that were removed from it included, or none."""
    name, own = own_name(model), model_shapes(model)
    if name not in timm.list_models('kw*'):
        return {}
    whole = variant(name).warehouses
    return whole if all(_fits(key, shape, whole.get(key)) for key, shape in own.items()) else {}


def _static_layer(weights: Mapping[str, Any], model: Any) -> str | None:
    """Return the name of a KW layer of the model that weights hold a static kernel for, or None."""
    layers = {name.removesuffix('.attention') for name, _ in model.named_modules() if name.endswith('.attention')}
    found = (key.removesuffix('.weight') for key in weights if key.endswith('.weight'))
    return next((layer for layer in found if layer in layers), None)


def _fits(name: str, shape: tuple[int, ...], expected: tuple[int, ...] | None) -> bool:
    """Compare warehouses; a stem's input channels and a KW classifier, which a network may lack, may differ."""
    if name == 'classifier':
        return len(shape) == 4
    if expected is None or len(shape) != len(expected):
        return False
    if name == 'stem' and min(shape[2], expected[2]) <= 4:
        return (shape[:2], shape[3:]) == (expected[:2], expected[3:])
    return shape == expected


def _describe(shapes: Shapes) -> str:
    parts = ['x'.join(map(str, shape[:3])) for shape in list(shapes.values())[:4]]
    return f'{len(shapes)}: ' + ', '.join(parts) + (', ...' if len(shapes) > 4 else '')
