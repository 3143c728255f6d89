"""Several processes on CPUs, the same for both generations of MMDetection."""

import functools
from typing import Any

import torch
import torch.distributed as dist

__all__ = ['start_on_cpus']


def start_on_cpus(module: Any) -> None:
    """Let OpenMMLab's ``init_dist`` work without a GPU: over gloo where a config asks for nccl.

    Args:
        module: The module that defines ``init_dist`` and ``_init_dist_pytorch``, which chooses a GPU first.
    """
    original = module._init_dist_pytorch
    if hasattr(original, '__wrapped__'):
        return

    @functools.wraps(original)
    def init_dist_pytorch(backend: str, **kwargs: Any) -> None:
        if torch.cuda.device_count():
            original(backend, **kwargs)
        else:
            kwargs.pop('init_backend', None)  # mmengine's choice of a library; here it is always torch
            dist.init_process_group('gloo' if backend == 'nccl' else backend, **kwargs)

    module._init_dist_pytorch = init_dist_pytorch
