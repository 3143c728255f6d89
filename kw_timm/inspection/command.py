"""``kw-timm inspect``: networks, images and files of the command."""

import argparse
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from timm.data import create_transform, resolve_model_data_config
from torch import nn

from ..export import load_network
from ..files import new_file
from ..layers import KWLayer
from ..pyramid import create_network
from ..random_weights import drawn_images
from ..weights import load_checkpoint, read_weight_file
from ..weights.load import CLASSIFIERS, unwrap_weights
from ..weights.store import WeightsNotFoundError
from .measure import Inspection, inspect_network
from .page import page
from .pictures import check_matplotlib, draw_attention, draw_plan, draw_variation
from .text import HEAD, rows, text_table, unused_cells, verdict, warehouse_rows

__all__ = ['find_images', 'load_images', 'open_network', 'run_inspect', 'write_files']

_ENDINGS = ('.jpg', '.jpeg', '.png', '.bmp', '.webp', '.tif', '.tiff', '.gif', '.ppm')
_DRAWN = 8
# The page is to be sent around and opened on a phone: heat maps that are too large are drawn again with fewer values.
_MOST_BYTES = 3_000_000
_HEAT_MAPS = (240, 120, 60, 30)


def run_inspect(options: argparse.Namespace, size: tuple[int, int] | None) -> int:
    """Run the command: print tables and the verdict, write pictures and the page.

    Raises:
        ValueError: If the network cannot be had or has no KW layer, an image cannot be read, matplotlib is missing, or
            files cannot be written.
        OSError: If there is no such file.
    """
    check_matplotlib()
    folder = options.output or Path(f'inspect-{re.sub("[^A-Za-z0-9_.-]+", "-", options.network).strip("-.")}')
    _check_folder(folder)
    files = find_images(options.images)
    network = open_network(options.network, options.checkpoint, options.random_weights)
    config = resolve_model_data_config(network)
    channels, *own_size = config['input_size']
    height, width = size or (own_size[0], own_size[1])
    if files:
        every = len(files) <= options.limit
        chosen = files if every else [files[i * len(files) // options.limit] for i in range(options.limit)]
        images = load_images(chosen, config | {'input_size': (channels, height, width)})
        what = f'{len(chosen)} image{"s" if len(chosen) > 1 else ""}' + ('' if every else f' of {len(files)}')
    else:
        images = iter(drawn_images(_DRAWN, (height, width))[:, [i % 3 for i in range(channels)]])
        what = f'{_DRAWN} drawn images, since none were given'
    weights = (
        'those of a new network' if options.random_weights else options.checkpoint or f'those of {options.network}'
    )
    facts = [f'Seen: {what}, {height} x {width} pixels, at temperature 0. Weights: {weights}.']
    try:
        found = inspect_network(network, images)
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = ' '.join(str(error).split())
        raise ValueError(
            f"'{options.network}' does not take images of {channels} x {height} x {width}: {reason:.300}. Give --size."
        ) from error
    if found.skipped:
        facts.append(f'Not called, and left out: {", ".join(found.skipped)}.')
    print(f'{options.network}: {" ".join(facts)}\n\n{text_table([HEAD, *rows(found)])}\n')
    print(f'{text_table(warehouse_rows(found))}\n\n{unused_cells(found)}\n{verdict(found)}')
    written = write_files(found, folder, f'Inside {options.network}', facts)
    print(f"written: '{written}' and the pictures in it, beside it")
    return 0


def open_network(name: str, checkpoint: Path | None = None, random_weights: bool = False) -> nn.Module:
    """Return a KW network in eval mode.

    Args:
        name: A timm name, ``local-dir:FOLDER``, ``hf-hub:ORG/NAME``, or a weight file of a KW variant.
        checkpoint: Weights, in whichever wrapping and of any number of classes, instead of those that come by the name.
        random_weights: As the network is when it is new, instead.

    Raises:
        ValueError: If there is no such network, it has no KW layer, or there are no weights of it.
        OSError: If there is no such file.
    """
    if checkpoint is not None and random_weights:
        raise ValueError('Give --checkpoint or --random-weights, not both.')
    torch.manual_seed(0)
    if Path(name).is_file():
        if checkpoint is not None or random_weights:
            raise ValueError(f"'{name}' is a weight file: give it alone, or the network's name with --checkpoint.")
        return _with_kw_layers(load_network(name), name)
    try:
        if ':' not in name:
            with torch.device('meta'):  # Before weights are looked for.
                _with_kw_layers(create_network(name), name)
        network = (
            _of_checkpoint(name, checkpoint) if checkpoint else create_network(name, pretrained=not random_weights)
        )
    except (WeightsNotFoundError, RuntimeError) as error:
        advice = '' if checkpoint else ' Or give --checkpoint FILE, or --random-weights for a new network.'
        raise ValueError(f'{error}{advice}') from error
    return _with_kw_layers(network, name).eval()


def _of_checkpoint(name: str, checkpoint: Path) -> nn.Module:
    """Return a network with the weights of a file, and of as many classes as it has."""
    network: Any = create_network(name)
    weights = unwrap_weights(read_weight_file(checkpoint), network)
    classes = [
        len(weights[key])
        for key, own in network.state_dict().items()
        if key.startswith(CLASSIFIERS) and own.shape == (network.num_classes,) and key in weights and weights[key].dim()
    ]
    if classes and classes[0] != network.num_classes:
        network = create_network(name, num_classes=classes[0])
    load_checkpoint(network, checkpoint)
    return network


def _with_kw_layers(network: nn.Module, name: str) -> nn.Module:
    if not any(isinstance(module, KWLayer) for module in network.modules()):
        raise ValueError(
            f"'{name}' has no KW layer, so there is no attention to inspect. timm.list_models('kw*') lists networks "
            f'with some; kw_timm.kernelize gives it some.'
        )
    return network


def find_images(paths: list[Path]) -> list[Path]:
    """Return images: those named, and those in named folders and below, in order.

    Raises:
        ValueError: If a folder has none.
        FileNotFoundError: If there is no such file.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.rglob('*') if p.suffix.lower() in _ENDINGS and p.is_file())
            if not inside:
                raise ValueError(f"The folder '{path}' has no image ({', '.join(_ENDINGS)}). Name another.")
            found += inside
        elif path.exists():
            found.append(path)
        else:
            raise FileNotFoundError(f"There is no image '{path}'. Name a file or a folder that exists.")
    return found


def load_images(files: list[Path], config: dict[str, Any]) -> Iterator[torch.Tensor]:
    """Yield images as timm's evaluation prepares them.

    Args:
        files: Images.
        config: timm's data configuration of the network.

    Raises:
        ValueError: If one cannot be read, or the network is not for images of 1 or 3 channels.
    """
    from PIL import Image

    channels = config['input_size'][0]
    modes = {1: 'L', 3: 'RGB'}
    if channels not in modes:
        raise ValueError(f'The network takes {channels} channels, but images have 1 or 3: give none, to draw some.')
    for key in ('mean', 'std'):
        if len(config[key]) != channels:
            config = config | {key: (sum(config[key]) / len(config[key]),) * channels}
    transform = create_transform(**config, is_training=False)
    for file in files:
        try:
            with Image.open(file) as opened:
                image = transform(opened.convert(modes[channels]))
        except Exception as error:  # Decoders raise whatever they come upon.
            reason = ' '.join(str(error).split())
            raise ValueError(f"The image '{file}' cannot be read: {reason:.200}. Leave it out, or mend it.") from error
        yield image


def write_files(found: Inspection, folder: Path, title: str, facts: list[str]) -> Path:
    """Write the pictures and the page, which is returned, into a folder that is made if need be."""
    _check_folder(folder)
    folder.mkdir(exist_ok=True)
    pictures = {'plan': _png(draw_plan(found)), 'variation': _png(draw_variation(found))}
    for most in _HEAT_MAPS:
        maps = [_png(draw_attention(found, warehouse, most)) for warehouse in found.warehouses]
        if sum(map(len, maps)) <= _MOST_BYTES:
            break
    pictures |= {f'attention{i}': png for i, png in enumerate(maps)}
    names = {'plan': 'plan', 'variation': 'kernel-variation'}
    for i, warehouse in enumerate(found.warehouses):
        names[f'attention{i}'] = f'attention-{re.sub("[^A-Za-z0-9_.-]+", "-", warehouse.name)}'
    for key, png in pictures.items():
        with new_file(folder / f'{names[key]}.png') as filling:
            filling.write_bytes(png)
    file = folder / 'index.html'
    with new_file(file) as filling:
        filling.write_text(page(title, facts, found, pictures), encoding='utf-8')
    return file


def _png(figure: Any) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format='png')
    return content.getvalue()


def _check_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"'{folder}' is a file; --output names the folder to write to.")
    if not folder.resolve().parent.is_dir():
        raise ValueError(f"There is no folder '{folder.resolve().parent}' to make '{folder.name}' in. Make it first.")
