"""Measure a detector's backbone and a training step in every mode, side by side, as `kw-timm bench` does for networks.

Example:
    python tools/benchmark_detector.py configs/mask_rcnn/mask_rcnn_kw4x_resnet50_fpn_1x_coco.py --csv detection.csv

`kw-timm bench --from-csv detection.csv others.csv --readme README.md` puts the results of several runs together.
"""

import argparse
import logging
import shlex
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from kw_timm.benchmark import Case, Settings, run_all
from kw_timm.benchmark.cases import static_name
from kw_timm.benchmark.session import add_options, check_files, image_size, positive, settings_of
from kw_timm.random_weights import drawn_images, settle

PARTS = ('backbone', 'features', 'training')


def build(config: Path, static: bool) -> Any:
    """Build the detector of a config with random weights, with its KW backbone or the static one of the same config."""
    import kw_mmdet  # noqa: F401  (registers KWBackbone)
    from mmcv import Config
    from mmdet.models import build_detector

    model = Config.fromfile(str(config)).model
    model.backbone.init_cfg = None
    if static:
        model.backbone.name = static_name(model.backbone.name)
    torch.manual_seed(0)
    detector = build_detector(model)
    logging.disable(logging.INFO)  # It tells of every parameter how it was initialized.
    detector.init_weights()
    logging.disable(logging.NOTSET)
    settle(detector.backbone)
    return detector


def loss_of(batch: int, size: tuple[int, int], settings: Settings) -> Callable[[nn.Module], torch.Tensor]:
    """Return what computes a detector's loss on drawn images with boxes and masks drawn into each quarter."""
    from mmdet.core.mask import BitmapMasks

    height, width = size
    shape = (height, width, 3)
    images = drawn_images(batch, size).to(settings.device, settings.dtype)
    corners = [(x, y) for x in (0, width // 2) for y in (0, height // 2)]
    boxes = [[x + width * 0.05, y + height * 0.05, x + width * 0.4, y + height * 0.4] for x, y in corners]
    masks = np.zeros((len(boxes), height, width), np.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, np.array(boxes).astype(int), strict=True):
        mask[y1:y2, x1:x2] = 1
    truth: dict[str, Any] = dict(
        gt_bboxes=[torch.tensor(boxes, device=settings.device, dtype=settings.dtype)] * batch,
        gt_labels=[torch.zeros(len(boxes), dtype=torch.long, device=settings.device)] * batch,
        gt_masks=[BitmapMasks(masks, height, width)] * batch,
    )
    metas = [dict(img_shape=shape, pad_shape=shape, ori_shape=shape, scale_factor=1.0, flip=False)] * batch

    def loss(detector: Any) -> torch.Tensor:
        # The same samples of boxes for every mode.
        torch.manual_seed(0)
        np.random.seed(0)
        given = truth if detector.with_mask else {k: v for k, v in truth.items() if k != 'gt_masks'}
        return detector._parse_losses(detector.forward_train(images, metas, **given))[0]

    return loss


def run(x: torch.Tensor, whole: bool, network: Any) -> Any:
    """Return the levels of a backbone, or those behind the neck of a whole detector."""
    return network.extract_feat(x) if whole else network(x)


def cases(options: argparse.Namespace, settings: Settings) -> Iterator[Case]:
    """Yield the configurations: backbone, backbone and neck, training step of the whole detector."""
    kw = static = build(options.config, static=False).to(settings.device, settings.dtype)
    if 'static' in options.modes:
        static = build(options.config, static=True).to(settings.device, settings.dtype)
    name, kind = kw.backbone.name, type(kw).__name__
    batch, size, modes = options.batch, image_size(options.size), list(dict.fromkeys(options.modes))
    x = drawn_images(batch, size).to(settings.device, settings.dtype)
    for part, task in (('backbone', 'backbone'), ('features', 'backbone and neck')):
        if part in options.parts:
            whole = part == 'features'
            networks = (kw, static) if whole else (kw.backbone, static.backbone)
            forward, budget = partial(run, x, whole), options.memory_budget
            yield Case(name, f'{kind}, {task}', batch, size, *networks, forward, modes, memory_budget=budget)
    if 'training' in options.parts:
        batch, size = options.train_batch, image_size(options.train_size)
        modes = [mode for mode in modes if mode != 'optimized']
        loss = loss_of(batch, size, settings)
        yield Case(name, f'{kind}, training step', batch, size, kw, static, loss, modes, training=True)


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', type=Path, metavar='CONFIG', help='of a detector with a KW backbone')
    parser.add_argument(
        '--parts', nargs='+', choices=PARTS, default=['backbone', 'training'], help='(backbone training)'
    )
    parser.add_argument('--batch', type=positive, default=1, metavar='N', help='images of the backbone (1)')
    parser.add_argument('--size', nargs='+', default=['800x1333'], metavar='N', help='their size in pixels (800x1333)')
    parser.add_argument('--train-batch', type=positive, default=2, metavar='N', help='images of a step (2)')
    parser.add_argument('--train-size', nargs='+', default=['192'], metavar='N', help='their size in pixels (192)')
    add_options(parser)
    options = parser.parse_args()
    if not options.config.is_file():
        parser.error(f"there is no config '{options.config}'")
    command = shlex.join(['python', 'tools/benchmark_detector.py', *sys.argv[1:]])
    try:
        image_size(options.size), image_size(options.train_size)
        check_files(options)
        settings = settings_of(options)
        return run_all(cases(options, settings), len(set(options.parts)), settings, options, command)
    except (ValueError, OSError) as error:
        print(f'{parser.prog}: error: {error}', file=sys.stderr)
        return 2


if __name__ == '__main__':
    sys.exit(main())
