"""Top-1 and top-5 of a network over a loader."""

import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from timm.task import ClassificationEvaluator, evaluation_sample_limit
from torch import nn

from .data import batches

__all__ = ['evaluate']


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Any,
    device: torch.device,
    computing: AbstractContextManager[Any] | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
    progress: str | None = None,
) -> dict[str, float]:
    """Evaluate a network in evaluation mode, that is at temperature 0; of several processes each has the result.

    Args:
        model: Network; its mode is left as it was.
        loader: Loader of images and classes.
        device: Where to compute.
        computing: Entered around each batch: mixed precision.
        memory_format: Layout of images.
        progress: What to call a bar; None for none.

    Returns:
        ``loss``, ``top1`` and ``top5`` in percent, ``images`` and ``images_per_s`` (computing alone, of this process,
        without the first batch).
    """
    from tqdm import tqdm

    evaluator = ClassificationEvaluator(device=device, max_samples=evaluation_sample_limit(loader))
    modes = {module: module.training for module in model.modules()}
    model.eval()
    seconds, images = 0.0, 0
    try:
        for i, (x, target) in enumerate(tqdm(batches(loader), total=len(loader), desc=progress, disable=not progress)):
            x = x.contiguous(memory_format=memory_format)
            _wait(device)
            begun = time.perf_counter()
            with computing or nullcontext():
                output = model(x)
            _wait(device)
            if i:
                seconds, images = seconds + time.perf_counter() - begun, images + len(x)
            evaluator.update(output, target)
    finally:
        for module, mode in modes.items():
            module.training = mode
    found = evaluator.compute(distributed=torch.distributed.is_initialized())
    return {
        **{key: float(value) for key, value in found.items()},
        'images': float(evaluator.num_samples),
        'images_per_s': images / seconds if images else float('nan'),
    }


def _wait(device: torch.device) -> None:
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
