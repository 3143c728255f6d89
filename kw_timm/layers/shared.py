"""A module that several layers use: registered once, by the network, and yet never lost with a part of the network.

The network registers what its layers share under one name. A layer only refers to it, so whatever goes over a network
finds it once. But people take networks apart (``nn.Sequential(*net.children())``, ``net.layer1``, torchvision's
``IntermediateLayerGetter``), and then the layers alone are left. So a layer brings along what it shares wherever a walk
has not met it before: among ``modules()`` and ``parameters()``, in state dicts, and when a part is moved or cast.
"""

import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Self

import torch
from torch import nn

__all__ = ['SharedModule', 'SharingLayer', 'is_summed_up', 'known_to_trace']


class _Walk(threading.local):
    """What the latest walk over a state dict has met, and the names that layers wrote, or missed, on behalf of it."""

    walked: Callable[[], object]
    names: 'weakref.WeakKeyDictionary[nn.Module, list[str]]'

    def __init__(self) -> None:
        self.walked, self.names = lambda: None, weakref.WeakKeyDictionary()

    def over(self, walked: Any) -> 'weakref.WeakKeyDictionary[nn.Module, list[str]]':
        """Return what the walk over ``walked`` has met; it begins here unless it is the latest.

        Args:
            walked: What is one and the same in all of a walk: the state dict that is written, or the list of keys that
                the one which is read misses.
        """
        if self.walked() is not walked:
            try:  # A state dict must not outlive its user here; lists cannot be referred to weakly.
                self.walked = weakref.ref(walked)
            except TypeError:
                self.walked = lambda: walked
            self.names = weakref.WeakKeyDictionary()
        return self.names


_saving, _loading = _Walk(), _Walk()


class SharedModule(nn.Module):
    """Base of what layers share. Where a network has registered it, no layer brings it along."""

    def named_modules(
        self, memo: set[Any] | None = None, prefix: str = '', remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """Walk as torch does, and leave a mark that this module was met."""
        memo = set() if memo is None else memo
        memo.add(_mark(self))
        yield from super().named_modules(memo, prefix, remove_duplicate)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        names = _saving.over(destination)
        # The registered name is the one to keep, also where a layer came first.
        for name in names.get(self, ()):
            destination.pop(name, None)
        names[self] = []
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(  # type: ignore[no-untyped-def]
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        met = _loading.over(missing_keys)
        missed: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missed, unexpected_keys, error_msgs)
        if self not in met:
            missing_keys.extend(missed)
        elif met[self]:
            # A layer that came first missed it under its own name.
            missing_keys[:] = [key for key in missing_keys if key not in met[self]] + missed
        met[self] = missed


class SharingLayer(nn.Module):
    """Base of layers that use a shared module, which they keep, unregistered, in the attribute named ``shares``."""

    shares: ClassVar[str]

    def named_modules(
        self, memo: set[Any] | None = None, prefix: str = '', remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """Walk as torch does; behind the layer comes what it shares, if nothing met so far has it."""
        memo = set() if memo is None else memo
        if self in memo:
            return
        yield from super().named_modules(memo, prefix, remove_duplicate)
        shared = self.__dict__.get(self.shares)
        if is_summed_up(self):
            return
        if shared is not None and _mark(shared) not in memo and not _is_registered(shared, memo):
            yield from shared.named_modules(
                memo, f'{prefix}.{self.shares}' if prefix else self.shares, remove_duplicate
            )

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        shared = self.__dict__.get(self.shares)
        if recurse and shared is not None:
            shared._apply(fn)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        shared = self.__dict__.get(self.shares)
        names = _saving.over(destination)
        if shared is None or shared in names:
            return
        before = set(destination)
        shared.state_dict(destination=destination, prefix=f'{prefix}{self.shares}.', keep_vars=keep_vars)
        names[shared] = [name for name in destination if name not in before]

    def _load_from_state_dict(  # type: ignore[no-untyped-def]
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        unexpected: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected, error_msgs)
        shared = self.__dict__.get(self.shares)
        if shared is not None and shared not in _loading.over(missing_keys):
            own = f'{prefix}{self.shares}.'
            unexpected = [key for key in unexpected if not key.startswith(own)]
            for name, module in shared.named_modules(prefix=own.removesuffix('.')):
                part = {key: value for key, value in state_dict.items() if key.startswith(f'{name}.')}
                module._load_from_state_dict(
                    part, f'{name}.', local_metadata, strict, missing_keys, unexpected, error_msgs
                )
        unexpected_keys.extend(unexpected)


def known_to_trace(shared: nn.Module, tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor of ``shared`` as ``torch.jit.trace`` takes it: a constant where no traced module registers it."""
    traced = getattr(torch.jit._trace, '_trace_module_map', None)
    return tensor if traced is None or shared in traced else tensor.data


def _mark(shared: nn.Module) -> tuple[str, int]:
    # Of another type than what torch puts there: without duplicates removed, modules are met more than once.
    return ('met', id(shared))


def is_summed_up(layer: nn.Module) -> bool:
    """Return whether torchinfo is at work: it adds up what every module has and does, and would count cells often."""
    return any(getattr(hook, '__module__', '').startswith('torchinfo.') for hook in layer._forward_pre_hooks.values())


def _is_registered(shared: nn.Module, memo: set[Any]) -> bool:
    """Return whether a module met so far has ``shared`` among its children, or theirs, and will come to it."""
    for module in memo:
        for child in module._modules.values() if isinstance(module, nn.Module) else ():
            if child is shared or (isinstance(child, nn.ModuleDict) and shared in child._modules.values()):
                return True
    return False
