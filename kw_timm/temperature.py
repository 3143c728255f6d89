"""The temperature that blends the initial assignment into the attention while training begins."""

import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from .layers import KWAttention, KWLayer
from .layers.annealing import Annealing

__all__ = ['TemperatureSchedule', 'anneal', 'get_temperature', 'set_temperature']


def set_temperature(model: nn.Module, temperature: float) -> None:
    """Set the temperature of every KW layer of a model.

    Args:
        model: Network, or any wrapper that has it as a submodule (DDP, EMA, ``torch.compile``, a detector).
        temperature: 0 (pure attention) to 1 (each mixture is its initially assigned cell).

    Raises:
        ValueError: If the temperature is outside [0, 1], the model has no KW layer, or it anneals by itself.

    Example:
        >>> set_temperature(timm.create_model('kw1x_resnet18'), 0.5)
    """
    value = float(temperature)
    if not 0 <= value <= 1:
        raise ValueError(f'The temperature must lie in [0, 1], got {temperature!r}.')
    attentions = _attentions(model)
    if any(attention.annealing is not None for attention in attentions):
        raise ValueError(
            f'{type(model).__name__} anneals its temperature by itself, by its training passes (temperature_steps or '
            f'kw_timm.anneal), so nothing else can set it: leave TemperatureSchedule, TemperatureHook and '
            f'set_temperature out, or end it by kw_timm.anneal(model, None).'
        )
    for attention in attentions:
        attention.temperature = value


def get_temperature(model: nn.Module) -> float:
    """Return the temperature of a model's KW layers; of one that anneals by itself that of the pass last begun.

    Raises:
        ValueError: If the model has no KW layer, or its layers differ in temperature.
    """
    values = {
        attention.temperature if attention.annealing is None else attention.annealing.now(attention.training)
        for attention in _attentions(model)
    }
    if len(values) > 1:
        raise ValueError(f'The KW layers differ in temperature: {sorted(values)}. Set one with set_temperature.')
    return values.pop()


def anneal(model: nn.Module, steps: float | None) -> None:
    """Let a network anneal its temperature by itself: it counts its own training passes, no hook is needed.

    ``t = max(0, 1 - passes / steps)``; each call of ``model`` in training mode is a pass, counted from 1, every
    micro-batch of an accumulated step too. In evaluation mode the temperature is 0. So whatever calls it trains it
    as the published recipes do: timm's ``train.py``, Lightning, Accelerate, Transformers' ``Trainer``, MMDetection.

    The count is a buffer (``warehouses.training_passes``, int64). It comes back with a checkpoint's ``state_dict``, is
    moved, copied and broadcast as buffers are, and is absent where nothing anneals: weights with and without it load
    into networks with and without it, strictly too. It is no weight: :func:`~kw_timm.load_checkpoint` leaves it out, as
    does whatever publishes weights. It is counted within ``torch.compile``'s graph, and once per pass with gradient
    checkpointing. On a CPU nothing is left of it once the temperature is 0; on a device, where reading the count would
    wait, and in a compiled graph layers go on blending with 0, which ``anneal(model, None)`` ends.

    Begin and end it before copies are made (EMA; a copy counts by itself and computes at 0 in evaluation) and before
    wrapping (DDP, ``torch.compile``). It excludes other ways of setting the temperature: :class:`TemperatureSchedule`,
    MMDetection's ``TemperatureHook`` and :func:`set_temperature` raise ``ValueError`` for such a network.

    Args:
        model: The module that is called, with KW layers within: a network, a feature extractor, a detector. The calls
            of modules around or within it do not count.
        steps: Passes until the temperature is 0, for the published recipes 20 epochs (15 for MobileNetV2), in batches
            of one process. A network that anneals already begins anew. None ends annealing, at temperature 0.

    Raises:
        ValueError: If the model has no KW layer, or ``steps`` is not positive.

    Example:
        >>> model = timm.create_model('kw1x_resnet18', init='published')
        >>> anneal(model, steps=20 * len(loader))  # or timm.create_model(..., temperature_steps=20 * len(loader))
    """
    if steps is not None and not 0 < float(steps) < math.inf:
        raise ValueError(f'steps must be a number of training passes above 0, or None to end annealing, got {steps!r}.')
    attentions = _attentions(model)
    for running in dict.fromkeys(attention.annealing for attention in attentions):
        if running is not None:
            running.end()
    if steps is not None:
        Annealing(model, _keeper(model), attentions, float(steps))


def _keeper(model: nn.Module) -> nn.Module:
    """Return the warehouses of the first network within a model; of one that was made by hand the model itself."""
    shared = [module.__dict__['warehouse'] for module in model.modules() if isinstance(module, KWLayer)]
    groups = (module for module in model.modules() if isinstance(module, nn.ModuleDict))
    return next((group for group in groups if any(cells in group.values() for cells in shared)), model)


class TemperatureSchedule:
    """Anneals the temperature linearly from 1 to 0, one call of :meth:`step` per optimizer step.

    ``t = max(0, 1 - step / (epochs * steps_per_epoch))`` with ``step`` counted from 1. The published recipes take 20
    epochs (15 for MobileNetV2).

    For those who want the reins; :func:`anneal` needs no call per step, and excludes this.

    Args:
        model: Network, or a wrapper around it.
        epochs: Epochs until the temperature is 0.
        steps_per_epoch: Optimizer steps per epoch.

    Raises:
        ValueError: If the model has no KW layer or anneals by itself, or a length is not positive.

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
