"""What the page shows of one image: classes or boxes, times, where the attention looks. Knows no page."""

import math
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from kw_hub.manifest import load_manifest
from PIL import Image, ImageOps, UnidentifiedImageError
from timm.data import ImageNetInfo, create_transform, resolve_model_data_config
from torch import nn

from kw_timm import optimize_for_inference
from kw_timm.benchmark.measure import Settings, alternate, quartiles
from kw_timm.benchmark.results import device_name
from kw_timm.inspection import Inspection, inspect_network
from kw_timm.inspection.command import open_network
from kw_timm.random_weights import settle
from kw_timm.weights.store import RECORD, store_folder

__all__ = ['Classifier', 'Detector', 'Source', 'Times', 'against_mean_image', 'open_source', 'read_photo', 'stored']

MOST_PIXELS = 50_000_000
# Detections come with a mask each in the image's size: what is larger is made smaller first. And small images are
# drawn larger, for legible labels.
LONGEST_SIDE, SHORTEST_DRAWN = 1333, 400
DRAWN_FROM = 0.5  # score
ROUNDS = 5


@dataclass(frozen=True)
class Source:
    """What can be chosen: a network, or a detector where it has a config.

    Attributes:
        title: What it is called on the page.
        name: timm network, or a detector's checkpoint: a file, or a published detector's name.
        config: A detector's.
        random_weights: Of a network: as it is when it is new.
    """

    title: str
    name: str
    config: str = ''
    random_weights: bool = False


@dataclass(frozen=True)
class Times:
    """Median seconds of a pass over :data:`ROUNDS`, by what was run, ``'static'`` first, and on which processor."""

    seconds: dict[str, float]
    where: str


def stored() -> list[Source]:
    """Return the networks and detectors with KW layers that lie in the local store."""
    entries = [entry for entry in load_manifest() if entry.network.startswith('kw')]
    there = [entry for entry in entries if (store_folder(entry.name) / RECORD).is_file()]
    return [
        Source(entry.name, entry.name, entry.name)
        if entry.kind == 'detector'
        else Source(entry.name.partition('.')[0], entry.network)
        for entry in there
    ]


def read_photo(path: Path) -> Image.Image:
    """Return an image as networks are trained on it: upright, 8 bits, red, green and blue.

    Raises:
        ValueError: If the file is no image, cut off or too large; the message says what to do.
    """
    try:
        with Image.open(path) as opened:
            width, height = opened.size
            if width * height > MOST_PIXELS:
                raise ValueError(
                    f"'{path.name}' has {width} x {height} pixels, more than the {MOST_PIXELS // 10**6} million that "
                    f'are taken here: make it smaller.'
                )
            opened.load()
            upright = ImageOps.exif_transpose(opened)
    except UnidentifiedImageError as error:
        raise ValueError(f"'{path.name}' is not an image that can be read: give a JPEG or PNG file.") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"'{path.name}' has far too many pixels: make it smaller.") from error
    except (OSError, SyntaxError, EOFError) as error:
        raise ValueError(f"'{path.name}' is cut off or damaged ({error}): give the whole file.") from error
    if upright.mode.startswith('I'):  # 16 bits of grey, of which `convert` would keep the lower 8.
        upright = Image.fromarray((np.asarray(upright).clip(0, 65535) / 257).round().astype(np.uint8))
    return upright.convert('RGB')


class Classifier:
    """A network with names of its classes.

    Attributes:
        kw: The network, in eval mode, and an optimized copy of it.
        static: The static network of the same name, with random weights: it is there for its speed alone.

    Raises:
        ValueError: If there is no such network, or there are no weights of it.
    """

    def __init__(self, source: Source) -> None:
        kw: Any = open_network(source.name, random_weights=source.random_weights)
        self.kw = (settle(kw) if source.random_weights else kw).to(_device())
        self.optimized = optimize_for_inference(self.kw)
        self.static = timm.create_model(_static(source.name)).eval().to(_device())
        self.transform = create_transform(**resolve_model_data_config(kw), is_training=False)
        self.names = ImageNetInfo('imagenet-1k')

    def __call__(self, photo: Image.Image) -> tuple[torch.Tensor, dict[str, float], None]:
        """Return the prepared image ``(1, 3, H, W)``, and the five best classes with their probabilities."""
        x = self.transform(photo)[None].to(_device())
        with torch.inference_mode():
            best = self.kw(x).softmax(-1)[0].topk(5)
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        # With numbers: two classes are called 'crane'.
        return x, {f'{self.names.index_to_description(i)} ({i})': p for i, p in pairs}, None


class Detector:
    """A detector with a KW backbone; attributes are as above, of its backbone.

    Raises:
        ValueError: If MMDetection is missing, the file is no checkpoint, another detector's, or of a static one.
        OSError: If there is no such file.
    """

    def __init__(self, source: Source) -> None:
        try:
            from kw_mmdet.generation import BACKBONES
            from kw_mmdet.predict import Detector as Trained
            from kw_mmdet.programs import load_config
            from kw_mmdet.published import find_checkpoint
        except ImportError as error:
            raise ValueError(
                f"Detectors need MMDetection ({error}): pip install 'kw-timm[mmdet3]', or choose a network."
            ) from error
        config = load_config(source.config)
        backbone = config.model.backbone
        if not str(backbone.get('name')).startswith('kw'):
            raise ValueError(f"The detector of '{source.config}' has no KW backbone: name the config of one that has.")
        self.trained = Trained(config, find_checkpoint(source.name, source.config), str(_device()))
        self.kw = self.trained.model.backbone
        self.optimized = optimize_for_inference(self.kw)
        static = {**backbone, 'name': _static(backbone.name), 'init_cfg': None}
        self.static = BACKBONES.build(static).eval().to(_device())

    def __call__(self, photo: Image.Image) -> tuple[torch.Tensor, None, Image.Image]:
        """Return what the backbone was given ``(1, 3, H, W)``, and the image with what was found drawn on it."""
        from kw_mmdet.predict import draw

        small = photo.copy()
        small.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
        given: list[torch.Tensor] = []
        hook = self.kw.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0].clone()))
        try:
            found = self.trained(np.asarray(small)[..., ::-1].copy()).above(DRAWN_FROM)
        finally:
            hook.remove()
        factor = -(-SHORTEST_DRAWN // max(small.size))
        large = np.asarray(small.resize([factor * side for side in small.size], Image.Resampling.BICUBIC))
        drawn = draw(large[..., ::-1], found.enlarged(factor), self.trained.names)
        return given[0], None, Image.fromarray(drawn[..., ::-1])


@lru_cache(maxsize=2)
def open_source(source: Source) -> Classifier | Detector:
    """Return what was chosen, ready; the last two stay in memory."""
    return Detector(source) if source.config else Classifier(source)


def measure(opened: Classifier | Detector, x: torch.Tensor) -> Times:
    """Time passes of the network, or the backbone, in its forms and of the static one, in turn."""
    forms = {'static': opened.static, 'KW': opened.kw, 'KW, optimized': opened.optimized}
    calls = {name: partial(_run, network, x) for name, network in forms.items()}
    for call in calls.values():
        call()
    times = alternate(calls, Settings(_device(), torch.float32, rounds=ROUNDS, precision=math.inf))
    where = device_name(_device())
    if _device().type == 'cpu':
        threads = torch.get_num_threads()
        where += f', {threads} thread{"s" * (threads > 1)}'
    return Times({name: quartiles(own)[1] for name, own in times.items()}, where)


def against_mean_image(network: nn.Module, x: torch.Tensor) -> Inspection:
    """Compare what the attention does for an image with what it does for one of mere mean colour.

    Args:
        network: KW network, or a backbone.
        x: Prepared image ``(1, 3, H, W)``, normalized: the mean is 0.

    Returns:
        Of each layer ``mean`` are the coefficients for the image, ``spread`` is how much larger they are than for the
        mean image, with sign, and variations are over these two images. Warehouses: what is used for the image.
    """
    here, both = inspect_network(network, x), inspect_network(network, torch.cat([x, torch.zeros_like(x)]))
    layers = (
        replace(b, mean=a.mean, spread=2 * (a.mean - b.mean), effective_cells=a.effective_cells)
        for a, b in zip(here.layers, both.layers, strict=True)
    )
    return Inspection(both.images, tuple(layers), here.warehouses, here.skipped)


def _run(network: nn.Module, x: torch.Tensor) -> None:
    with torch.inference_mode():
        network(x)


def _static(name: str) -> str:
    return name.partition('_')[2]


def _device() -> torch.device:
    return torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')
