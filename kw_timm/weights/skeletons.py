"""Networks without weights: what is asked of them are names and shapes."""

from collections.abc import Callable, Mapping
from typing import Any

import timm
import torch
from torch.overrides import TorchFunctionMode

__all__ = ['create_skeleton']

_DRAWN = (torch.Tensor.normal_, torch.Tensor.uniform_)


class _WithoutDrawing(TorchFunctionMode):
    """Draws no random numbers into tensors, which takes half of the time even where there are none to be filled."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        return args[0] if func in _DRAWN else func(*args, **(kwargs or {}))


def create_skeleton(name: str, **kwargs: Any) -> Any:
    """Create a timm network on the meta device; arguments as for ``timm.create_model``."""
    with torch.device('meta'), _WithoutDrawing():
        return timm.create_model(name, **kwargs)
