"""What is measured: one configuration, how it is computed in each mode, and what is found out about it."""

import difflib
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import nn

from .. import mixing_work, optimization_report, optimize_for_inference
from ..layers import straightforward
from ..random_weights import drawn_images, fit_norms, settle
from .measure import Settings, alternate, peak_memory, quartiles, relative_difference
from .peers import PEERS, describe_peers, with_peers
from .results import Machine, Result, bound
from .runtimes import RUNTIMES, ExportedNetwork, check_runtimes, stored_bytes

__all__ = ['MODES', 'OWN_MODES', 'STORED', 'Case', 'check_modes', 'network_cases', 'run_case', 'static_name']

# Those of a benchmark that names none.
OWN_MODES = ('static', 'straightforward', 'default', 'optimized')
STORED = {'optimized-bfloat16': torch.bfloat16, 'optimized-int8': torch.int8}  # how cells and bases are stored
MODES = (*OWN_MODES, *STORED, *PEERS, *RUNTIMES)
# Not for training.
FIXED = ('optimized', *STORED, *RUNTIMES)
# Do not compute what the KW network does.
OTHERS = ('static', *PEERS)
# Differences beyond these are more than rounding; of gradients more, which jump where rounding switches a ReLU.
TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.05}
GRADIENT_TOLERANCES = {torch.float64: 1e-6, torch.float32: 0.05, torch.bfloat16: 0.5, torch.float16: 0.3}
STORED_TOLERANCES = {torch.bfloat16: 0.2, torch.int8: 0.5}
# torch has no type of error for the CPU's memory.
OUT_OF_MEMORY = re.compile("can't allocate memory|not enough memory|out of memory", re.IGNORECASE)


@dataclass(frozen=True)
class Case:
    """One configuration: a forward pass, or a training step, forward and backward without the optimizer's step."""

    variant: str  # the KW network's name
    task: str  # what is done, 'inference' for instance
    batch: int  # images
    size: tuple[int, int]  # their height and width in pixels
    kw: nn.Module  # KW network, or what contains one
    static: nn.Module  # the same of the static network; needed for that mode
    compute: Callable[[nn.Module], Any]  # a network's outputs, a tensor or several; in training its loss
    modes: Sequence[str]
    training: bool = False
    memory_budget: int | str | None = None  # of optimize_for_inference

    def __str__(self) -> str:
        return f'{self.variant}, {self.task}, batch {self.batch}, {self.size[0]} x {self.size[1]}'

    def run(self, mode: str, network: nn.Module, check: bool = False, keep_gradients: bool = False) -> Sequence[Any]:
        """Compute once in a mode, and return the output tensors, or the loss and all gradients.

        A step to ``check`` is in eval mode: through BatchNorms of a few random values, rounding grows to percents.
        Memory of gradients that is kept from the step before does not count as new.
        """
        with straightforward() if mode == 'straightforward' else nullcontext():
            if not self.training:
                with torch.inference_mode():
                    outputs = self.compute(network)
                return [outputs] if isinstance(outputs, torch.Tensor) else outputs
            network.train(not check)
            network.zero_grad(set_to_none=not keep_gradients)
            loss = self.compute(network)
            loss.backward()
        return [loss.detach(), *(p.grad for p in network.parameters() if p.grad is not None)]


def check_modes(modes: Sequence[str], settings: Settings) -> None:
    """Raise ValueError if modes are asked for that cannot be measured here, or not with these settings."""
    check_runtimes(modes, settings)
    dtype = str(settings.dtype).removeprefix('torch.')
    for mode in (mode for mode in modes if mode in STORED and dtype != 'float32'):
        raise ValueError(
            f'--modes {mode} is measured in float32, of which it stores cells; leave it out, or --dtype {dtype}.'
        )


def static_name(variant: str) -> str:
    """Return timm's name of the static network of a KW variant; raise ValueError if there is no such variant."""
    known = timm.list_models('kw*')
    if variant not in known:
        close = difflib.get_close_matches(variant, known, n=3, cutoff=0.5)
        hint = f'Did you mean {" or ".join(close)}?' if close else f'There are: {", ".join(known)}.'
        raise ValueError(f"There is no KW network '{variant}'. {hint}")
    return variant.partition('_')[2]


def network_cases(
    variant: str,
    modes: Sequence[str],
    inference: Sequence[tuple[int, tuple[int, int]]],
    training: Sequence[tuple[int, tuple[int, int]]],
    features_only: bool,
    settings: Settings,
    memory_budget: int | str | None = None,
) -> Iterator[Case]:
    """Yield a variant's configurations: forward passes, then training steps of so many images of that size.

    With ``features_only``, networks are extractors of the multi-scale features that a detector uses.
    """

    def make(name: str, **levels: Any) -> nn.Module:
        network = timm.create_model(name, features_only=features_only, **levels)
        return settle(network.to(settings.device)).to(settings.dtype)

    torch.manual_seed(0)
    kw: Any = make(variant)
    levels = {'out_indices': tuple(kw.feature_info.out_indices)} if features_only else {}
    static = make(static_name(variant), **levels) if 'static' in modes else kw
    for is_training, sizes in ((False, inference), (True, training)):
        task = ' '.join(['features'] * features_only + ['training step'] * is_training) or 'inference'
        own = [mode for mode in modes if not (is_training and mode in FIXED)]
        for batch, size in sizes:
            x = drawn_images(batch, size).to(settings.device, settings.dtype)
            labels = _labels(1 if features_only else kw.num_classes, x) if is_training else None
            compute = partial(_compute, x, labels)
            yield Case(variant, task, batch, size, kw, static, compute, own, is_training, memory_budget)


def _labels(classes: int, x: torch.Tensor) -> torch.Tensor:
    """Draw labels beforehand: a step that copies them to a GPU would wait for it."""
    return torch.randint(classes, (len(x),), generator=torch.Generator().manual_seed(2)).to(x.device)


def _compute(x: torch.Tensor, labels: torch.Tensor | None, network: nn.Module) -> Any:
    """Return outputs, or with labels a loss: cross entropy of logits, the mean square of features."""
    outputs = network(x)
    if labels is None:
        return outputs
    if not isinstance(outputs, torch.Tensor):
        return torch.stack([feature.square().mean() for feature in outputs]).mean()
    return F.cross_entropy(outputs, labels)


def run_case(
    case: Case,
    settings: Settings,
    machine: Machine,
    command: str = '',
    say: Callable[[str], None] = print,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Result]:
    """Measure one configuration: a result per mode; one that cannot be measured is left out, and the others go on.

    ``say`` is told what the user should know, ``progress`` what is being done; ``command`` is recorded.
    """
    networks: dict[str, nn.Module] = {}
    facts: dict[str, dict[str, Any]] = {}
    expected: Sequence[torch.Tensor] = ()
    tolerance = (GRADIENT_TOLERANCES if case.training else TOLERANCES)[settings.dtype]
    tolerances = {mode: STORED_TOLERANCES[storage] for mode, storage in STORED.items()}
    # The straightforward result comes first: the others are held against it.
    for mode in dict.fromkeys(['straightforward', *case.modes]):
        progress(f'{case}: trying {mode}')
        try:
            networks[mode], found, facts[mode] = _try(case, mode, settings.device)
            problem = '' if all(bool(tensor.isfinite().all()) for tensor in found) else 'its results are not finite.'
        except (MemoryError, RuntimeError) as error:
            problem = _excuse(error)
        if problem:
            if mode in case.modes:
                say(f'{case}: {mode} is left out: {problem}')
            networks.pop(mode, None)
            continue
        if mode == 'straightforward':
            expected = found
        if mode not in OTHERS and expected:
            facts[mode]['difference'] = difference = relative_difference(found, expected, jointly=case.training)
            if not difference <= tolerances.get(mode, tolerance):
                say(f'{case}: warning: {mode} differs from straightforward by {difference:.1e}, relative')
        if mode in ('optimized', *STORED):
            say(f'{mode}, made ready in {facts[mode]["preparation"]:.1f} s: {optimization_report(networks[mode])}')
        if mode in PEERS:
            say(f'{mode}: {describe_peers(networks[mode])}')
    expected = found = ()
    calls = {mode: partial(case.run, mode, networks[mode]) for mode in case.modes if mode in networks}
    for mode, call in list(calls.items()) if case.training else ():
        # Not before: a step in train mode changes the statistics of BatchNorms, with which others are checked.
        try:
            facts[mode]['peak_memory'], _ = peak_memory(partial(call, keep_gradients=True), settings.device)
        except (MemoryError, RuntimeError) as error:
            say(f'{case}: {mode} is left out: {_excuse(error)}')
            calls.pop(mode)
            networks[mode].zero_grad()
    times = alternate(calls, settings, lambda done: progress(f'{case}: round {done}'))
    for network in networks.values():
        network.zero_grad()

    static, plain = (quartiles(times[mode])[1] if mode in times else None for mode in ('static', 'straightforward'))
    work = mixing_work(networks.get('optimized', case.kw), case.batch) if times and not case.training else None
    limit = bound(static, work.flops, work.bytes, machine.gemm, machine.bandwidth) if static and work else None
    for mode, own in times.items():
        first, median, third = quartiles(own)
        facts[mode] |= dict(seconds=median, first_quartile=first, third_quartile=third, rounds=len(own))
        speedup = plain / median if plain and mode not in PEERS else None
        facts[mode] |= dict(speedup=speedup, over_static=static and median / static)
        # The bound reads what float32 takes.
        facts[mode] |= dict(
            bound=limit, over_bound=median / limit if limit and mode not in (*OTHERS, *STORED) else None
        )
        facts[mode] |= dict(mixing_flops=work and float(work.flops), mixing_bytes=work and float(work.bytes))
    what = (case.variant, case.task, case.batch, *case.size)
    return [Result(*what, mode, machine=machine, command=command, **facts[mode]) for mode in times]


def _excuse(error: Exception) -> str:
    """Return why a mode is left out; raise what is no want of memory."""
    if not isinstance(error, MemoryError) and not OUT_OF_MEMORY.search(str(error)):
        raise error
    torch.cuda.empty_cache()
    return 'out of memory. A smaller batch or size needs less.'


def _try(case: Case, mode: str, device: torch.device) -> tuple[nn.Module, Sequence[torch.Tensor], dict[str, Any]]:
    """Make a mode ready and run it for the first time; return its network, results, and what else is to be known."""
    start = time.perf_counter()
    if mode in ('optimized', *STORED):
        limits: dict[str, Any] = dict(batch_size=case.batch, memory_budget=case.memory_budget)
        network = optimize_for_inference(case.kw, **limits, storage=STORED.get(mode))
    elif mode in PEERS:
        network = with_peers(case.kw, mode)
        fit_norms(network, drawn_images(4, (128, 128)).to(next(network.parameters())))
    elif mode in RUNTIMES:
        network = ExportedNetwork(case.kw.eval(), mode, (case.batch, *case.size))
    else:
        network = (case.static if mode == 'static' else case.kw).eval()
    preparation = time.perf_counter() - start
    torch.manual_seed(0)
    memory, found = peak_memory(partial(case.run, mode, network, check=True), device)
    found = [tensor.clone() for tensor in found]  # The next step adds to gradients in place.
    facts = {'preparation': preparation, 'difference': None, 'stored_bytes': stored_bytes(network)}
    # Other runtimes allocate for themselves, unseen by torch.
    return network, found, facts | {'peak_memory': None if mode in RUNTIMES else memory}
