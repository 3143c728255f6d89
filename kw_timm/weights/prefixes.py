"""What wrappers and surrounding modules put before a network's names, found and taken off."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from .errors import WeightsMismatchError
from .sound import first_few

__all__ = ['WRAPPERS', 'find_prefix', 'named_under', 'without_prefix', 'without_wrappers']

# Modules of torch's wrappers; no network has such names itself.
WRAPPERS = ('_orig_mod', '_fsdp_wrapped_module', '_checkpoint_wrapped_module', '_forward_module')
# Where the names of these begin, a KW network's begin, whichever variant's.
_WAREHOUSES = ('warehouses.', 'warehouse_manager.weights.')


def without_wrappers(key: str) -> str:
    """Return a name without the parts that ``torch.compile``, FSDP and checkpointing put anywhere into it."""
    if not any(part in key for part in WRAPPERS):
        return key
    return '.'.join(part for part in key.split('.') if part not in WRAPPERS)


def find_prefix(keys: Iterable[str], known: Collection[str]) -> str:
    """Return what stands before a network's names, e.g. ``'model.'``, or ``''``.

    Args:
        keys: Names of tensors: the network's, or a part of them, and maybe others'.
        known: The network's own names.

    Raises:
        WeightsMismatchError: If the network is there several times, under names of which none is within another.
    """
    votes: Counter[str] = Counter()
    keys = list(keys)
    for key in keys:
        start = 0
        while True:
            if key.startswith(_WAREHOUSES, start) or key[start:] in known:
                votes[key[:start]] += 1
            start = key.find('.', start) + 1
            if start == 0:
                break
    if not votes:
        return ''
    # Of names that tell as much the shortest: 'layer1.0.bn1' ends like the stem's 'bn1' does.
    best = min(votes, key=lambda prefix: (-votes[prefix], len(prefix)))
    # A few names that end alike, as other networks have them, tell nothing.
    if votes[best] < min(len(keys), len(known)) // 20:
        return ''
    rivals = [
        prefix
        for prefix, count in votes.items()
        if 2 * count > votes[best] and not prefix.startswith(best) and not best.startswith(prefix)
    ]
    if rivals:
        raise WeightsMismatchError(
            f'The weights hold the network {len(rivals) + 1} times, under {first_few(sorted([best, *rivals]))} each. '
            f"kw_timm.load_checkpoint(model, FILE, prefix='{best.removesuffix('.')}') takes one of them."
        )
    return best


def named_under(state_dict: Mapping[str, Any], prefix: str | None) -> Mapping[str, Any]:
    """Return the tensors whose names begin with a prefix that was given, without it; all of them if none was.

    Raises:
        WeightsMismatchError: If no name begins with it.
    """
    if not prefix:
        return state_dict
    start = prefix if prefix.endswith('.') else f'{prefix}.'
    part = without_prefix(state_dict, start)
    if not part:
        heads = sorted({key.partition('.')[0] for key in state_dict})
        raise WeightsMismatchError(
            f"No name begins with prefix='{start}'; they begin with {first_few(heads)}. Give another, or none."
        )
    return part


def without_prefix(state_dict: Mapping[str, Any], prefix: str, beside: Collection[str] = ()) -> dict[str, Any]:
    """Return the tensors whose names begin with a prefix, without it.

    Args:
        state_dict: Weights.
        prefix: What the names begin with, up to a dot.
        beside: Names that are taken without the prefix too, as they are or behind ``head.``: of a classifier, which
            frameworks keep beside the backbone.
    """
    part = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
    if prefix:
        for key, value in state_dict.items():
            name = next((name for name in (key, key.removeprefix('head.')) if name in beside), None)
            if name is not None and not key.startswith(prefix):
                part.setdefault(name, value)
    return part
