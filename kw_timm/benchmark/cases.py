"""What is measured: one configuration, its modes, and how each mode is called."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .. import optimization_report, optimize_for_inference
from ..layers import straightforward
from .measure import Call
from .networks import drawn_images, make_networks

__all__ = ['MODES', 'TRAINING_MODES', 'Case', 'Prepared', 'inference_case', 'network_cases', 'training_case']

MODES = ('static', 'straightforward', 'default', 'optimized')
TRAINING_MODES = MODES[:3]

Size = tuple[int, int]


@dataclass(frozen=True)
class Prepared:
    """A mode that is ready to run.

    Attributes:
        call: What is timed.
        memory_call: What peak memory is measured of.
        check_call: What is compared with the straightforward result.
        network: The network that it runs.
        note: What is to be told of the preparation.
    """

    call: Call
    memory_call: Call
    check_call: Call
    network: nn.Module
    note: str = ''


@dataclass(frozen=True)
class Case:
    """One configuration.

    Attributes:
        variant: Name of the KW network.
        task: What is done, ``'inference'`` for instance.
        batch: Images.
        size: Height and width of the images in pixels.
        modes: Makes a mode ready, by the mode's name.
        reference: The straightforward computation, which every mode but the static one must agree with.
        training: Whether gradients are compared, and there is no bound.
        network: The KW network.
    """

    variant: str
    task: str
    batch: int
    size: Size
    modes: Mapping[str, Callable[[], Prepared]]
    reference: Call
    training: bool
    network: nn.Module

    def __str__(self) -> str:
        """Name of the configuration."""
        return f'{self.variant}, {self.task}, batch {self.batch}, {self.size[0]} x {self.size[1]}'


def network_cases(
    variant: str,
    modes: Sequence[str],
    batches: Sequence[int],
    size: Size,
    train_batches: Sequence[int],
    train_size: Size,
    features_only: bool,
    device: torch.device,
    dtype: torch.dtype,
    memory_budget: int | str | None = None,
) -> Iterator[Case]:
    """Yield the configurations of one variant as a timm network: inference of every batch, then training steps.

    Args:
        variant: Name of the KW network.
        modes: Modes to measure.
        batches: Images of each inference.
        size: Height and width of its images in pixels.
        train_batches: Images of each training step.
        train_size: Height and width of its images in pixels.
        features_only: Extractors of multi-scale features rather than classifiers.
        device: Where.
        dtype: Type of weights and images.
        memory_budget: See :func:`kw_timm.optimize_for_inference`.
    """
    kw, static = make_networks(variant, features_only, 'static' in modes, device, dtype)
    kind = 'features' if features_only else 'inference'
    for batch in batches:
        x = drawn_images(batch, size).to(device, dtype)
        yield inference_case(variant, kind, kw, static, batch, size, modes, partial(_outputs, x), memory_budget)
    kind = 'features training step' if features_only else 'training step'
    for batch in train_batches:
        x = drawn_images(batch, train_size).to(device, dtype)
        yield training_case(variant, kind, kw, static, batch, train_size, modes, partial(_loss, x))


def inference_case(
    variant: str,
    task: str,
    kw: nn.Module,
    static: nn.Module | None,
    batch: int,
    size: Size,
    modes: Sequence[str],
    forward: Callable[[nn.Module], Any],
    memory_budget: int | str | None = None,
) -> Case:
    """Return the configuration of a forward pass.

    Args:
        variant: Name of the KW network.
        task: What to call it.
        kw: KW network, or what contains one.
        static: The same of the static network; needed for that mode.
        batch: Images.
        size: Their height and width in pixels.
        modes: Modes to measure.
        forward: Computes a network's outputs, a tensor or several.
        memory_budget: See :func:`kw_timm.optimize_for_inference`.
    """

    def prepared(
        network: nn.Module, context: Callable[[], AbstractContextManager[Any]] = nullcontext, note: str = ''
    ) -> Prepared:
        network.eval()

        def call() -> Sequence[torch.Tensor]:
            with torch.inference_mode(), context():
                outputs = forward(network)
            return [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)

        return Prepared(call, call, call, network, note)

    def optimized() -> Prepared:
        network = optimize_for_inference(kw, batch_size=batch, memory_budget=memory_budget)
        return prepared(network, note=str(optimization_report(network)))

    ways = _ways(prepared, kw, static) | {'optimized': optimized}
    chosen = {mode: ways[mode] for mode in modes}
    return Case(variant, task, batch, size, chosen, prepared(kw, straightforward).check_call, False, kw)


def training_case(
    variant: str,
    task: str,
    kw: nn.Module,
    static: nn.Module | None,
    batch: int,
    size: Size,
    modes: Sequence[str],
    loss: Callable[[nn.Module], torch.Tensor],
) -> Case:
    """Return the configuration of a training step: forward and backward, without the optimizer's step.

    Peak memory is that beyond parameters, buffers and gradients: it is measured with the gradients' memory in place.
    Gradients are compared in eval mode: through BatchNorms of a few random values, rounding grows to percents.

    Args:
        variant: Name of the KW network.
        task: What to call it.
        kw: KW network, or what contains one.
        static: The same of the static network; needed for that mode.
        batch: Images.
        size: Their height and width in pixels.
        modes: Modes to measure; ``'optimized'`` is left out, since it is for inference only.
        loss: Computes a network's loss, a scalar.
    """

    def prepared(network: nn.Module, context: Callable[[], AbstractContextManager[Any]] = nullcontext) -> Prepared:
        def step(keep_gradients: bool = False, training: bool = True) -> Sequence[torch.Tensor]:
            network.train(training)
            network.zero_grad(set_to_none=not keep_gradients)
            with context():
                value = loss(network)
                value.backward()
            return [value.detach(), *(p.grad for p in network.parameters() if p.grad is not None)]

        return Prepared(step, lambda: step(keep_gradients=True), lambda: step(training=False), network)

    ways = _ways(prepared, kw, static)
    chosen = {mode: ways[mode] for mode in modes if mode in TRAINING_MODES}
    return Case(variant, task, batch, size, chosen, prepared(kw, straightforward).check_call, True, kw)


def _ways(
    prepared: Callable[..., Prepared], kw: nn.Module, static: nn.Module | None
) -> dict[str, Callable[[], Prepared]]:
    """Return what makes the modes ready that inference and training have in common."""
    ways: dict[str, Callable[[], Prepared]] = {
        'straightforward': partial(prepared, kw, straightforward),
        'default': partial(prepared, kw),
    }
    if static is not None:
        ways['static'] = partial(prepared, static)
    return ways


def _outputs(x: torch.Tensor, network: nn.Module) -> Any:
    return network(x)


def _loss(x: torch.Tensor, network: nn.Module) -> torch.Tensor:
    """Return the cross entropy of logits against drawn labels, or the mean square of features."""
    outputs = network(x)
    if not isinstance(outputs, torch.Tensor):
        return torch.stack([feature.square().mean() for feature in outputs]).mean()
    labels = torch.randint(outputs.shape[1], (len(outputs),), generator=torch.Generator().manual_seed(2))
    return F.cross_entropy(outputs, labels.to(outputs.device))
