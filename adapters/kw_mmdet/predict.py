"""Run a detector on photographs: read them, detect, draw, write detections in COCO's result form."""

import colorsys
import io
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from mmdet.apis.inference import get_classes
from PIL import Image, ImageOps, UnidentifiedImageError
from pycocotools import mask as coco_masks
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.ops import nms
from tqdm import tqdm

from kw_timm.files import new_file
from kw_timm.weights.unpickle import load_pickled

from .datasets import data_sets
from .generation import Config, detect, untrained_detector

__all__ = ['Detections', 'Detector', 'draw', 'find_images', 'predict', 'read_image', 'write_image']


class Detections(NamedTuple):
    """What was found in an image, best first within a class.

    Attributes:
        boxes: ``(N, 4)``, x1, y1, x2, y2 in pixels.
        scores: ``(N,)`` in 0 to 1.
        labels: ``(N,)`` indices of classes.
        masks: ``(N, height, width)`` bool, or None from a detector without masks.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    masks: np.ndarray | None

    def above(self, score: float) -> 'Detections':
        """Return those of at least this score."""
        return self._these(self.scores >= score)

    def apart(self, overlap: float) -> 'Detections':
        """Return the best of those whose boxes' intersection over union is larger, whatever their classes."""
        kept = nms(torch.as_tensor(self.boxes), torch.as_tensor(self.scores), overlap).numpy()
        return self._these(kept)

    def _these(self, kept: np.ndarray) -> 'Detections':
        masks = None if self.masks is None else self.masks[kept]
        return Detections(self.boxes[kept], self.scores[kept], self.labels[kept], masks)

    def enlarged(self, factor: int) -> 'Detections':
        """Return them for an image that is as many times as large."""
        masks = None if self.masks is None else self.masks.repeat(factor, axis=1).repeat(factor, axis=2)
        return self._replace(boxes=self.boxes * factor, masks=masks)

    def in_coco_form(self, image: str, names: Sequence[str]) -> list[dict[str, Any]]:
        """Return them in COCO's result form; ``image_id`` is the file's name, categories count from 1."""
        results = []
        for i, (x1, y1, x2, y2) in enumerate(self.boxes.tolist()):
            result: dict[str, Any] = dict(
                image_id=image,
                category_id=int(self.labels[i]) + 1,
                category_name=names[self.labels[i]],
                bbox=[round(v, 2) for v in (x1, y1, x2 - x1, y2 - y1)],
                score=round(float(self.scores[i]), 5),
            )
            if self.masks is not None:
                encoded = coco_masks.encode(np.asfortranarray(self.masks[i], dtype=np.uint8))
                result['segmentation'] = dict(size=encoded['size'], counts=encoded['counts'].decode())
            results.append(result)
        return results


class Detector:
    """A trained detector.

    Attributes:
        names: Names of its classes: the checkpoint's, else the config's, else COCO's or numbers.

    Args:
        config: Config that it was trained with.
        checkpoint: What training wrote.
        device: ``'cpu'``, ``'cuda:0'``; None: a GPU if there is one.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        ValueError: If the file is no checkpoint, or another detector's.
    """

    def __init__(self, config: Config, checkpoint: Path, device: str | None = None) -> None:
        if not checkpoint.is_file():
            raise FileNotFoundError(f"There is no checkpoint '{checkpoint}'.")
        content = load_pickled(checkpoint)
        self.model = untrained_detector(config, device or ('cuda:0' if torch.cuda.is_available() else 'cpu'))
        self.model.CLASSES = self.names = _class_names(content, config)
        self._load(content, checkpoint)

    def _load(self, content: Any, checkpoint: Path) -> None:
        state = content.get('state_dict', content) if isinstance(content, Mapping) else None
        if not state or not all(isinstance(value, torch.Tensor) for value in state.values()):
            raise ValueError(f"'{checkpoint}' is not a detector's checkpoint: it holds no state dict.")
        try:
            missing, _ = self.model.load_state_dict(state, strict=False)
        except RuntimeError as error:
            first = str(error).splitlines()[1:2]
            raise ValueError(_unfit(checkpoint, ' '.join(first).strip())) from error
        if missing:
            raise ValueError(_unfit(checkpoint, f'it lacks {len(missing)} tensors, {missing[0]} for one'))

    def __call__(self, image: np.ndarray) -> Detections:
        """Detect in an image ``(height, width, 3)``, uint8, BGR."""
        return Detections(*detect(self.model, image))


def _unfit(checkpoint: Path, why: str) -> str:
    return f"The checkpoint '{checkpoint}' does not fit the config: {why}. Name the config that it was trained with."


def _class_names(content: Any, config: Config) -> tuple[str, ...]:
    meta = content.get('meta') if isinstance(content, Mapping) else None
    meta = meta or {}
    configured = [data.classes for data in data_sets(config, 'test')]
    count = max(_num_classes(config['model']), default=0)
    known = [meta.get('CLASSES'), *({**(meta.get('dataset_meta') or {})}.get(key) for key in ('classes', 'CLASSES'))]
    for names in (*known, *configured, get_classes('coco')):
        if names and not isinstance(names, str) and len(names) == count:
            return tuple(names)
    return tuple(f'class {i + 1}' for i in range(count))


def _num_classes(config: Any) -> list[int]:
    """Return ``num_classes`` of every head."""
    if isinstance(config, Mapping):
        own = [value for key, value in config.items() if key == 'num_classes']
        return own + [n for value in config.values() for n in _num_classes(value)]
    if isinstance(config, list | tuple):
        return [n for item in config for n in _num_classes(item)]
    return []


def find_images(paths: Sequence[Path], but_not: Path) -> list[Path]:
    """Return image files: those named, and those in folders that are named, in order.

    Args:
        paths: Files and folders.
        but_not: Folder whose files are left out where they are not named themselves.

    Raises:
        FileNotFoundError: If a path does not exist, or a folder holds no image.
    """
    found: dict[Path, None] = {}
    for path in paths:
        if path.is_file():
            found[path] = None
        elif path.is_dir():
            within = [p for p in sorted(path.rglob('*')) if p.suffix.lower() in IMG_EXTENSIONS and p.is_file()]
            within = [p for p in within if but_not.resolve() not in p.resolve().parents]
            if not within:
                raise FileNotFoundError(f"The folder '{path}' holds no image ({', '.join(IMG_EXTENSIONS)}).")
            found.update(dict.fromkeys(within))
        else:
            raise FileNotFoundError(f"There is no image or folder '{path}'.")
    return list(found)


def read_image(path: Path) -> np.ndarray:
    """Read an image as detectors are trained on it: 8 bits, three channels, upright.

    OpenCV reads what it can, as in training; what only Pillow reads comes from there.

    Returns:
        ``(height, width, 3)``, uint8, BGR.

    Raises:
        ValueError: If the file is empty, cut off or no image.
    """
    content = path.read_bytes()
    if not content:
        raise ValueError(f"'{path}' is empty.")
    picture = None
    try:
        # OpenCV fills what is missing of a file that was cut off with grey.
        picture = Image.open(io.BytesIO(content))
        picture.load()
    except UnidentifiedImageError:
        pass
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(f"'{path}' is cut off or damaged ({error}).") from error
    try:
        image = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error:
        image = None
    if image is not None:
        return image
    if picture is None:
        raise ValueError(f"'{path}' is not an image that can be read.")
    return np.ascontiguousarray(np.asarray(ImageOps.exif_transpose(picture).convert('RGB'))[..., ::-1])


def draw(image: np.ndarray, found: Detections, names: Sequence[str]) -> np.ndarray:
    """Return a copy of an image with masks, boxes, names and scores drawn on it."""
    drawn = image.copy()
    size = max(image.shape[:2])
    thickness, scale = max(1, round(size / 500)), max(0.4, size / 1400)
    for i in np.argsort(found.scores):
        label = int(found.labels[i])
        color = _color(label)
        if found.masks is not None:
            inside = found.masks[i]
            drawn[inside] = (0.5 * drawn[inside] + 0.5 * np.array(color)).astype(np.uint8)
        x1, y1, x2, y2 = (round(v) for v in found.boxes[i].tolist())
        cv2.rectangle(drawn, (x1, y1), (x2, y2), color, thickness)
        text = f'{names[label]} {found.scores[i]:.2f}'
        (width, height), below = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, thickness)
        # Inside the picture, however near its border the box is.
        x, y = max(0, min(x1, image.shape[1] - width)), max(height + below, y1)
        cv2.rectangle(drawn, (x, y - height - below), (x + width, y), color, -1)
        cv2.putText(
            drawn, text, (x, y - below // 2 - 1), cv2.FONT_HERSHEY_SIMPLEX, scale, (0, 0, 0), thickness, cv2.LINE_AA
        )
    return drawn


def _color(label: int) -> tuple[int, int, int]:
    # Hues a golden section apart: neighbours differ, however many classes there are.
    red, green, blue = colorsys.hsv_to_rgb(label * 0.618034 % 1, 0.6, 1.0)
    return round(255 * blue), round(255 * green), round(255 * red)


def write_image(path: Path, image: np.ndarray) -> None:
    """Write an image whole or not at all; raises OSError if it cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path) as filling:
        if not cv2.imwrite(str(filling), image):
            raise OSError(f"'{path}' could not be written.")


def predict(
    detector: Detector, images: Sequence[Path], output: Path, score: float = 0.3, drawings: bool = True
) -> list[str]:
    """Detect in images; write ``output/detections.json`` and, under the images' names, drawings.

    Interrupted, it leaves what was found so far.

    Args:
        detector: Trained detector.
        images: Files, see :func:`find_images`.
        output: Folder; made if it is not there.
        score: Detections of at least this score are drawn; the file holds all.
        drawings: Whether to draw.

    Returns:
        What was wrong with images that could not be read, a sentence each.

    Raises:
        OSError: If something cannot be written.
    """
    output.mkdir(parents=True, exist_ok=True)
    above = _folder_above(images)
    results: list[dict[str, Any]] = []
    wrong: list[str] = []
    try:
        for path in tqdm(images, desc='images', file=sys.stderr, disable=None):
            try:
                image = read_image(path)
            except (ValueError, OSError) as error:
                wrong.append(str(error))
                continue
            found = detector(image)
            name = path.resolve().relative_to(above)
            results += found.in_coco_form(name.as_posix(), detector.names)
            if drawings:
                target = output / name
                if not cv2.haveImageWriter(str(target)):
                    target = target.with_name(target.name + '.png')
                write_image(target, draw(image, found.above(score), detector.names))
    finally:
        with new_file(output / 'detections.json') as filling:
            filling.write_text(json.dumps(results, indent=1))
    return wrong


def _folder_above(images: Sequence[Path]) -> Path:
    """Return the innermost folder that holds all images: names below it are unique."""
    folders = [path.resolve().parent for path in images]
    above = folders[0]
    while not all(folder.is_relative_to(above) for folder in folders):
        above = above.parent
    return above
