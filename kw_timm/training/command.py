"""``kw-timm train``."""

import argparse
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from timm.utils.distributed import init_distributed_device_so

from ..files import new_file
from . import state as states
from .loop import Interrupted, Training, options_of
from .options import resolve

__all__ = ['device_of', 'run_train']


def device_of(asked: str | None) -> tuple[torch.device, int, int]:
    """Return the device of this process, its number, and how many there are; joins the others under torchrun."""
    found = init_distributed_device_so(asked or ('cuda' if torch.cuda.is_available() else 'cpu'))
    return torch.device(found['device']), found['global_rank'], found['world_size']


def run_train(options: argparse.Namespace) -> int:
    """Train as the options say.

    Returns:
        Exit code 0, or 130 if it was stopped.

    Raises:
        ValueError: For what the user can set right.
        OSError: If what was trained could not be saved.
    """
    recipe, settings = resolve(options)
    output = settings.output
    resumed = settings.resume
    if resumed is not None:
        resumed = output / states.LAST if not resumed.name else resumed
    elif (output / states.LAST).exists():
        raise ValueError(f"'{output}' holds a run already: go on with --resume, or choose another --output.")
    device, rank, world = device_of(settings.device)
    try:
        if rank == 0:
            for left in output.glob('.*.incomplete*'):  # By a process that was killed.
                left.unlink()
        training = Training(recipe, settings, device, rank, world)
        if resumed is not None:
            training.resume(resumed)
        if rank == 0:
            output.mkdir(parents=True, exist_ok=True)
            _write_options(options_of(recipe, settings, world), output)
            print(
                f'{settings.model}: {training.batches} batches of {settings.batch_size} images an epoch and process, '
                f'learning rate {training.lr:.4g} at {training.images_per_step} images a step; {device}, {world} '
                f"process{'es' * (world > 1)}; everything goes to '{output}'.",
                file=sys.stderr,
            )
        at = training.run()
    except Interrupted as error:
        print(f'kw-timm: {error}', file=sys.stderr)
        return 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if rank == 0:
        best = output / states.BEST
        print(f"Done: best top-1 {at.best:.2f} % after epoch {at.best_epoch + 1}, in '{best}'.", file=sys.stderr)
    return 0


def _write_options(values: dict[str, object], output: Path) -> None:
    with new_file(output / 'args.yaml') as filling:
        # JSON, value by value, is YAML.
        filling.write_text(''.join(f'{key}: {json.dumps(value)}\n' for key, value in values.items()))
