"""Images: timm's data sets and loaders, and a generated set for trying; the same batches whenever an epoch is begun."""

import argparse
import math
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_dataset, create_loader
from timm.data.auto_augment import posterize
from torch import nn

from .recipes import Recipe

__all__ = [
    'DataError',
    'GeneratedImages',
    'batches',
    'count_classes',
    'loader_for',
    'make_dataset',
    'uniform_drop_path',
    'unreadable',
]


class DataError(ValueError):
    """Images could not be read."""


class GeneratedImages(torch.utils.data.Dataset):
    """Ten classes of striped images: the class is direction and colour, everything else is drawn by number.

    Args:
        count: Number of images.
        offset: Number of the first; sets that do not overlap have no image in common.
        size: Height and width in pixels.
    """

    classes = 10

    def __init__(self, count: int, offset: int = 0, size: int = 64) -> None:
        self.count, self.offset, self.size = count, offset, size
        self.transform: Any = None

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Any, int]:
        draw = np.random.default_rng(self.offset + index)
        target = (self.offset + index) % self.classes
        y, x = np.mgrid[: self.size, : self.size] / self.size
        angle = math.pi * (target % 5) / 5 + draw.normal(0, 0.06)
        waves = np.sin(2 * math.pi * (draw.uniform(3, 6) * (x * math.cos(angle) + y * math.sin(angle)) + draw.random()))
        weights = np.array([1.0, 0.5, 0.1] if target < 5 else [0.1, 0.5, 1.0])
        noisy = 0.5 + 0.35 * waves[..., None] * weights + draw.normal(0, 0.1, (self.size, self.size, 3))
        image = Image.fromarray((255 * noisy.clip(0, 1)).astype(np.uint8))
        return (image if self.transform is None else self.transform(image)), target


def make_dataset(settings: argparse.Namespace, training: bool) -> Any:
    """Return timm's data set for DATA, or a generated one without.

    Raises:
        DataError: If there is no such data.
    """
    if not settings.data_dir and not settings.dataset:
        count = settings.generated
        return GeneratedImages(count) if training else GeneratedImages(max(count // 4, 1), offset=count)
    split = settings.train_split if training else settings.val_split
    root = settings.data_dir if settings.dataset else _part(Path(settings.data_dir), split, training)
    try:
        dataset = create_dataset(
            settings.dataset,
            root=root,
            split=split,
            is_training=training,
            class_map=settings.class_map,
            batch_size=settings.batch_size,
            seed=settings.seed,
        )
        if not isinstance(dataset, torch.utils.data.IterableDataset) and not len(dataset):
            raise ValueError('it has no images')
    except (AssertionError, ValueError, RuntimeError, OSError, ImportError) as error:
        where = ' '.join(filter(None, (settings.dataset, settings.data_dir)))
        why = ' '.join(str(error).split()) or 'there is no such file or folder'
        raise DataError(
            f"The data '{where}' (split {split}) cannot be read: {why:.300}. Give a folder of 'train' and 'validation' "
            f'with a folder of images for each class (or .tar), or say what it is with --dataset.'
        ) from error
    return dataset


def _part(data: Path, split: str, training: bool) -> str:
    """Return the part of a folder, a folder or a .tar, that is for training or evaluation; timm would take all."""
    names = (split, *(('train', 'training') if training else ('val', 'valid', 'validation', 'eval', 'evaluation')))
    found = [part for name in names for part in (data / name, data / f'{name}.tar') if part.exists()]
    if data.is_dir() and found:
        return str(found[0])
    if data.is_dir() or (data.is_file() and training):
        raise DataError(
            f"The data '{data}' must be a folder with '{split}' in it. Put the images into 'train' and 'validation', "
            f"each with a folder for each class, or into 'train.tar' and 'validation.tar'."
        )
    return str(data)


def count_classes(dataset: Any) -> int | None:
    """Return how many classes a data set has, if it says so."""
    if isinstance(dataset, GeneratedImages):
        return dataset.classes
    reader = getattr(dataset, 'reader', None)
    by_name = getattr(reader, 'class_to_idx', None) or getattr(reader, 'class_name_to_idx', None)
    found = getattr(dataset, 'classes', None) or by_name
    return len(found) if found else None


def loader_for(
    dataset: Any, data: dict[str, Any], settings: argparse.Namespace, recipe: Recipe | None, device: torch.device
) -> Any:
    """Return timm's loader: of a recipe for training, without one for evaluation.

    Workers live for one epoch, so that each begins as the seed of the epoch says.
    """
    shared: dict[str, Any] = dict(
        input_size=data['input_size'],
        mean=data['mean'],
        std=data['std'],
        num_workers=settings.workers,
        distributed=torch.distributed.is_initialized(),
        pin_memory=device.type == 'cuda',
        device=device,
        img_dtype=getattr(torch, settings.model_dtype),
        persistent_workers=False,
        worker_seeding=_begin_worker,
    )
    if recipe is None:
        size = settings.validation_batch_size or settings.batch_size
        return create_loader(
            dataset,
            batch_size=size,
            interpolation=settings.interpolation or data['interpolation'],
            crop_pct=settings.crop_pct or data['crop_pct'],
            **shared,
        )
    loader = create_loader(
        dataset,
        batch_size=settings.batch_size,
        is_training=True,
        no_aug=settings.no_aug,
        re_prob=recipe.reprob,
        re_mode=recipe.remode,
        re_count=recipe.recount,
        hflip=recipe.hflip,
        color_jitter=recipe.color_jitter or None,
        auto_augment=recipe.aa or None,
        interpolation=recipe.train_interpolation,
        crop_pct=settings.crop_pct or data['crop_pct'],
        **shared,
    )
    for step in getattr(dataset.transform, 'transforms', ()):
        for operation in getattr(step, 'ops', ()):
            if getattr(operation, 'aug_fn', None) is posterize:
                operation.aug_fn = _posterize
    return loader


def _posterize(image: Image.Image, bits: int, **options: Any) -> Image.Image:
    """Keep so many bits of every channel; at 0, which timm's policies ask for, Pillow from 13 on refuses."""
    return posterize(image, bits, **options) if bits > 0 else Image.new(image.mode, image.size)


def _begin_worker(worker: Any) -> int:
    """Let a worker outlive the signal that asks all processes of a group to stop: the run goes on to the step's end.

    Ctrl-C, ``timeout`` and job schedulers send it to the whole group. A second SIGTERM ends the worker, as does the end
    of its loader.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))
    seed: int = worker.seed  # As without this function.
    return seed


def unreadable(error: BaseException) -> DataError:
    """Return what is to be said of an error while images are read."""
    first = next((line for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
    return DataError(
        f'The images can no longer be read: {first.strip():.300}. Look after the data (or, if a worker was '
        f'killed, give fewer --workers or more shared memory).'
    )


def batches(loader: Iterable[Any]) -> Iterator[Any]:
    """Yield a loader's batches.

    Raises:
        DataError: If a worker died, or too many images in a row cannot be read (timm leaves single ones out, and says
            which).
    """
    reading = iter(loader)
    while True:
        try:
            batch = next(reading)
        except StopIteration:
            return
        except (RuntimeError, OSError, ValueError) as error:
            raise unreadable(error) from error
        yield batch


def uniform_drop_path(model: nn.Module, rate: float) -> None:
    """Give every block of a static ResNet the same drop path, as in the recipes; timm's grows with depth."""
    from timm.layers import DropPath
    from timm.models.resnet import BasicBlock, Bottleneck

    for block in model.modules():
        if isinstance(block, BasicBlock | Bottleneck):
            block.drop_path = DropPath(rate) if rate > 0 else None
