"""The temperature that blends the initial assignment into the attention while training begins."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from .layers import KWAttention

__all__ = ['TemperatureSchedule', 'get_temperature', 'set_temperature']


def set_temperature(model: nn.Module, temperature: float) -> None:
    """Set the temperature of every KW layer of a model.

    Args:
        model: Network, or any wrapper that has it as a submodule (DDP, EMA, ``torch.compile``, a detector).
        temperature: 0 (pure attention) to 1 (each mixture is its initially assigned cell).

    Raises:
        ValueError: If the temperature is outside [0, 1], or the model has no KW layer.

    Example:
        >>> set_temperature(timm.create_model('kw1x_resnet18'), 0.5)
    """
    value = float(temperature)
    if not 0 <= value <= 1:
        raise ValueError(f'The temperature must lie in [0, 1], got {temperature!r}.')
    for attention in _attentions(model):
        attention.temperature = value


def get_temperature(model: nn.Module) -> float:
    """Return the temperature of a model's KW layers.

    Raises:
        ValueError: If the model has no KW layer, or its layers differ in temperature.
    """
    values = {attention.temperature for attention in _attentions(model)}
    if len(values) > 1:
        raise ValueError(f'The KW layers differ in temperature: {sorted(values)}. Set one with set_temperature.')
    return values.pop()


class TemperatureSchedule:
    """Anneals the temperature linearly from 1 to 0, one call of :meth:`step` per optimizer step.

    ``t = max(0, 1 - step / (epochs * steps_per_epoch))`` with ``step`` counted from 1. The published recipes take 20
    epochs (15 for MobileNetV2).

    Args:
        model: Network, or a wrapper around it.
        epochs: Epochs until the temperature is 0.
        steps_per_epoch: Optimizer steps per epoch.

    Raises:
        ValueError: If the model has no KW layer, or a length is not positive.

    Example:
        >>> schedule = TemperatureSchedule(model, epochs=20, steps_per_epoch=len(loader))
        >>> for images, labels in loader:
        ...     schedule.step()
        ...     loss = criterion(model(images), labels)
    """

    def __init__(self, model: nn.Module, epochs: float, steps_per_epoch: int) -> None:
        if epochs <= 0 or steps_per_epoch < 1:
            raise ValueError(
                f'epochs must be above 0 and steps_per_epoch at least 1, got {epochs!r} and {steps_per_epoch!r}.'
            )
        self.model = model
        self.total_steps = epochs * steps_per_epoch
        self.last_step = 0
        set_temperature(model, self.temperature)

    @property
    def temperature(self) -> float:
        """Temperature of the step last begun; 1 before the first."""
        return max(0.0, 1 - self.last_step / self.total_steps)

    def step(self) -> float:
        """Begin the next training step: set its temperature on the model and return it."""
        self.last_step += 1
        set_temperature(self.model, self.temperature)
        return self.temperature

    def state_dict(self) -> dict[str, Any]:
        """Return what resuming needs."""
        return {'last_step': self.last_step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`; sets the model's temperature too."""
        self.last_step = int(state['last_step'])
        set_temperature(self.model, self.temperature)


def _attentions(model: nn.Module) -> list[KWAttention]:
    attentions = [module for module in model.modules() if isinstance(module, KWAttention)]
    if not attentions:
        raise ValueError(
            f'{type(model).__name__} has no KW layer, so it has no temperature. Pass the network itself; a graph that '
            f'was traced or exported from it has its temperature fixed.'
        )
    return attentions
