"""What torch is doing with the operations that run: computing, recording a graph, or transforming them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = [
    'autocast_dtype',
    'in_autocast_type',
    'is_computing',
    'is_plain',
    'is_recording',
    'is_straightforward',
    'is_transforming',
    'learns',
    'straightforward',
]

# Before torch 2.7 exporting and compiling could not be told apart.
_is_exporting = getattr(torch.compiler, 'is_exporting', torch.compiler.is_compiling)

_dispatch_modes = getattr(torch._C, '_len_torch_dispatch_stack', lambda: 0)
_functorch_level = getattr(torch._C._functorch, 'peek_interpreter_stack', lambda: None)
_PLAIN = (torch.Tensor, torch.nn.Parameter)

_straightforward = False


@contextmanager
def straightforward() -> Iterator[None]:
    """Let every KW layer compute in the straightforward way while the context lasts.

    It is what the other ways are tested and measured against; it also serves what they do not: second derivatives,
    forward-mode derivatives and ``torch.func.vmap``.

    Example:
        >>> with straightforward():
        ...     model(images)
    """
    global _straightforward
    before, _straightforward = _straightforward, True
    try:
        yield
    finally:
        _straightforward = before


def is_straightforward() -> bool:
    """Return whether this is within :func:`straightforward`."""
    return _straightforward


def is_recording() -> bool:
    """Return whether a graph is made that other programs may run: exported or traced, not compiled.

    It should consist of torch's own operations, and no constant in it should depend on the batch or its size.
    """
    return bool(_is_exporting() or torch.jit.is_tracing())


def is_transforming() -> bool:
    """Return whether ``torch.func`` (``grad``, ``vmap``, ...) looks on, for which operations must be torch's own."""
    return not torch.compiler.is_compiling() and _functorch_level() is not None


def is_plain(tensor: torch.Tensor) -> bool:
    """Return whether a tensor can be computed on at once: on a CPU, with nothing of torch looking on.

    Else the operation goes through torch's dispatcher, so that tracers, counters and fake tensors see it.
    """
    return tensor.device.type == 'cpu' and is_computing(tensor)


def is_computing(tensor: torch.Tensor) -> bool:
    """Return whether operations on a tensor just compute, on its device, with nothing of torch looking on."""
    return (
        type(tensor) in _PLAIN
        and not torch.compiler.is_compiling()
        and not _dispatch_modes()
        and _functorch_level() is None
    )


def autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    """Return the type that a convolution of ``x`` is to be computed in, None for its own."""
    kind = x.device.type
    if x.dtype == torch.float64 or not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def in_autocast_type(x: torch.Tensor, *others: torch.Tensor | None) -> list[Any]:
    """Return inputs ``x`` and what they are computed with, in the type of :func:`autocast_dtype`."""
    dtype = autocast_dtype(x)
    return [t if t is None or dtype is None else t.to(dtype) for t in (x, *others)]


def learns(*tensors: torch.Tensor | None) -> bool:
    """Return whether what is computed of these tensors needs gradients."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
