"""What mmcv 1.7 and MMDetection 2.28 lack with today's torch, and with several processes on CPUs.

Each bridge looks for what it mends, not for a version, and does nothing where that is not missing.
"""

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mmcv.parallel._functions as scattering
import mmcv.runner.dist_utils as mmcv_dist
import mmcv.utils.config as mmcv_config
import mmdet.apis.test as mmdet_test
import mmdet.apis.train as mmdet_train
import mmdet.utils
import torch
import torch.distributed as dist
from mmcv.parallel import MMDistributedDataParallel
from mmdet.utils import util_distribution

from ..processes import start_on_cpus

__all__ = ['apply']


class CPUDistributedDataParallel(MMDistributedDataParallel):
    """MMDistributedDataParallel of a detector on the CPU; opens DataContainers as MMDataParallel does there."""

    def train_step(self, *inputs: Any, **kwargs: Any) -> Any:
        """Take a training step's losses."""
        inputs, kwargs = self._opened(inputs, kwargs)
        return super().train_step(*inputs, **kwargs)

    def val_step(self, *inputs: Any, **kwargs: Any) -> Any:
        """Take a validation step's losses."""
        inputs, kwargs = self._opened(inputs, kwargs)
        return super().val_step(*inputs, **kwargs)

    def _run_ddp_forward(self, *inputs: Any, **kwargs: Any) -> Any:
        inputs, kwargs = self._opened(inputs, kwargs)
        return super()._run_ddp_forward(*inputs, **kwargs)

    def _opened(self, inputs: tuple, kwargs: dict) -> tuple[tuple, dict]:
        all_inputs, all_kwargs = self.scatter(inputs, kwargs, [-1])
        return all_inputs[0], all_kwargs[0]


def apply() -> None:
    """Apply the bridges that are needed here. Importing ``kw_mmdet`` runs it; a second time changes nothing."""
    _mend_forward()
    _mend_streams()
    _format_once()
    if mmdet.utils.get_device() == 'cpu':
        start_on_cpus(mmcv_dist)
        _wrap_on_cpus()
        _collect_on_cpus()


def _format_once() -> None:
    # A program asks for its config as text three times, and for the same text yapf takes seconds each time.
    format_code, formatted = mmcv_config.FormatCode, {}
    if hasattr(format_code, '__wrapped__'):
        return

    @functools.wraps(format_code)
    def remember(text: str, *args: Any, **kwargs: Any) -> Any:
        if text not in formatted:
            formatted[text] = format_code(text, *args, **kwargs)
        return formatted[text]

    mmcv_config.FormatCode = remember


def _mend_forward() -> None:
    # Read by `_run_ddp_forward`, in every distributed evaluation; torch has dropped it since.
    name = '_use_replicated_tensor_module'
    read = MMDistributedDataParallel._run_ddp_forward.__code__.co_names
    if name in read and not hasattr(MMDistributedDataParallel, name):
        MMDistributedDataParallel._use_replicated_tensor_module = False


def _mend_streams() -> None:
    # mmcv hands GPUs' indices to torch's `_get_stream`, which takes devices since: no batch would reach a GPU.
    try:
        scattering._get_stream(-1)
    except AttributeError:
        scattering._get_stream = _stream_of(scattering._get_stream)


def _stream_of(get_stream: Callable[[torch.device], Any]) -> Callable[[int], Any]:
    @functools.wraps(get_stream)
    def stream_of(index: int) -> Any:
        return get_stream(torch.device('cpu') if index < 0 else torch.device('cuda', index))

    return stream_of


def _wrap_on_cpus() -> None:
    if 'cpu' in util_distribution.ddp_factory:
        return
    util_distribution.ddp_factory['cpu'] = CPUDistributedDataParallel
    original = util_distribution.build_ddp

    @functools.wraps(original)
    def build_ddp(model: torch.nn.Module, device: str = 'cuda', *args: Any, **kwargs: Any) -> torch.nn.Module:
        if device != 'cpu':
            return original(model, device, *args, **kwargs)
        kwargs.pop('device_ids', None)  # torch refuses them for a module on the CPU
        return CPUDistributedDataParallel(model, *args, **kwargs)

    for module in (util_distribution, mmdet.utils, mmdet_train):
        module.build_ddp = build_ddp


def _collect_on_cpus() -> None:
    # Both ways to collect results put tensors on a GPU; given a folder, one of them does not.
    original = mmdet_test.collect_results_cpu
    if hasattr(original, '__wrapped__'):
        return

    @functools.wraps(original)
    def collect_results(part: list, size: int, tmpdir: str | None = None) -> list | None:
        if tmpdir is None:
            # In the working directory, as on GPUs: a file system that several machines share.
            folder: list[Any] = [None]
            if dist.get_rank() == 0:
                Path('.dist_test').mkdir(exist_ok=True)
                folder = [tempfile.mkdtemp(dir='.dist_test')]
            dist.broadcast_object_list(folder)
            tmpdir = folder[0]
        return original(part, size, tmpdir)

    mmdet_test.collect_results_cpu = mmdet_test.collect_results_gpu = collect_results
