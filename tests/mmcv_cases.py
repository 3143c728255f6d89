"""Inputs and results of the mmcv operators that Mask and Faster R-CNN run; see ``tests/test_mmcv_operators.py``.

The recorded results are those of compiled mmcv-full 1.7.2 on a CPU. To record them again, where it is installed:

    python tests/mmcv_cases.py tests/reference/mmcv_operators.npz
"""

import itertools
import sys
from pathlib import Path

import numpy as np
import torch

RECORD = Path(__file__).parent / 'reference/mmcv_operators.npz'
TYPES = ('float16', 'float32', 'float64')
DOWN, ACROSS, SCALE = 3, 2, 0.25


def random_boxes(random: np.random.RandomState, count: int, whole: bool) -> np.ndarray:
    """Boxes of shape (count, 4) in a square of 40 pixels, most of which overlap; with whole pixels, IoUs tie."""
    corner, size = random.uniform(0, 15, (count, 2)), random.uniform(0, 25, (count, 2))
    boxes = np.concatenate([corner, corner + size], 1)
    return (boxes.round() if whole else boxes).astype(np.float32)


def nms_results(device: str = 'cpu') -> dict[str, np.ndarray]:
    """Indices kept by ``mmcv.ops.nms`` and ``batched_nms``."""
    from mmcv.ops import batched_nms, nms

    random = np.random.RandomState(0)
    results = {}

    def tensor(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(device)

    for threshold, offset, whole in itertools.product((0.3, 1 / 3, 0.5, 0.7), (0, 1), (False, True)):
        boxes, scores = random_boxes(random, 120, whole), random.rand(120).astype(np.float32)
        results[f'nms {threshold:.2f} offset={offset} whole={whole}'] = nms(
            tensor(boxes), tensor(scores), threshold, offset=offset
        )[1]
    boxes, scores = random_boxes(random, 300, False), random.rand(300).astype(np.float32)
    ties = (scores * 12).round() / 12
    classes = random.randint(0, 4, 300)
    results['nms ties'] = nms(tensor(boxes), tensor(ties), 0.5)[1]
    results['nms score_threshold'] = nms(tensor(boxes), tensor(scores), 0.5, score_threshold=0.4)[1]
    results['nms max_num'] = nms(tensor(boxes), tensor(scores), 0.5, score_threshold=0.1, max_num=7)[1]
    results['nms nothing'] = nms(tensor(boxes[:0]), tensor(scores[:0]), 0.5)[1]
    for name, settings in {
        'per class': dict(),
        'agnostic': dict(class_agnostic=True),
        'max_num': dict(max_num=9),
        'split': dict(split_thr=100),
        'split, max_num': dict(split_thr=100, max_num=9),
    }.items():
        kept, indices = batched_nms(
            tensor(boxes), tensor(scores), tensor(classes), dict(type='nms', iou_threshold=0.5, **settings)
        )
        results[f'batched {name}'] = indices
        results[f'batched {name} boxes'] = kept
    return {name: result.cpu().numpy() for name, result in results.items()}


def regions(random: np.random.RandomState, kind: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features (2, 2, 9, 13), regions (7, 5) and gradients of the output: empty, narrow, outside, across the border."""
    features = random.standard_normal((2, 2, 9, 13))
    corner, size = random.uniform(-10, 50, (7, 2)), random.uniform(0, 60, (7, 2))
    size[0] = 0
    size[1, 0] = 0
    corner[2] = 200, 300
    images = random.randint(0, 2, (7, 1))
    rois = np.concatenate([images, corner, corner + size], 1)
    gradients = random.standard_normal((7, 2, DOWN, ACROSS))
    return tuple(torch.from_numpy(array).to(getattr(torch, kind)) for array in (features, rois, gradients))


def roi_align_results(device: str = 'cpu', kinds: tuple[str, ...] = TYPES) -> dict[str, np.ndarray]:
    """Outputs of ``mmcv.ops.roi_align`` and gradients of its input."""
    from mmcv.ops import roi_align

    random = np.random.RandomState(1)
    results = {}
    for kind, mode, aligned, ratio in itertools.product(kinds, ('avg', 'max'), (False, True), (0, 2)):
        features, rois, gradients = (tensor.to(device) for tensor in regions(random, kind))
        features.requires_grad_()
        pooled = roi_align(features, rois, (DOWN, ACROSS), SCALE, ratio, mode, aligned)
        pooled.backward(gradients)
        name = f'{kind} {mode} aligned={aligned} sampling_ratio={ratio}'
        results[name] = pooled.detach().cpu().numpy()
        results[f'{name} gradient'] = features.grad.cpu().numpy()
    return results


def main() -> None:
    """Compute all results with the installed mmcv, without compiled operators with torchvision's; write them."""
    # Not as part of kw_mmdet, which needs MMDetection too.
    sys.path.insert(0, str(Path(__file__).parents[1] / 'adapters/kw_mmdet'))
    import operators  # noqa: F401

    target = Path(sys.argv[1])
    part = target.with_suffix('.part.npz')
    np.savez_compressed(part, **nms_results(), **roi_align_results())
    part.replace(target)


if __name__ == '__main__':
    main()
