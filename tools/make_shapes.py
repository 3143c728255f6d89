"""Draw a small COCO-format data set: circles, squares and triangles with masks, on textured ground.

Example:
    python tools/make_shapes.py data/shapes --train 400 --val 100
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

CLASSES = ('circle', 'square', 'triangle')


def shape_polygon(kind: str, center: tuple[float, float], radius: float, angle: float) -> np.ndarray:
    """Return the outline of a shape as ``(points, 2)`` pixel coordinates."""
    corners = {'circle': 48, 'square': 4, 'triangle': 3}[kind]
    angles = angle + 2 * np.pi * np.arange(corners) / corners
    return np.stack([center[0] + radius * np.cos(angles), center[1] + radius * np.sin(angles)], axis=1)


def draw_image(rng: np.random.RandomState, size: int) -> tuple[np.ndarray, list[dict]]:
    """Draw one image.

    Args:
        rng: Source of randomness.
        size: Height and width in pixels.

    Returns:
        The image ``(size, size, 3)`` uint8 BGR, and its shapes: category id, polygon, bounding box and area.
    """
    ground = rng.randint(0, 256, size=(8, 8, 3)).astype(np.uint8)
    image = cv2.resize(ground, (size, size), interpolation=cv2.INTER_CUBIC) // 4 + rng.randint(0, 192)
    around = image.mean(axis=(0, 1))
    shapes: list[dict] = []
    taken: list[tuple[float, float, float]] = []
    wanted = rng.randint(2, 7)
    for _ in range(50):
        if len(shapes) == wanted:
            break
        radius = rng.uniform(0.08, 0.2) * size
        x, y = rng.uniform(radius + 1, size - radius - 1, size=2)
        if any(np.hypot(x - a, y - b) < 0.9 * (radius + r) for a, b, r in taken):
            continue
        taken.append((x, y, radius))
        category = rng.randint(len(CLASSES))
        polygon = shape_polygon(CLASSES[category], (x, y), radius, rng.uniform(0, 2 * np.pi))
        color = rng.randint(0, 256, size=3)
        while np.abs(color - around).max() < 70:  # no camouflage
            color = rng.randint(0, 256, size=3)
        cv2.fillPoly(image, [np.round(polygon).astype(np.int32)], color.tolist(), lineType=cv2.LINE_AA)
        (x1, y1), (x2, y2) = polygon.min(axis=0), polygon.max(axis=0)
        shapes.append(
            dict(
                category_id=category + 1,
                segmentation=[polygon.round(2).flatten().tolist()],
                bbox=[round(float(v), 2) for v in (x1, y1, x2 - x1, y2 - y1)],
                area=float(cv2.contourArea(polygon.astype(np.float32))),
                iscrowd=0,
            )
        )
    noise = rng.normal(0, 6, size=image.shape)
    return np.clip(image + noise, 0, 255).astype(np.uint8), shapes


def make_split(folder: Path, split: str, count: int, size: int, seed: int) -> None:
    """Draw one split: ``folder/split/*.png`` and ``folder/annotations/split.json``."""
    rng = np.random.RandomState(seed)
    (folder / split).mkdir(parents=True)
    (folder / 'annotations').mkdir(exist_ok=True)
    images: list[dict] = []
    annotations: list[dict] = []
    for i in tqdm(range(count), desc=f'drawing {split}', file=sys.stderr, disable=None):
        image, shapes = draw_image(rng, size)
        name = f'{i:05d}.png'
        if not cv2.imwrite(str(folder / split / name), image):
            raise OSError(f"could not write '{folder / split / name}'")
        images.append(dict(id=i, file_name=name, width=size, height=size))
        for shape in shapes:
            annotations.append(dict(id=len(annotations) + 1, image_id=i, **shape))
    categories = [dict(id=i + 1, name=name) for i, name in enumerate(CLASSES)]
    content = dict(images=images, annotations=annotations, categories=categories)
    (folder / 'annotations' / f'{split}.json').write_text(json.dumps(content))


def make_shapes(folder: Path, train: int = 400, val: int = 100, size: int = 128, seed: int = 0) -> Path:
    """Draw the data set unless it is there already; a broken-off drawing leaves nothing behind.

    Args:
        folder: Where the data set goes.
        train: Number of training images.
        val: Number of held-out images.
        size: Height and width of the images in pixels.
        seed: Seed; the same arguments draw the same images.

    Returns:
        The folder.

    Raises:
        FileExistsError: If the folder holds something else, or a data set drawn with other arguments.
    """
    wanted = dict(train=train, val=val, size=size, seed=seed, classes=list(CLASSES))
    stamp = folder / 'shapes.json'
    if stamp.is_file() and json.loads(stamp.read_text()) == wanted:
        return folder
    if folder.exists():
        raise FileExistsError(f"'{folder}' exists and is not this data set; remove it or name another folder.")
    draft = folder.with_name(folder.name + '.draft')
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    make_split(draft, 'train', train, size, 2 * seed + 1)
    make_split(draft, 'val', val, size, 2 * seed + 2)
    (draft / stamp.name).write_text(json.dumps(wanted))
    draft.rename(folder)
    return folder


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', type=Path)
    parser.add_argument('--train', type=int, default=400, help='training images (default: %(default)s)')
    parser.add_argument('--val', type=int, default=100, help='held-out images (default: %(default)s)')
    parser.add_argument('--size', type=int, default=128, help='height and width in pixels (default: %(default)s)')
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    try:
        print(make_shapes(args.folder, args.train, args.val, args.size, args.seed))
    except OSError as error:
        parser.exit(2, f'{parser.prog}: error: {error}\n')


if __name__ == '__main__':
    main()
