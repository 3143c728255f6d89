"""Measuring one configuration: every mode made ready, checked, timed in alternation, its peak memory taken."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .. import mixing_work
from .cases import Case, Prepared
from .errors import is_out_of_memory
from .machine import Machine
from .measure import Timing, alternate, peak_memory, relative_difference
from .results import Result, bound

__all__ = ['Settings', 'run_case']

# Differences beyond these are more than rounding.
TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.05}
# Of gradients more, which jump where rounding switches a ReLU.
GRADIENT_TOLERANCES = {torch.float64: 1e-6, torch.float32: 0.05, torch.bfloat16: 0.5, torch.float16: 0.3}


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        device: Where.
        dtype: Type of weights and images.
        rounds: Least number of times that each mode is timed.
        min_time: Rounds go on until they took this many seconds.
        warmup: Rounds beforehand that are not counted.
    """

    device: torch.device
    dtype: torch.dtype
    rounds: int = 7
    min_time: float = 0.0
    warmup: int = 2


class _Modes:
    """The modes of a configuration that work so far; one that does not is left out, and the others go on."""

    def __init__(self, case: Case, settings: Settings, say: Callable[[str], None]) -> None:
        self.case = case
        self.say = say
        self.device = settings.device
        self.tolerance = (GRADIENT_TOLERANCES if case.training else TOLERANCES)[settings.dtype]
        self.expected: list[torch.Tensor] | None = None
        self.ready: dict[str, Prepared] = {}
        self.preparation: dict[str, float] = {}
        self.difference: dict[str, float | None] = {}
        self.memory: dict[str, int] = {}
        self.complete = True

    def attempt(self, action: Callable[[str], None], mode: str) -> None:
        """Do something with a mode, and leave it out if memory does not suffice."""
        try:
            action(mode)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self.leave_out(mode, 'out of memory. A smaller batch or size needs less.')
            if self.device.type == 'cuda':
                torch.cuda.empty_cache()

    def leave_out(self, mode: str, why: str) -> None:
        self.ready.pop(mode, None)
        self.complete = False
        self.say(f'{self.case}: {mode} is left out: {why}')

    def prepare(self, mode: str) -> None:
        start = time.perf_counter()
        self.ready[mode] = self.case.modes[mode]()
        self.preparation[mode] = time.perf_counter() - start
        if self.ready[mode].note:
            self.say(f'{mode}, made ready in {self.preparation[mode]:.1f} s: {self.ready[mode].note}')

    def compute_expected(self) -> None:
        """Compute the straightforward result, unless memory does not suffice for it."""
        torch.manual_seed(0)
        try:
            # Copies, because gradients may be added to in place.
            self.expected = [tensor.clone() for tensor in self.case.reference()]
        except Exception as error:
            if not is_out_of_memory(error):
                raise

    def check(self, mode: str) -> None:
        """Run a mode for the first time and hold its result against the straightforward one."""
        torch.manual_seed(0)
        found = self.ready[mode].check_call()
        self.difference[mode] = None
        if not all(bool(tensor.isfinite().all()) for tensor in found):
            self.leave_out(mode, 'its results are not finite.')
        elif mode == 'static':
            shapes = [tensor.shape for tensor in found]
            if self.expected and not self.case.training and shapes != [tensor.shape for tensor in self.expected]:
                self.leave_out(mode, 'its outputs have other shapes than those of the KW network.')
        elif self.expected is not None:
            self.difference[mode] = difference = relative_difference(found, self.expected, self.case.training)
            if not difference <= self.tolerance:
                self.say(f'{self.case}: warning: {mode} differs from straightforward by {difference:.1e}, relative')

    def measure_memory(self, mode: str) -> None:
        self.memory[mode] = peak_memory(self.ready[mode].memory_call, self.device)


def run_case(
    case: Case,
    settings: Settings,
    machine: Machine,
    command: str = '',
    say: Callable[[str], None] = print,
    progress: Callable[[str], None] = lambda _: None,
) -> tuple[list[Result], bool]:
    """Measure one configuration.

    Args:
        case: What to measure.
        settings: How.
        machine: Where, and its limits.
        command: Command line to record.
        say: Told what the user should know: how a network was optimized, a mode that had to be left out.
        progress: Told what is being done.

    Returns:
        A result per mode, and whether no mode had to be left out.
    """
    modes = _Modes(case, settings, say)
    for mode in case.modes:
        progress(f'{case}: preparing {mode}')
        modes.attempt(modes.prepare, mode)
    progress(f'{case}: checking')
    modes.compute_expected()
    for mode in tuple(modes.ready):
        modes.attempt(modes.check, mode)
    modes.expected = None
    calls = {mode: prepared.call for mode, prepared in modes.ready.items()}
    alternate(calls, settings.device, settings.warmup)
    timings = alternate(
        calls,
        settings.device,
        settings.rounds,
        settings.min_time,
        lambda done: progress(f'{case}: round {done}'),
    )
    progress(f'{case}: peak memory')
    for mode in tuple(modes.ready):
        modes.attempt(modes.measure_memory, mode)
    results = _results(case, modes, timings, machine, command)
    for prepared in modes.ready.values():
        prepared.network.zero_grad()
    return results, modes.complete


def _results(
    case: Case,
    modes: _Modes,
    timings: dict[str, Timing],
    machine: Machine,
    command: str,
) -> list[Result]:
    def ratio(above: float | None, below: float | None) -> float | None:
        return above / below if above is not None and below else None

    median = {mode: timing.median for mode, timing in timings.items()}
    work = limit = None
    if not case.training:
        fastest = modes.ready.get('optimized')
        work = mixing_work(fastest.network if fastest else case.network, case.batch)
        if 'static' in median:
            limit = bound(median['static'], work.flops, work.bytes, machine.gemm, machine.bandwidth)
    return [
        Result(
            *(case.variant, case.task, case.batch, *case.size, mode),
            seconds=timing.median,
            first_quartile=timing.quartiles[0],
            third_quartile=timing.quartiles[1],
            rounds=timing.rounds,
            speedup=ratio(median.get('straightforward'), timing.median),
            over_static=ratio(timing.median, median.get('static')),
            peak_memory=modes.memory.get(mode),
            difference=modes.difference[mode],
            bound=limit,
            over_bound=ratio(timing.median, limit) if mode != 'static' else None,
            mixing_flops=float(work.flops) if work else None,
            mixing_bytes=float(work.bytes) if work else None,
            preparation=modes.preparation[mode],
            machine=machine,
            command=command,
        )
        for mode, timing in timings.items()
    ]
