"""Load weights into networks, in whichever wrapping they come."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from ..layers.annealing import without_passes
from .convert import reference_keys, to_timm_state_dict
from .entries import select_weights
from .errors import WeightsMismatchError, in_one_line
from .files import check_weight_file, read_weight_file
from .prefixes import WRAPPERS, find_prefix, named_under, without_prefix, without_wrappers
from .sound import check_finite, check_kinds, check_names, first_few, misfits
from .variants import own_name, own_names, warehouse_names

__all__ = ['CLASSIFIERS', 'fit_state_dict', 'load_checkpoint', 'unwrap_weights']

CLASSIFIERS = ('fc.', 'classifier.', 'head.', 'warehouses.classifier.')


def load_checkpoint(
    model: nn.Module, path: str | Path, use_ema: bool = True, strict: bool = True, prefix: str | None = None
) -> Any:
    """Load a weight file, of the reference or of this package, into a model; of one that does not fit, nothing.

    Args:
        model: KW network (or any network, for files with its own names); what wraps it is looked through.
        path: Weight file, index of shards, or the folder of either.
        use_ema: Prefer averaged weights where the file has them.
        strict: Require that keys match exactly. Otherwise what is there is loaded, which must be something.
        prefix: What the names of the network's tensors begin with; None finds it.

    Returns:
        Missing and unexpected keys. A count of training passes (:func:`~kw_timm.anneal`) is left out and left as it is.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file cannot be read.
        WeightsMismatchError: If it holds another network's weights, too few of them, or none that are numbers.

    Example:
        >>> load_checkpoint(timm.create_model('kw1x_resnet18'), 'kw1x_resnet18.pth')
    """
    file = check_weight_file(path)
    state_dict = read_weight_file(file, use_ema)
    network = _inner(model)
    try:
        weights = unwrap_weights(state_dict, network, prefix)
        if _is_kw(network):
            weights = to_timm_state_dict(weights, network, strict)  # type: ignore[arg-type]
            check_fits(weights, network, strict)
            check_finite(weights)
        return network.load_state_dict(weights, strict=strict)
    except (ValueError, RuntimeError) as error:
        raise WeightsMismatchError(f"The file '{file}' was not loaded. {in_one_line(error)}") from error


def unwrap_weights(checkpoint: Mapping[str, Any], model: nn.Module, prefix: str | None = None) -> dict[str, Any]:
    """Return a network's weights from a checkpoint, without what wrappers put around them and before their names.

    Args:
        checkpoint: State dict or checkpoint, of the network or of something around it: Lightning, DDP, FSDP, averaging,
            ``torch.compile``, a detector.
        model: The network.
        prefix: What the names of its tensors begin with; None finds it.

    Returns:
        The network's tensors, under this package's names or the reference's; those of other modules are left out.

    Raises:
        ValueError: If there are no tensors.
        WeightsMismatchError: If no name begins with the prefix, or the network is there several times.

    Example:
        >>> model.load_state_dict(unwrap_weights(torch.load('epoch=9.ckpt'), model))
    """
    state_dict = named_under(select_weights(checkpoint)[0], prefix)
    known = _known_names(model)
    classifier = {name for name in known if name.startswith(CLASSIFIERS)}
    return without_prefix(state_dict, find_prefix(state_dict, known), classifier)


def fit_state_dict(state_dict: Mapping[str, Any], model: Any, strict: bool = True) -> Mapping[str, Any]:
    """Return weights under a KW network's own names, for its ``load_state_dict``.

    Args:
        state_dict: Weights under its names or the reference's, or a part of them.
        model: The network.
        strict: Refuse weights of a static network, too.

    Returns:
        Those given if they have the network's names and shapes, else the same tensors, renamed.

    Raises:
        WeightsMismatchError: If they are another variant's, are no plain tensors, or have names that begin otherwise;
            the message says what to write.
    """
    weights = without_passes(state_dict)
    if len(weights) < len(state_dict):
        passes = {key: value for key, value in state_dict.items() if key not in weights}
        return {**passes, **fit_state_dict(weights, model, strict)}
    own = model.state_dict()
    if all(_is_like(value, own.get(key)) for key, value in state_dict.items()):
        return state_dict
    check_names(state_dict)
    check_kinds(state_dict, own)
    if not all(key in own for key in own_names(state_dict, model.family, warehouse_names(state_dict, model))):
        _check_prefix(state_dict, model, strict)
    weights = to_timm_state_dict(state_dict, model, strict)
    check_kinds(weights, own)
    return weights


def _check_prefix(state_dict: Mapping[str, Any], model: Any, strict: bool) -> None:
    """Raise WeightsMismatchError if names begin with a prefix or have a wrapper's within; if strict, some of them."""
    known = _known_names(model)
    start = find_prefix(state_dict, known)
    if not start:
        within = [part for key in state_dict if without_wrappers(key) in known for part in key.split('.')]
        start = next((f'{part}.' for part in within if part in WRAPPERS), '')
    if start and (strict or not any(key in known for key in state_dict)):
        raise WeightsMismatchError(
            f"The names of the weights begin with '{start}' or have it within, those of {own_name(model)} do not. Take "
            f'it off by load_state_dict(kw_timm.weights.unwrap_weights(weights, model)), or let '
            f'kw_timm.load_checkpoint(model, FILE) do it.'
        )


def _is_like(value: Any, own: Any) -> bool:
    return (
        own is not None
        and isinstance(value, torch.Tensor)
        and value.dtype == own.dtype
        and not value.is_nested
        and value.layout == own.layout
        and value.shape == own.shape
    )


def check_fits(weights: Mapping[str, Any], model: nn.Module, strict: bool = True) -> None:
    """Raise WeightsMismatchError unless weights are a network's: all of them, or with ``strict=False`` some."""
    own = without_passes(model.state_dict())
    check_kinds(weights, own)
    # Where a count of batches is missing, torch goes on from the network's.
    counts = {key: value for key, value in own.items() if key.endswith('.num_batches_tracked') and key not in weights}
    problems = misfits({**weights, **counts}, own, shapes_alone=not strict)
    advice = f'Load weights of {own_name(model)}'
    if not own.keys() & weights.keys():
        problems = [f'none of the {len(weights)} is one of the network: {first_few(list(weights))}']
    elif strict and not misfits(weights, own, shapes_alone=True):
        advice += ', or with strict=False what is there'
    if problems:
        raise WeightsMismatchError(
            f'The weights do not fit {own_name(model)}, which has {len(own)} tensors; {"; ".join(problems)}. {advice}.'
        )


def _inner(model: Any) -> nn.Module:
    """Return the network within wrappers."""
    while True:
        if isinstance(model, DataParallel | DistributedDataParallel | AveragedModel):
            model = model.module
        elif isinstance(getattr(model, '_orig_mod', None), nn.Module):
            model = model._orig_mod
        else:
            network: nn.Module = model
            return network


def _is_kw(model: nn.Module) -> bool:
    return hasattr(model, 'family') and isinstance(getattr(model, 'warehouses', None), nn.ModuleDict)


def _known_names(model: nn.Module) -> set[str]:
    """Return the names of a network's tensors, and the reference's for them."""
    names = set(model.state_dict())
    return names | set(reference_keys(model).values()) if _is_kw(model) else names  # type: ignore[arg-type]
