"""Whether a COCO annotation file has what MMDetection will read from it, known before hours are spent."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .datasets import DataSet

__all__ = ['Needs', 'check_annotations']

SAMPLED_IMAGES = 20


@dataclass(frozen=True)
class Needs:
    """What is done with a data set.

    Attributes:
        masks: Masks are loaded for training.
        evaluates: Boxes are compared with the file's.
        evaluates_masks: Masks are, too.
    """

    masks: bool = False
    evaluates: bool = False
    evaluates_masks: bool = False


def check_annotations(data: DataSet, classes: Sequence[str], needs: Needs) -> None:
    """Raise an error where MMDetection would fail on a data set's annotations, or misread them.

    Args:
        data: Data set whose annotation file exists.
        classes: Names of its classes.
        needs: What is done with it.

    Raises:
        ValueError: If the file is not COCO's format, lacks a class, has classes in another order, or annotations lack
            what is needed.
        FileNotFoundError: If images do not exist; some are looked for.
    """
    path = data.annotations
    try:
        content = json.loads(path.read_text())
        categories = [(category['id'], str(category['name'])) for category in content['categories']]
        images = {image['id']: image for image in content['images']}
        names = [image['file_name'] for image in content['images']]
        annotations = list(content.get('annotations', ()))
        ids = [(annotation['id'], annotation['image_id'], annotation['category_id']) for annotation in annotations]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"'{path}' is not a COCO annotation file: {type(error).__name__}: {error}.") from error
    _check_classes(data, classes, categories)
    wanted = {number for number, name in categories if name in classes}
    if len({number for number, _, _ in ids}) != len(ids):
        twice = next(number for number, count in Counter(number for number, _, _ in ids).items() if count > 1)
        raise ValueError(f"Annotation ids of '{path}' are not unique, e.g. {twice}. Number the annotations anew.")
    ours = [a for a in annotations if a['category_id'] in wanted]
    _check_images(data, images, names, needs)
    if images and data.trains and data.skips_empty and not any(a['image_id'] in images for a in ours):
        raise ValueError(
            f"None of the {len(images)} images of '{path}' has an object of the classes {_some(classes)}, and images "
            f'without are left out: there is nothing to train with. Check category_id and image_id of its annotations.'
        )
    _check_fields(data, ours, needs)
    _check_masks(data, ours, images, needs)


def _check_classes(data: DataSet, classes: Sequence[str], categories: list[tuple[Any, str]]) -> None:
    path, found = data.annotations, [name for _, name in categories]
    missing = [name for name in classes if name not in found]
    if missing and data.classes is None:
        raise ValueError(
            f"{data.key} names no classes, so COCO's 80 are used, but '{path}' has {_some(sorted(found))}. "
            f'Set {data.classes_key} to names that the file has, and num_classes of the heads to their number.'
        )
    if missing:
        raise ValueError(
            f"The annotation file '{path}' has no class named {_some(missing)}; it has {_some(sorted(found))}. "
            f'Set {data.classes_key} to names that the file has.'
        )
    order = [name for name in found if name in classes]
    if len(order) != len(set(order)):
        twice = next(name for name, count in Counter(order).items() if count > 1)
        raise ValueError(
            f"The annotation file '{path}' has several categories named '{twice}', which MMDetection would take for "
            f'several classes. Give one of them another name, or merge them.'
        )
    if order != list(classes):
        raise ValueError(
            f"MMDetection numbers classes in the order of the categories of the annotation file '{path}', "
            f'({_some(order)}), whatever the order of {data.classes_key} is, ({_some(classes)}): names would be '
            f'exchanged. Give the classes of all data sets, and the categories of their files, in one order.'
        )


def _check_images(data: DataSet, images: Mapping[Any, Any], names: list[str], needs: Needs) -> None:
    path = data.annotations
    if data.trains or data.generation == 3 or needs.evaluates_masks:
        bad = [key for key, image in images.items() if not {'width', 'height'} <= set(image)]
        if bad:
            raise ValueError(
                f"{len(bad)} of {len(images)} images of '{path}' have no width and height, e.g. the one with id "
                f'{bad[0]}. Add both, in pixels.'
            )
    folder = data.images
    if folder is None:
        raise ValueError(f"{data.key}.data_prefix does not say where images are; set it to dict(img='FOLDER/').")
    sampled = names[:: max(1, len(names) // SAMPLED_IMAGES)]
    lost = [name for name in sampled if not (folder / name).is_file()]
    if lost:
        prefix = 'img_prefix' if data.generation == 2 else 'data_prefix'
        raise FileNotFoundError(
            f"There is no image '{folder / lost[0]}' ({len(lost)} of {len(sampled)} that were looked for of "
            f"'{path}'). Check data_root and {prefix} of {data.key}."
        )


def _check_fields(data: DataSet, annotations: list[Any], needs: Needs) -> None:
    """Check what MMDetection reads from every annotation, or pycocotools when it evaluates."""
    loads = data.trains or data.generation == 3
    advice = {
        'bbox': 'Add [x, y, width, height] in pixels.',
        'area': "Add the object's area in pixels; that of its box will do.",
        'iscrowd': 'Add "iscrowd": 0.',
    }
    required = {'bbox': loads or needs.evaluates, 'area': loads or needs.evaluates, 'iscrowd': needs.evaluates}
    for name in (name for name, is_required in required.items() if is_required):
        lacking = [a['id'] for a in annotations if name not in a]
        if lacking:
            raise ValueError(_about(data, annotations, lacking, f'no {name}', advice[name]))
    if required['bbox']:
        odd = [a['id'] for a in annotations if not isinstance(a['bbox'], list) or len(a['bbox']) != 4]
        if odd:
            raise ValueError(_about(data, annotations, odd, 'a bbox that is not four numbers', advice['bbox']))


def _check_masks(data: DataSet, annotations: list[Any], images: Mapping[Any, Any], needs: Needs) -> None:
    if not needs.masks and not needs.evaluates_masks:
        return
    # 2.x leaves crowds out of training.
    loaded = [
        a
        for a in annotations
        if a['image_id'] in images
        and (needs.evaluates_masks or data.generation == 3 or not a.get('iscrowd'))
        and (needs.evaluates_masks or not _is_skipped(a))
    ]
    for what, bad in (
        ('no segmentation', [a['id'] for a in loaded if 'segmentation' not in a]),
        ('an empty segmentation', [a['id'] for a in loaded if not a.get('segmentation')]),
        (
            'a segmentation that is neither a list of polygons nor RLE of the size of its image',
            [a['id'] for a in loaded if not _is_mask(a.get('segmentation'), images[a['image_id']])],
        ),
    ):
        if bad:
            raise ValueError(
                _about(
                    data,
                    loaded,
                    bad,
                    what,
                    'Masks are learned or evaluated; add polygons of at least three points, or take these annotations '
                    'out, or use Faster R-CNN.',
                )
            )


def _is_skipped(annotation: Mapping[str, Any]) -> bool:
    """Say whether training leaves an annotation out before its mask is read."""
    _, _, width, height = annotation['bbox']
    return bool(annotation.get('ignore')) or annotation['area'] <= 0 or width < 1 or height < 1


def _is_mask(segmentation: Any, image: Mapping[str, Any]) -> bool:
    if isinstance(segmentation, Mapping):
        size = list(segmentation.get('size') or ())
        return isinstance(segmentation.get('counts'), list | str) and size == [image['height'], image['width']]
    return isinstance(segmentation, list) and all(isinstance(p, list) and len(p) >= 4 for p in segmentation[:1])


def _about(data: DataSet, annotations: list[Any], bad: list[Any], what: str, advice: str) -> str:
    return (
        f"{len(bad)} of {len(annotations)} annotations of '{data.annotations}' ({data.key}) have {what}, e.g. the one "
        f'with id {bad[0]}. {advice}'
    )


def _some(names: Sequence[str]) -> str:
    return ', '.join(names[:8]) + (f' and {len(names) - 8} more' if len(names) > 8 else '')
