"""What mmengine lacks, mostly for several processes on CPUs. Each bridge does nothing where nothing is missing."""

import functools
from typing import Any

import mmengine.dist.utils as mmengine_dist
import mmengine.runner.checkpoint as mmengine_checkpoint
import torch
from mmengine.device import get_device
from mmengine.model import MMDistributedDataParallel

from ..processes import start_on_cpus

__all__ = ['apply']


def apply() -> None:
    """Apply the bridges that are needed here. Importing ``kw_mmdet`` runs it; a second time changes nothing."""
    # onedl-mmengine unpickles whatever it may not; and the list that it allows goes afterwards, ours with it.
    if hasattr(mmengine_checkpoint, '_safe_torch_load'):
        mmengine_checkpoint._safe_torch_load = functools.partial(torch.load, weights_only=True)
    if get_device() == 'cpu':
        start_on_cpus(mmengine_dist)
        _wrap_on_cpus()


def _wrap_on_cpus() -> None:
    # The runner always names a GPU, which torch refuses for a module on the CPU.
    original = MMDistributedDataParallel.__init__
    if hasattr(original, '__wrapped__'):
        return

    @functools.wraps(original)
    def __init__(self: Any, module: torch.nn.Module, *args: Any, device_ids: Any = None, **kwargs: Any) -> None:
        if all(parameter.device.type == 'cpu' for parameter in module.parameters()):
            device_ids = None
        original(self, module, *args, device_ids=device_ids, **kwargs)

    MMDistributedDataParallel.__init__ = __init__
