"""State dicts of the reference implementation <-> this package's, tensor by tensor."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..layers import KWLinear
from ..layers.annealing import without_passes
from .key_tables import rename, timm_names
from .protocol import KWModel
from .variants import REFERENCE_WAREHOUSE, check_variant, own_names, warehouse_names

__all__ = [
    'in_reference_order',
    'reference_keys',
    'rename_to_reference',
    'to_reference_state_dict',
    'to_timm_state_dict',
]


def to_timm_state_dict(state_dict: Mapping[str, Any], model: KWModel, strict: bool = True) -> dict[str, Any]:
    """Return weights under this package's names, whichever of the two naming schemes they come in.

    Args:
        state_dict: Weights of one network, or a part of them.
        model: The KW network that they are for.
        strict: Refuse weights of a static network, without any warehouse.

    Returns:
        The same tensors, renamed; ConvNeXt's layer scale is reshaped from ``(1, C, 1, 1)`` to ``(C,)``.

    Raises:
        WeightsMismatchError: If the weights belong to another variant or to a static network.
    """
    weights = {
        key: value.flatten() if key.endswith('.gamma') and _is_reference_gamma(value) else value
        for key, value in own_names(state_dict, model.family, warehouse_names(state_dict, model)).items()
    }
    check_variant(weights, model, strict, state_dict)
    return weights


def _is_reference_gamma(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() == 4 and value.shape[0] == value.shape[2:].numel() == 1


def reference_keys(model: KWModel) -> dict[str, str]:
    """Return ``{key of this package: key of the reference}`` for the model's state dict, in the reference's order."""
    names = _reference_names(model)
    keys = {key: rename(key, names) for key in without_passes(model.state_dict())}
    for i, name in enumerate(model.warehouses):
        keys[f'warehouses.{name}.weight'] = f'{REFERENCE_WAREHOUSE}{i}'
    return in_reference_order(keys)


def in_reference_order(keys: Mapping[str, str]) -> dict[str, str]:
    """Sort ``{key: key of the reference}``, given in timm's order: warehouses and ConvNeXt's downsampling go first."""
    first = (REFERENCE_WAREHOUSE, 'downsample_layers.')

    def rank(item: tuple[str, str]) -> int:
        return next((i for i, prefix in enumerate(first) if item[1].startswith(prefix)), len(first))

    return dict(sorted(keys.items(), key=rank))


def to_reference_state_dict(model: KWModel) -> dict[str, torch.Tensor]:
    """Return a model's weights under the reference's names, in its shapes and in its order."""
    return rename_to_reference(model.state_dict(), reference_keys(model))


def rename_to_reference(state_dict: Mapping[str, torch.Tensor], keys: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """Return KW weights under the names of ``keys``, in its order; ConvNeXt's layer scale becomes ``(1, C, 1, 1)``."""
    return {
        reference: state_dict[key].reshape(1, -1, 1, 1) if key.endswith('.gamma') else state_dict[key]
        for key, reference in keys.items()
        if key in state_dict
    }


def _reference_names(model: KWModel) -> dict[str, str]:
    classifier: nn.Module | None = getattr(model, 'classifier', None)
    name = 'classifier.1.conv' if isinstance(classifier, KWLinear) else 'classifier'
    return {timm: reference for reference, timm in timm_names(model.family, name).items()}
