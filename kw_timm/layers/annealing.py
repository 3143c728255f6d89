"""A network that counts its own training passes, and lets its layers' temperature fall with them."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from ..ops.modes import is_plain

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

__all__ = ['PASSES', 'Annealing', 'without_passes']

PASSES = 'training_passes'  # A warehouse's tensor has a name with a dot, so none is called that.

_backward = getattr(torch._C, '_current_graph_task_id', lambda: -1)
Value = TypeVar('Value')


class Annealing:
    """The temperature of a network's layers, ``max(0, 1 - passes / steps)``; passes are its calls in training mode.

    It listens to the calls of ``root``. The count is a buffer, so that it is saved, loaded, copied, moved, and compiled
    with the network; a pass that is computed again for its gradient is no new one, and has the temperature that it had.

    Attributes:
        temperature: That of the pass last begun; a tensor where reading it would wait for a device or stop a compiler.
            None before the first.

    Args:
        root: Module whose calls are counted.
        keeper: Module that gets the count, root's or one within: ``training_passes``, int64.
        layers: Modules with an attribute ``annealing``, which this becomes.
        steps: Passes until the temperature is 0.
    """

    def __init__(self, root: nn.Module, keeper: nn.Module, layers: Sequence[Any], steps: float) -> None:
        self.keeper, self.layers, self.steps, self.name = keeper, layers, steps, type(root).__name__
        self.temperature: float | torch.Tensor | None = None
        for layer in layers:
            layer.annealing, layer.temperature = self, 0.0
        device = next((p.device for p in root.parameters()), torch.device('cpu'))
        keeper.register_buffer(PASSES, torch.zeros((), dtype=torch.int64, device=device))
        self._handles: list[RemovableHandle] = [
            root.register_forward_pre_hook(self._begin),
            root.register_forward_hook(self._ready_for_backward),
            keeper.register_load_state_dict_pre_hook(self._before_loading),
        ]

    @property
    def passes(self) -> torch.Tensor:
        """How many training passes there were, ``()``, int64."""
        passes: torch.Tensor = getattr(self.keeper, PASSES)
        return passes

    def now(self, training: bool) -> float:
        """Return the temperature as a number: in training mode of the pass last begun, 1 before the first."""
        return max(0.0, 1 - int(self.passes) / self.steps) if training else 0.0

    def of_layer(self, training: bool) -> float | torch.Tensor:
        """Return the temperature that a layer is to compute with.

        Raises:
            RuntimeError: If the layer trains, but no call was counted.
        """
        if not training:
            return 0.0
        if self.temperature is None:
            raise RuntimeError(
                f'The temperature is annealed by the calls of {self.name}, which was not called, only a part of it. '
                f'Call it, or let kw_timm.anneal(module, steps) listen to the module that you do call.'
            )
        return self.temperature

    def end(self) -> None:
        """Stop counting, and drop the count."""
        for handle in self._handles:
            handle.remove()
        delattr(self.keeper, PASSES)
        for layer in self.layers:
            layer.annealing = None

    def _begin(self, root: nn.Module, _: Any) -> None:
        if not root.training or _is_computed_again():
            return
        passes = self.passes
        passes.add_(1)
        if is_plain(passes):
            self.temperature = self.now(True)
        else:
            wide = torch.float32 if passes.device.type == 'mps' else torch.float64
            self.temperature = (1 - passes.to(wide) / self.steps).clamp(min=0)

    def _ready_for_backward(self, root: nn.Module, _: Any, output: Any) -> None:
        """Let a backward pass, which may compute layers again, find the temperature of its own forward pass.

        Only several passes before one backward pass need it, but which come together is not known here.
        """
        temperature = self.temperature
        # To ask a tensor would wait for its device.
        is_zero = not isinstance(temperature, torch.Tensor) and temperature == 0
        if not root.training or torch.compiler.is_compiling() or _is_computed_again() or is_zero:
            return

        def again(_: torch.Tensor) -> None:
            self.temperature = temperature

        for tensor in _tensors(output):
            if tensor.requires_grad:
                tensor.register_hook(again)

    def _before_loading(self, keeper: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        """Go on counting where weights come without a count."""
        passes = self.passes
        state_dict.setdefault(prefix + PASSES, torch.zeros((), dtype=passes.dtype) if passes.is_meta else passes)


def without_passes(state_dict: Mapping[str, Value]) -> dict[str, Value]:
    """Return a state dict without the count of training passes, which is no weight."""
    return {key: value for key, value in state_dict.items() if key.rpartition('.')[2] != PASSES}


def _is_computed_again() -> bool:
    """Say whether this is within a backward pass, as a checkpoint's second computation is; no compiled one is."""
    return not torch.compiler.is_compiling() and _backward() != -1


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _tensors(value)
