"""Start a KW network from the weights of the static network that it was made of."""

import logging
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import timm
from torch import nn

from ..layers import KWLayer, Warehouse
from ..takeover import take_over
from .entries import select_weights
from .errors import WeightsMismatchError
from .files import check_weight_file, read_weight_file
from .load import CLASSIFIERS
from .prefixes import find_prefix, named_under, without_prefix
from .sound import check_finite, first_few
from .static import identify_static, static_names, static_to_timm
from .store import reachable
from .variants import own_name

__all__ = ['is_weight_file', 'load_static', 'static_weights', 'unwrap_static']

_logger = logging.getLogger(__name__)


def load_static(
    model: nn.Module, source: str | Path | Mapping[str, Any], prefix: str | None = None
) -> dict[str, float]:
    """Let a KW network compute what a trained static network computes, and learn from there; in place.

    As ``kernelize(..., weights='keep')``, for networks that are kernelized already: with at least a cell per mixture
    outputs are the static network's, at temperature 0, in training and in evaluation mode; with fewer cells the kernels
    are the nearest ones.

    Args:
        model: KW network, of :func:`~kw_timm.kernelize` or a registered one; or what holds one.
        source: Weights of the static network: a timm name (``'resnet50.a1_in1k'``, ``'hf-hub:...'``), whose pretrained
            weights timm gets; a weight file; a state dict or checkpoint, of a static detector too.
        prefix: What the names of a file's tensors begin with; None finds it.

    Returns:
        By KW layer how far its kernel is from the static one, relative to that; 0 where nothing is lost.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file cannot be read, or the model has no KW layer.
        WeightsMismatchError: If the weights are of another network than the model was made of; nothing is changed.

    Example:
        >>> load_static(timm.create_model('kw4x_resnet50'), 'resnet50.a1_in1k')
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, KWLayer)}
    if not layers:
        raise ValueError(f'{type(model).__name__} has no KW layer; load static weights into it by load_state_dict.')
    weights = _fitting(static_weights(source, model), model, layers, prefix)
    check_finite(weights)
    by_warehouse: dict[int, tuple[Warehouse, dict[str, KWLayer]]] = {}
    for name, layer in layers.items():
        warehouse = layer.__dict__['warehouse']
        by_warehouse.setdefault(id(warehouse), (warehouse, {}))[1][name] = layer
    errors: dict[str, float] = {}
    for warehouse, users in by_warehouse.values():
        statics = {
            name: (layer, SimpleNamespace(weight=weights[f'{name}.weight'], bias=weights.get(f'{name}.bias')))
            for name, layer in users.items()
            if f'{name}.weight' in weights  # Not a classifier of other classes.
        }
        errors |= take_over(warehouse, statics, 'keep') if statics else {}
    own = model.state_dict()
    rest = {key: value for key, value in weights.items() if key in own}
    nn.Module.load_state_dict(model, rest, strict=False)
    return {name: errors[name] for name in layers if name in errors}


def is_weight_file(source: str | Path) -> bool:
    """Say whether a source is meant as a file, there or not, rather than as one of timm's names."""
    path = Path(source)
    return path.exists() or path.suffix in ('.pth', '.pt', '.safetensors', '.tar', '.bin', '.ckpt', '.json')


def static_weights(source: str | Path | Mapping[str, Any], model: nn.Module) -> Mapping[str, Any]:
    """Return the tensors that a source of static weights holds; timm fits its own to the model's classes and inputs."""
    if isinstance(source, Mapping):
        return source
    if is_weight_file(source):
        return read_weight_file(check_weight_file(source))
    shapes: dict[str, Any] = {}
    if hasattr(model, 'num_classes'):
        shapes['num_classes'] = model.num_classes
    first = next((module for module in model.modules() if isinstance(module, KWLayer | nn.Conv2d)), None)
    if first is not None:
        shapes['in_chans'] = first.in_channels
    name = str(source)
    if ':' not in name and not timm.is_model(name.partition('.')[0]):
        raise ValueError(f"'{name}' is neither a file nor a network of timm's; give one of them, or a state dict.")
    name, overlay = reachable(name, {})
    static: nn.Module = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **shapes)
    return static.state_dict()


def _fitting(
    source: Mapping[str, Any], model: nn.Module, layers: Mapping[str, KWLayer], prefix: str | None
) -> dict[str, Any]:
    """Return a static network's tensors under the names that the KW network's layers have.

    Raises:
        WeightsMismatchError: If one that the network needs is missing or of another shape.
    """
    own = {
        key: tuple(value.shape)
        for key, value in model.state_dict().items()
        if '.attention.' not in key and not key.startswith('warehouses.') and not key.endswith('.num_batches_tracked')
    }
    expected = own | {f'{name}.weight': layer.spec.kernel_shape for name, layer in layers.items()}
    found = unwrap_static(source, expected, prefix)
    problems = {key: tuple(found[key].shape) if key in found else None for key in expected}
    problems = {key: shape for key, shape in problems.items() if shape is None or not _alike(shape, expected[key])}
    other_classes = [key for key in problems if key.startswith(CLASSIFIERS)]
    if other_classes and len(other_classes) == len(problems):
        _logger.warning('The classifier stays new: %s', _describe(problems, expected))
        found = {key: value for key, value in found.items() if not key.startswith(CLASSIFIERS)}
    elif problems:
        raise WeightsMismatchError(
            f'The weights are not those of the static network that {own_name(model)} was made of: '
            f'{_describe(problems, expected)}. Give those of the same network, static and with the same arguments.'
        )
    return found


def unwrap_static(source: Mapping[str, Any], known: Collection[str], prefix: str | None = None) -> dict[str, Any]:
    """Return a static network's tensors under timm's names, without what is before them and beside them.

    Args:
        source: State dict or checkpoint, of the network or of a detector, under timm's names or the reference's.
        known: Names that the network's tensors have, at least some of them.
        prefix: What their names begin with; None finds it.

    Raises:
        WeightsMismatchError: If they are a KW network's, or no name begins with the prefix.
    """
    found, _ = select_weights(source)
    if any('.attention.fc1.' in key for key in found):
        raise WeightsMismatchError(
            "The weights are a KW network's, not a static one's; load them by kw_timm.load_checkpoint(model, FILE)."
        )
    named = named_under(found, prefix)
    part = without_prefix(named, find_prefix(named, {*known, *static_names()}))
    static = identify_static(part)
    return static_to_timm(part, static) if static else part


def _alike(shape: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    """Compare kernels; a linear layer's may be a 1x1 convolution's."""
    return shape == expected or (shape[:2] == expected[:2] and math.prod(shape) == math.prod(expected))


def _describe(problems: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    return first_few(
        [f"'{key}' is {'missing' if s is None else s} instead of {expected[key]}" for key, s in problems.items()]
    )
