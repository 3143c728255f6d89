"""Tell variants apart by the shapes of their warehouses."""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import timm
import torch

from .protocol import KWModel

__all__ = ['REFERENCE_WAREHOUSE', 'check_variant', 'identify_variant', 'variant_shapes']

Shapes = dict[str, tuple[int, ...]]  # by name of the warehouse, or by its number in the reference

REFERENCE_WAREHOUSE = 'warehouse_manager.weights.'
_OURS = 'warehouses.'


@lru_cache(maxsize=1)
def variant_shapes() -> dict[str, Shapes]:
    """Return the warehouse shapes of every registered variant, by name and in order."""
    shapes: dict[str, Shapes] = {}
    with torch.device('meta'):
        for name in timm.list_models('kw*'):
            shapes[name] = model_shapes(timm.create_model(name))
    return shapes


def model_shapes(model: Any) -> Shapes:
    """Return the warehouse shapes of a KW network, by name and in order."""
    return {name: tuple(warehouse.weight.shape) for name, warehouse in model.warehouses.items()}


def file_shapes(state_dict: Mapping[str, Any]) -> Shapes:
    """Return the warehouse shapes in a state dict by name, or by number (in order) under the reference's names."""
    reference = {
        k.removeprefix(REFERENCE_WAREHOUSE): v for k, v in state_dict.items() if k.startswith(REFERENCE_WAREHOUSE)
    }
    if reference:
        return {number: tuple(reference[number].shape) for number in sorted(reference, key=int)}
    names = (key.split('.')[1] for key in state_dict if key.startswith(_OURS))
    return {name: tuple(state_dict[f'{_OURS}{name}.weight'].shape) for name in names}


def identify_variant(state_dict: Mapping[str, Any]) -> str | None:
    """Return the name of the registered variant that weights belong to, or None.

    Args:
        state_dict: Weights under this package's names or the reference's. Input channels of a KW stem and classes of a
            KW classifier may differ from the published ones.
    """
    found = file_shapes(state_dict)
    for name, shapes in variant_shapes().items():
        if _same(found, shapes):
            return name
    return None


def check_variant(state_dict: Mapping[str, Any], model: KWModel, strict: bool = True) -> None:
    """Raise ValueError unless weights have the warehouses of the model.

    Args:
        state_dict: Weights under either naming scheme.
        model: KW network.
        strict: Refuse weights without any warehouse too.
    """
    found, expected = file_shapes(state_dict), model_shapes(model)
    own_name = (getattr(model, 'pretrained_cfg', None) or {}).get('architecture') or type(model).__name__
    if not found:
        if strict and state_dict:
            raise ValueError(
                f'The weights hold no warehouse: they are those of a static network, the model is {own_name}. '
                f"Load weights of a KW variant, or create the static network (timm's own) for these."
            )
        return
    if _same(found, expected):
        return
    variant = identify_variant(state_dict)
    raise ValueError(
        f'The weights are of {variant or "no released variant"} (warehouses {_describe(found)}), '
        f'the model is {own_name} (warehouses {_describe(expected)}). '
        + (f"Create the model with timm.create_model('{variant}')" if variant else 'Create the model that was trained')
        + f', or load weights of {own_name}.'
    )


def _same(found: Shapes, expected: Shapes) -> bool:
    """Compare warehouses; a KW stem's input channels, a KW classifier's presence and classes may differ."""
    if not all(name.isdigit() for name in found):
        # Names may come in any order, safetensors sorts them.
        if (found.keys() ^ expected.keys()) - {'classifier'}:
            return False
        found = {name: found[name] for name in expected if name in found}
    # A KW classifier comes last and is the only warehouse of linear cells, (n, co, ci, 1).
    a, b = ([shape for shape in shapes.values() if len(shape) != 4] for shapes in (found, expected))
    if len(a) != len(b) or not a:
        return False
    return a[1:] == b[1:] and (a[0][:2], a[0][3:]) == (b[0][:2], b[0][3:]) and _stem_like(a[0], b[0])


def _stem_like(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    return a == b or min(a[2], b[2]) <= 4


def _describe(shapes: Shapes) -> str:
    parts = ['x'.join(map(str, shape[:3])) for shape in list(shapes.values())[:4]]
    return f'{len(shapes)}: ' + ', '.join(parts) + (', ...' if len(shapes) > 4 else '')
