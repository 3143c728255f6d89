"""The weights in a checkpoint: which of its entries they are."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ..layers.annealing import without_passes
from .prefixes import without_wrappers

__all__ = ['EMA_KEYS', 'select_weights']

# As timm, the reference, mmengine and others name them.
EMA_KEYS = ('model_ema', 'state_dict_ema', 'ema_state_dict')
_PLAIN_KEYS = ('model', 'state_dict', 'model_state_dict')
_DEPTH = 4
# How often torch.optim.swa_utils and mmengine have averaged; beside the averaged network, which is their `module`.
_COUNTERS = ('n_averaged', 'steps')


def select_weights(checkpoint: Any, use_ema: bool = True) -> tuple[dict[str, torch.Tensor], str]:
    """Return the state dict in a checkpoint, and the entry that it came from.

    Args:
        checkpoint: What a weight file holds: a state dict, or a checkpoint with ``model`` or ``state_dict`` and maybe
            ``model_ema`` or ``state_dict_ema``. Of one with neither, such as ``{'student': ..., 'teacher': ...}``, the
            names begin with those of the entries.
        use_ema: Prefer averaged weights where there are any.

    Returns:
        State dict without the prefixes of wrappers (DDP, FSDP, ``torch.compile``, averaging) and without a count of
        training passes; and the entry's name, ``''`` for a bare state dict.

    Raises:
        ValueError: If there are no tensors.
    """
    entry, weights = '', checkpoint
    if isinstance(checkpoint, Mapping):
        order = (*EMA_KEYS, *_PLAIN_KEYS) if use_ema else (*_PLAIN_KEYS, *EMA_KEYS)
        entry = next((key for key in order if isinstance(checkpoint.get(key), Mapping)), '')
        weights = checkpoint[entry] if entry else checkpoint
    tensors = without_passes(dict(_tensors(weights)))
    if not tensors:
        raise ValueError('it holds no tensors; expected a state dict or a checkpoint with one.')
    unwrapped: dict[str, torch.Tensor] = {}
    for key, value in tensors.items():
        name = without_wrappers(key)
        while name.startswith('module.'):
            name = name.removeprefix('module.')
        # Of two that would get one name, e.g. a network and its average, neither is lost.
        unwrapped[key if name in unwrapped else name] = value
    if any(key.startswith('module.') for key in tensors):
        for counter in _COUNTERS:
            unwrapped.pop(counter, None)
    return unwrapped, entry


def _tensors(weights: Any, before: str = '', depth: int = _DEPTH) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors in nested dictionaries, under names joined by dots; lists, as optimizers keep them, are not."""
    if not isinstance(weights, Mapping) or depth == 0:
        return
    for key, value in weights.items():
        if not isinstance(key, str):
            continue
        if isinstance(value, torch.Tensor):
            yield f'{before}{key}', value
        elif value is not weights:
            yield from _tensors(value, f'{before}{key}.', depth - 1)
