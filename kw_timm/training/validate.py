"""``kw-timm validate``: accuracies beside the published ones."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import timm
import torch
import torch.distributed as dist

from ..inference import optimize_for_inference
from ..pyramid import create_network
from ..tables import aligned
from .command import device_of
from .data import count_classes, loader_for, make_dataset
from .evaluate import evaluate
from .network import data_config, load_start
from .options import DEFAULTS
from .published import PUBLISHED

__all__ = ['run_validate', 'table']

_HEAD = ('network', 'top-1', 'published', 'difference', 'top-5', 'published', 'difference', 'images', 'images/s')


def run_validate(options: argparse.Namespace) -> int:
    """Evaluate as the options say, and print a table.

    Returns:
        Exit code 0, or 1 if networks of ``--all`` had to be left out.

    Raises:
        ValueError: For what the user can set right.
    """
    if options.all == bool(options.model):
        raise ValueError('Name a network, --model kw1x_resnet18 for instance, or give --all, not both.')
    if options.all and options.checkpoint:
        raise ValueError('--checkpoint goes with one --model, not with --all.')
    given = {key: value for key, value in vars(options).items() if value is not None}
    settings = argparse.Namespace(
        **{**DEFAULTS, 'data_dir': None, 'checkpoint': None, **given, 'model_dtype': options.precision}
    )
    dataset = make_dataset(settings, training=False)
    names = timm.list_models('kw*', pretrained=True, include_tags=False) if options.all else [options.model]
    names.sort(key=lambda name: list(PUBLISHED).index(name) if name in PUBLISHED else len(PUBLISHED))
    device, rank, _ = device_of(settings.device)
    rows, left_out = [], []
    try:
        for name in names:
            settings.model = name
            try:
                rows.append((name, _figures(dataset, settings, device, rank == 0)))
            except (ValueError, RuntimeError, OSError) as error:
                if not options.all:
                    raise ValueError(str(error)) from error
                left_out.append(f'{name}: {" ".join(str(error).split()):.200}')
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if rank == 0:
        print(table(rows))
        for line in left_out:
            print(f'left out: {line}', file=sys.stderr)
    return 1 if left_out else 0


def _figures(dataset: Any, settings: argparse.Namespace, device: torch.device, progress: bool) -> dict[str, float]:
    kwargs: dict[str, Any] = dict(settings.model_kwargs)
    found = count_classes(dataset)
    classes = settings.num_classes or (found if settings.checkpoint else None)
    if classes:
        kwargs['num_classes'] = classes
    network: Any = create_network(settings.model, pretrained=not settings.checkpoint, **kwargs)
    if settings.checkpoint:
        load_start(network, settings.checkpoint, whole=True)
    if found and found > network.num_classes:
        raise ValueError(f'The data has {found} classes, {settings.model} {network.num_classes}: they do not match.')
    is_theirs = settings.model.startswith('kw') or bool(settings.checkpoint)
    config = data_config(network, settings, published=is_theirs)
    network = network.eval().to(device, getattr(torch, settings.precision))
    if settings.optimized:
        network = optimize_for_inference(network, batch_size=settings.batch_size)
    loader = loader_for(dataset, config, settings, None, device)
    return evaluate(network, loader, device, progress=settings.model if progress else None)


def table(rows: Sequence[tuple[str, dict[str, float]]]) -> str:
    """Return a table of networks' figures, with the published ones of those that have some."""
    lines = [_HEAD]
    for name, found in rows:
        published = PUBLISHED.get(name.partition('.')[0])
        cells = [name]
        for i, key in enumerate(('top1', 'top5')):
            told = ('', '') if published is None else (f'{published[i]:.2f}', f'{found[key] - published[i]:+.2f}')
            cells += [f'{found[key]:.2f}', *told]
        lines.append((*cells, f'{found["images"]:.0f}', f'{found["images_per_s"]:.1f}'))  # type: ignore[arg-type]
    return aligned(lines)
