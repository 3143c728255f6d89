"""Which layers of a network can become KW layers, and why others cannot."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from timm.layers import Conv2dSame
from timm.layers.linear import Linear as AutocastLinear
from torch import nn
from torch._subclasses import FakeTensor
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize

from .layers import KWConv1d, KWConv2d, KWConv3d, KWLayer, KWLinear
from .readers import find_reader

__all__ = ['check_replaceable', 'counterpart', 'obstacles']

_COUNTERPARTS: dict[type[nn.Module], type[KWLayer]] = {
    Conv2dSame: KWConv2d,
    nn.Conv1d: KWConv1d,
    nn.Conv2d: KWConv2d,
    nn.Conv3d: KWConv3d,
    AutocastLinear: KWLinear,
    nn.Linear: KWLinear,
}
_HOOKS = ('_forward_hooks', '_forward_pre_hooks', '_backward_hooks', '_backward_pre_hooks')
# What every KW layer has, its own attributes included; the rest of a static layer nobody can use.
_OFFERED = {name for cls in (KWConv1d, KWConv2d, KWConv3d, KWLinear) for name in dir(cls)} | {
    'in_channels',
    'out_channels',
    'spec',
    'attention',
    'bias',
    'training',
    'warehouse',
}


def counterpart(module: nn.Module) -> tuple[type[nn.Module], type[KWLayer]] | None:
    """Return the static class that a layer computes like, and its KW class; None if there is none."""
    for static, kw in _COUNTERPARTS.items():
        computes = ('forward', '_conv_forward', '__call__')
        if isinstance(module, static) and all(
            getattr(type(module), name, None) is getattr(static, name, None) for name in computes
        ):
            return static, kw
    return None


def check_replaceable(model: nn.Module, planned: Mapping[str, str]) -> None:
    """Raise ValueError, naming layer and reason, unless every planned layer can be replaced.

    Args:
        model: The network.
        planned: Layer name -> warehouse name.
    """
    wrapper = next((m for m in model.modules() if isinstance(m, DistributedDataParallel)), None)
    if wrapper is not None:
        raise ValueError('The network is wrapped in DistributedDataParallel; kernelize it first, then wrap it.')
    for layer, reason in obstacles(model, planned):
        raise ValueError(f"Warehouse '{planned[layer]}' plans the layer '{layer}', but {reason}")


def obstacles(model: nn.Module, layers: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield the layers that cannot be replaced, each with the reason, a sentence's second half.

    Args:
        model: The network.
        layers: Names of layers, as ``named_modules`` gives them.
    """
    everywhere = list(model.named_modules(remove_duplicate=False))
    modules, users = dict(everywhere), _users(everywhere)
    for layer in layers:
        module: Any = modules[layer]
        reason = _reason(module) or _shared(layer, module, users) or _read(modules, layer)
        if reason is not None:
            yield layer, reason


def _reason(module: Any) -> str | None:
    """Return why a layer cannot be replaced, as far as it can be seen from the layer alone."""
    kind = type(module).__name__
    if isinstance(module, LazyModuleMixin):
        return f'{kind} has no size yet; run the network once before it is kernelized.'
    if parametrize.is_parametrized(module):
        return (
            f'its {", ".join(module.parametrizations)} is parametrized, which a KW layer would drop; call '
            f'torch.nn.utils.parametrize.remove_parametrizations on the layer first.'
        )
    if counterpart(module) is None:
        own = next((base for base in _COUNTERPARTS if isinstance(module, base)), None)
        if own is None:
            return f'{kind} has no KW counterpart. Plan nn.Conv1d, nn.Conv2d, nn.Conv3d and nn.Linear layers.'
        return (
            f'{kind} has no KW counterpart: it uses its weight in a way of its own (standardized, quantized, padded), '
            f'not as nn.{own.__name__} does; leave it out of the plan, or build the network with plain layers.'
        )
    if not isinstance(module._parameters.get('weight'), nn.Parameter) or set(module._parameters) - {'weight', 'bias'}:
        return (
            'its weight is computed from other tensors before every call (pruning, weight_norm, spectral_norm), which '
            'a KW layer would drop; make it a plain parameter first (prune.remove, remove_weight_norm, '
            'remove_spectral_norm).'
        )
    if module._buffers or module._modules:
        extra = ', '.join((*module._buffers, *module._modules))
        return f'it holds more than weight and bias ({extra}), which a KW layer would drop; leave it out of the plan.'
    tensor = module.weight.data
    if type(tensor) not in (torch.Tensor, FakeTensor) or not tensor.is_floating_point():
        return (
            f'its weight is a {type(tensor).__name__} of {tensor.dtype}; kernelize the network of plain floating point '
            f'tensors, before it is quantized or sharded.'
        )
    if 'forward' in vars(module) or any(getattr(module, hooks) for hooks in _HOOKS):
        return (
            'it has hooks (or a forward of its own), which a KW layer would drop; remove them, and register them on '
            'the KW layer afterwards.'
        )
    return _unsupported_padding(module)


def _unsupported_padding(module: Any) -> str | None:
    if getattr(module, 'padding_mode', 'zeros') != 'zeros':
        return f"padding_mode='{module.padding_mode}' is not supported, only 'zeros'; leave it out of the plan."
    # Pads by input size in its own forward; only at stride 1 is that a padding known beforehand.
    if isinstance(module, Conv2dSame) and any(stride != 1 for stride in module.stride):
        return 'Conv2dSame pads by input size, which is supported at stride 1 only; leave it out of the plan.'
    return None


def _users(everywhere: Iterable[tuple[str, nn.Module]]) -> dict[Any, list[str]]:
    """Return by memory of a tensor, and by module, the names under which it is in the network."""
    users: dict[Any, list[str]] = {}
    for name, module in everywhere:
        users.setdefault(id(module), []).append(name)
        for key, parameter in module._parameters.items():
            if parameter is not None:
                users.setdefault(_memory(parameter), []).append(f'{name}.{key}'.lstrip('.'))
    return users


def _memory(tensor: torch.Tensor) -> Any:
    try:
        return 'memory', tensor.untyped_storage()._cdata
    except (RuntimeError, ValueError, NotImplementedError):  # Stands for memory that is elsewhere.
        return 'tensor', id(tensor)


def _shared(layer: str, module: Any, users: Mapping[Any, list[str]]) -> str | None:
    if len(users[id(module)]) > 1:
        others = ', '.join(name for name in users[id(module)] if name != layer)
        return f'the same layer is also {others}, where it would stay static; leave it out of the plan, or copy it.'
    for key, parameter in module._parameters.items():
        known = [] if parameter is None else users[_memory(parameter)]
        tied = [name for name in known if name != f'{layer}.{key}']
        if tied:
            return (
                f'its {key} is tied to {", ".join(tied)}, which a KW layer would undo; leave it out of the plan, or '
                f'give it a {key} of its own.'
            )
    return None


def _read(modules: dict[str, nn.Module], layer: str) -> str | None:
    found = find_reader(modules, layer, _OFFERED)
    if found is None:
        return None
    name, attribute = found
    where = f"'{name}' ({type(modules[name]).__name__})" if name else f'the network ({type(modules[name]).__name__})'
    return (
        f"{where} reads its '{attribute}' instead of calling it, and a KW layer has none, since its kernel is made for "
        f'every sample; leave it out of the plan.'
    )
