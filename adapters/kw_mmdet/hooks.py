"""Training hooks."""

from typing import Any

from kw_timm import set_temperature

from .generation import HOOKS, Hook, steps_per_epoch

__all__ = ['TemperatureHook']


@HOOKS.register_module()
class TemperatureHook(Hook):
    """Anneal the temperature of a KW backbone linearly from 1 to 0 over the first epochs.

    For training from random weights; the published detectors start from ImageNet weights and keep 0. The temperature
    follows from the iteration, so a resumed training goes on where it was. ``custom_hooks = [dict(type=
    'TemperatureHook', epochs=2)]``.

    Between two training steps it is 0, so that whatever evaluates, by epochs or by iterations, does it at 0, as weights
    are used. When training begins the hook therefore moves behind all others, and one that ends the steps goes right
    behind those that take them; no ``priority`` needs to be given.

    A backbone that anneals by itself (``temperature_steps``) needs no hook; with both, the first step raises
    ``ValueError``.

    Args:
        epochs: Epochs until the temperature is 0.

    Raises:
        ValueError: If ``epochs`` is not positive, or (when training begins) the model has no KW layer.
    """

    def __init__(self, epochs: float) -> None:
        if epochs <= 0:
            raise ValueError(f'epochs of TemperatureHook must be above 0, got {epochs!r}.')
        self.epochs = epochs

    def before_run(self, runner: Any) -> None:
        """Take the last place among the hooks, so that no evaluation comes between this one and its step."""
        hooks = [hook for hook in runner.hooks if hook is not self and not isinstance(hook, _EndOfStep)]
        end = _EndOfStep()
        # What registering sets; hooks that are registered later are compared with it.
        end.priority = getattr(self, 'priority', None)
        place = max((i + 1 for i, hook in enumerate(hooks) if _takes_steps(hook)), default=0)
        # A new list: the runner is going through the old one.
        runner._hooks = [*hooks[:place], end, *hooks[place:], self]

    def before_train_iter(self, runner: Any, *_: Any, **__: Any) -> None:
        """Set the temperature of the step about to be taken; steps count from 1."""
        steps = self.epochs * steps_per_epoch(runner)
        set_temperature(runner.model, max(0.0, 1 - (runner.iter + 1) / steps))

    def after_run(self, runner: Any) -> None:
        """Leave the model at temperature 0, however short the training was."""
        set_temperature(runner.model, 0.0)

    def before_val_epoch(self, runner: Any) -> None:
        """Evaluate at temperature 0, as weights are used."""
        set_temperature(runner.model, 0.0)


class _EndOfStep(Hook):
    """Sets the temperature to 0 behind every training step."""

    priority: Any

    def after_train_iter(self, runner: Any, *_: Any, **__: Any) -> None:
        set_temperature(runner.model, 0.0)


def _takes_steps(hook: Any) -> bool:
    """Say whether a hook goes backward: mmcv's do so after the iteration, and checkpoints are computed again."""
    return any(kind.__name__ == 'OptimizerHook' for kind in type(hook).__mro__)
