"""Whether tensors are such that weights can be: of the right kind, and finite."""

from collections.abc import Mapping
from typing import Any

import torch

from .errors import WeightsMismatchError

__all__ = ['check_finite', 'check_kinds', 'check_names', 'check_stored', 'first_few', 'misfits']

_FLOAT8_BYTES = 1
_SMALL = 1 << 20


def first_few(names: list[str]) -> str:
    """Return at most four of some names, and how many more there are."""
    return ', '.join(names[:4]) + (f' and {len(names) - 4} more' if len(names) > 4 else '')


def misfits(weights: Mapping[str, Any], own: Mapping[str, Any], shapes_alone: bool = False) -> list[str]:
    """Return what keeps weights from being a network's: names that are missing or unexpected, and other shapes."""
    missing = [] if shapes_alone else [key for key in own if key not in weights]
    unexpected = [] if shapes_alone else [key for key in weights if key not in own]
    shapes = [
        f'{key} {tuple(value.shape)} instead of {tuple(own[key].shape)}'
        for key, value in weights.items()
        if key in own and own[key].shape != value.shape
    ]
    found = (('missing', missing), ('unexpected', unexpected), ('of another shape', shapes))
    return [f'{what}: {first_few(names)}' for what, names in found if names]


def check_names(weights: Mapping[Any, Any]) -> None:
    """Raise WeightsMismatchError unless weights are a state dict: under names, and no checkpoint around one."""
    for key, value in weights.items():
        if not isinstance(key, str):
            raise WeightsMismatchError(
                f'The weights have the name {key!s:.40}, which is of type {type(key).__name__}; names are text. '
                f'Name them as state_dict() does.'
            )
        if isinstance(value, Mapping) and any(isinstance(inner, torch.Tensor) for inner in value.values()):
            raise WeightsMismatchError(
                f"This is a checkpoint with weights in its entry '{key}', a state dict was expected. Load that: "
                f"load_state_dict(checkpoint['{key}'])."
            )


def check_kinds(weights: Mapping[str, Any], expected: Mapping[str, Any] | None = None) -> None:
    """Raise WeightsMismatchError unless weights are plain tensors of numbers, of a network like its own.

    Args:
        weights: Weights; what the network does not have may be anything.
        expected: The network's own; None for any, of which all weights are looked at.
    """
    for key, own in (weights if expected is None else expected).items():
        kind = _wrong_kind(weights[key], own) if key in weights and isinstance(own, torch.Tensor) else None
        if kind is not None:
            like = 'real numbers' if expected is None else str(own.dtype)
            raise WeightsMismatchError(
                f"The weight '{key}' is {kind}, a dense tensor of {like} was expected. Use a file that holds the state "
                f'dict as it was trained.'
            )


def _wrong_kind(value: Any, own: torch.Tensor) -> str | None:
    """Say what a weight is if it is none: of its floating point types and integers each fits any other."""
    if not isinstance(value, torch.Tensor):
        return f'of type {type(value).__name__}'
    if value.is_quantized:
        return f'quantized ({value.dtype})'
    if value.layout != torch.strided or value.is_nested:
        return f'sparse or nested ({value.layout})'
    if value.is_complex() or (value.dtype == torch.bool) != (own.dtype == torch.bool):
        return f'of {value.dtype}'
    if own.is_floating_point() and not value.is_floating_point():
        return f'of {value.dtype}'
    return None


def check_stored(weights: Mapping[str, torch.Tensor]) -> None:
    """Raise WeightsMismatchError for tensors of a file that have no values, or far fewer than their shape says.

    One number can stand for a tensor of terabytes, which would be made as soon as anything is done with it.
    """
    for key, value in weights.items():
        if value.is_meta:
            raise WeightsMismatchError(
                f"The tensor '{key}' has no values: it was saved from the meta device. Save the network that has them."
            )
        if value.layout != torch.strided or value.is_nested:
            continue
        size, stored = value.numel() * value.element_size(), value.untyped_storage().nbytes()
        if size > max(stored, _SMALL):
            raise WeightsMismatchError(
                f"The tensor '{key}' claims {tuple(value.shape)}, {size:,} bytes, of which the file holds {stored:,}. "
                f'Use a file from its authors.'
            )


def check_finite(weights: Mapping[str, torch.Tensor]) -> None:
    """Raise WeightsMismatchError if there are NaN or infinite numbers among weights."""
    bad = [key for key, value in weights.items() if not _is_finite(value)]
    if bad:
        raise WeightsMismatchError(
            f'The weights hold NaN or infinite numbers, in {first_few(bad)}: training diverged, or the file is '
            f'damaged. Take an earlier checkpoint, or fetch the file again.'
        )


def _is_finite(value: torch.Tensor) -> bool:
    if not value.is_floating_point() or value.is_meta:
        return True
    value = value.detach()
    if value.element_size() == _FLOAT8_BYTES:
        value = value.float()
    # Reading once is ten times as fast as asking each number, which is done where the sum overflows.
    total = value.sum(dtype=torch.promote_types(value.dtype, torch.float32))
    return bool(total.isfinite()) or bool(value.isfinite().all())
