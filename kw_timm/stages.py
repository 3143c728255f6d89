"""Where a network's layers stand: stages, blocks, kinds; and which belong to the stage before, as in released networks.

Source: the released networks' groups, see :mod:`kw_timm.models`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.pooling import _AvgPoolNd, _MaxPoolNd

from .layers import KWLayer

__all__ = ['Place', 'candidates', 'find_classifiers', 'find_places']

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# Modules that compute weights of channels from one pooled vector.
_GATES = re.compile(r'Squeeze|Excit|SEModule|SEBlock|SELayer|^SE$|^Se$|Eca|Cbam|ChannelAttn|^GlobalContext$')
_QUARTERS = 4  # Runs of blocks that take the place of stages, where nothing else tells any.


@dataclass(frozen=True)
class Place:
    """Where a layer stands.

    Attributes:
        stage: Stage whose warehouses it uses, from 0; -1 is the stem.
        kind: What shares a warehouse: ``'conv'``, ``'dw'`` (depthwise), ``'grouped'``, ``'patch'`` (non-overlapping
            patches), ``'linear'``, ``'expand'`` (a pointwise layer before a depthwise one); with the rank where it is
            not 2.
        reason: Why it stays static all the same, empty if nothing speaks against it.
    """

    stage: int
    kind: str
    reason: str = ''


def candidates(model: nn.Module) -> dict[str, Any]:
    """Return the convolutions and linear layers of a network, those within KW layers left out."""
    kw = tuple(f'{name}.' for name, module in model.named_modules() if isinstance(module, KWLayer))
    return {
        name: module
        for name, module in model.named_modules()
        if name and isinstance(module, _ConvNd | nn.Linear) and not name.startswith(kw)
    }


def find_classifiers(model: Any, layers: dict[str, Any]) -> set[str]:
    """Return the names of the classifiers: timm's, else a linear layer behind all others."""
    found: set[int] = set()
    if hasattr(model, 'get_classifier'):
        heads = model.get_classifier()
        for head in heads if isinstance(heads, tuple | list) else (heads,):
            found |= {id(module) for module in head.modules()} if isinstance(head, nn.Module) else set()
    names = {name for name, layer in layers.items() if id(layer) in found}
    last = next(reversed(layers), None)
    if not names and last is not None and isinstance(layers[last], nn.Linear):
        return {last}
    return names


def find_places(model: Any, layers: dict[str, Any]) -> dict[str, Place]:
    """Return where layers stand, by name.

    Stages are timm's (``feature_info``), where they differ in resolution; else they begin where the resolution is
    lowered, or the number of channels changes; else there are four runs of blocks of about one length. The first
    layers of a stage belong to the stage before as far as their input is as wide as there.

    Args:
        model: The network.
        layers: Its layers by name, in its order, as :func:`candidates` gives them.
    """
    stages, prefixes = _timm_stages(model, layers) or (None, {})
    blocks = {name: _block(model, name, prefixes.get(stages[name], '') if stages else None) for name in layers}
    is_uniform = False
    if stages is None:
        stages, is_uniform = _found_stages(model, layers, blocks)
    kinds = {name: _kind(layer) for name, layer in layers.items()}
    places = {}
    handed = set() if is_uniform else _handed_over(layers, stages, blocks, kinds)
    expand = _expanding(list(layers), blocks, kinds)
    first = min((s for s in stages.values() if s >= 0), default=0)
    stage = -1
    for name in layers:
        prefix = prefixes.get(stages[name])
        if stages[name] < 0 or prefix is None or name.startswith(f'{prefix}.'):
            stage = stages[name] - (name in handed)
        # Else it stands behind the stages, and goes with the last layer of those.
        reason = ''
        if stages[name] < 0:
            reason = 'it is part of the stem.'
        elif stage < first:
            reason = 'it reads what the stem gives, and belongs to the stem.'
        elif _is_gate(model, name):
            reason = 'it weighs channels by one pooled vector.'
        places[name] = Place(stage, 'expand' if name in expand else kinds[name], reason)
    return places


def _kind(layer: Any) -> str:
    if isinstance(layer, nn.Linear):
        return 'linear'
    if layer.groups > 1:
        kind = 'dw' if layer.groups == layer.in_channels else 'grouped'
    else:
        kind = 'patch' if tuple(layer.stride) == tuple(layer.kernel_size) and max(layer.stride) > 1 else 'conv'
    rank = layer.weight.dim() - 2
    return kind if rank == 2 else f'{kind}{rank}d'


def _is_gate(model: nn.Module, name: str) -> bool:
    parts = name.split('.')
    above = ('.'.join(parts[:i]) for i in range(1, len(parts)))
    return any(_GATES.search(type(model.get_submodule(prefix)).__name__) for prefix in above)


def _timm_stages(model: Any, layers: dict[str, Any]) -> tuple[dict[str, int], dict[int, str]] | None:
    """Return every layer's stage and the stages' names, from timm's feature info; None if that tells nothing."""
    given = getattr(model, 'feature_info', None)
    info = [entry for entry in given if isinstance(entry, dict)] if isinstance(given, list | tuple) else []
    names = [str(entry.get('module', '')) for entry in info]
    modules = dict(model.named_modules())
    if len({entry.get('reduction') for entry in info}) < 2 or not all(name in modules and name for name in names):
        return None
    parent = names[-1].rpartition('.')[0]
    children = [name for name, child in (modules[parent].named_children() if parent else ()) if [*child.children()]]
    is_parent = sum(name.rpartition('.')[0] == parent for name in names) > len(names) / 2
    if parent and is_parent and len(children) == len(modules[parent]._modules):
        prefixes = {i: f'{parent}.{child}' for i, child in enumerate(children)}
    else:
        held = [name for name in names if any(layer.startswith(f'{name}.') for layer in layers)]
        prefixes = dict(enumerate(held if len(held) > 1 else []))
    if not prefixes:
        return None
    own = {n: next((i for i, p in prefixes.items() if n.startswith(f'{p}.')), None) for n in layers}
    order = list(modules)
    stem_ends = order.index(prefixes[0] if names[0] in prefixes.values() else names[0])
    stages: dict[str, int] = {}
    following: int | None = None
    for layer in reversed(layers):  # What is between stages belongs to the next one.
        following = following if own[layer] is None else own[layer]
        is_stem = following == 0 and own[layer] is None and order.index(layer) <= stem_ends
        stages[layer] = -1 if is_stem else max(prefixes) if following is None else following
    stages = {layer: stages[layer] for layer in layers}
    for i, layer in enumerate(layers):
        # What reads the image is the stem, and so is all of a stage of that name.
        is_first = i == 0 and not isinstance(layers[layer], nn.Linear)
        if is_first or 'stem' in prefixes.get(stages[layer], '').rpartition('.')[2]:
            stages[layer] = -1
    return stages, prefixes


def _block(model: nn.Module, name: str, stage: str | None) -> str:
    """Return the name of the block that a layer is in: the outermost module within its stage, or the layer itself."""
    parts = name.split('.')
    if stage is not None and (not stage or name.startswith(f'{stage}.')):
        above = ['.'.join(parts[:i]) for i in range(len(stage.split('.')) + 1 if stage else 1, len(parts))]
        return next((n for n in above if not isinstance(model.get_submodule(n), _CONTAINERS)), name)
    for i in range(len(parts) - 1, 0, -1):
        prefix, parent = '.'.join(parts[:i]), '.'.join(parts[: i - 1])
        module = model.get_submodule(prefix)
        is_item = isinstance(model.get_submodule(parent), _CONTAINERS) and not isinstance(module, _CONTAINERS)
        if is_item and sum(isinstance(m, _ConvNd | nn.Linear) for m in module.modules()) > 1:
            return prefix
    return name


def _found_stages(model: nn.Module, layers: dict[str, Any], blocks: dict[str, str]) -> tuple[dict[str, int], bool]:
    """Return every layer's stage, and whether stages are mere runs of blocks."""
    order = list(dict.fromkeys(blocks.values()))
    index = {block: i for i, block in enumerate(order)}
    # A convolution that reads the network's input is its stem.
    stem = next(iter(layers), None)
    has_stem = stem is not None and not isinstance(layers[stem], nn.Linear) and blocks[stem] == stem
    starts = _lowered(model, layers, blocks, index) or _widened(layers, blocks, index)
    starts -= {0, 1} if has_stem else {0}
    runs = not starts
    if runs:
        count = len(order) - has_stem
        starts = {has_stem + count * i // _QUARTERS for i in range(1, _QUARTERS)} - {0, int(has_stem)}
    stage_of = [sum(start <= i for start in starts) for i in range(len(order))]
    stages = {name: stage_of[index[block]] for name, block in blocks.items()}
    return (stages | {stem: -1} if has_stem and stem is not None else stages), runs


def _lowered(model: nn.Module, layers: dict[str, Any], blocks: dict[str, str], index: dict[str, int]) -> set[int]:
    """Return the blocks that lower the resolution, or come behind pooling that does."""
    starts, pooled = set(), False
    for name, module in model.named_modules():
        if name in layers:
            stride = getattr(module, 'stride', 1)
            is_strided = max(stride) > 1 if isinstance(stride, tuple) else False
            if is_strided or pooled:
                starts.add(index[blocks[name]])
            pooled = False
        elif isinstance(module, _MaxPoolNd | _AvgPoolNd):
            pooling: Any = module.stride
            pooled = pooled or (max(pooling) if isinstance(pooling, tuple) else pooling) > 1
    return starts


def _widened(layers: dict[str, Any], blocks: dict[str, str], index: dict[str, int]) -> set[int]:
    """Return the blocks that give another number of channels than the one before."""
    widths = {index[blocks[name]]: layer.weight.shape[0] for name, layer in layers.items()}
    return {i for before, i in pairwise(sorted(widths)) if widths[i] != widths[before]}


def _width(layer: Any) -> int:
    return int(layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels)


def _handed_over(
    layers: dict[str, Any], stages: dict[str, int], blocks: dict[str, str], kinds: dict[str, str]
) -> set[str]:
    """Return the layers of stages' first blocks that belong to the stage before.

    They are those whose counterpart in the second block has another input width, or that have none; also where the
    width is the same in the stage before. Layers of patches (ConvNeXt's downsampling) stay.
    """
    of_stage: dict[int, list[str]] = {}
    for name, stage in stages.items():
        members = of_stage.setdefault(stage, [])
        if stage >= 0 and not kinds[name].startswith('patch') and blocks[name] not in members:
            members.append(blocks[name])

    def width(block: str, part: str) -> int | None:
        layer = layers.get(f'{block}{part}')
        return None if layer is None else _width(layer)

    handed = set()
    numbers: Sequence[int] = sorted(stage for stage in of_stage if stage >= 0)
    has_stem = -1 in of_stage
    for number in numbers:
        members, before = of_stage[number], of_stage.get(number - 1, [])
        is_first = number == numbers[0]
        for name in layers:
            if not members or stages[name] != number or blocks[name] != members[0] or (is_first and not has_stem):
                continue
            part, own = name.removeprefix(members[0]), _width(layers[name])
            if len(members) < 2:
                is_handed = not is_first
            else:
                next_width = width(members[1], part)
                is_handed = next_width != own or (len(before) > 1 and width(before[-1], part) == own)
            if is_handed and not kinds[name].startswith('patch'):
                handed.add(name)
    return handed


def _expanding(names: list[str], blocks: dict[str, str], kinds: dict[str, str]) -> set[str]:
    """Return the layers that a depthwise one follows in the same block."""
    return {
        name
        for name, behind in pairwise(names)
        if kinds[name] == 'conv' and kinds[behind] == 'dw' and blocks[name] == blocks[behind]
    }
