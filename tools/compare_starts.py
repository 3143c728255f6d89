"""Compare how detectors begin, on data of one's own: static and KW, from random weights and from trained ones.

Trains small Faster R-CNNs (or Mask R-CNNs, ``--masks``) of the same budget on images with boxes in COCO's format,
several seeds each, and prints the mean and spread of their AP:

* from random weights: static; KW as new networks begin; KW by the published initialization, with annealing;
* from a static network's weights (``--weights``, or the static run's): static again; KW that computes what the static
  network computes.

Example:
    python tools/compare_starts.py train.json val.json images/ --epochs 4 --seeds 3
    python tools/compare_starts.py train.json val.json images/ --starts 'static from static' 'kw from static' --kw 1 4
        --static resnet50 --weights timm://resnet50.a1_in1k
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
from kw_mmdet.generation import GENERATION
from kw_mmdet.programs import load_config
from tqdm import tqdm

from kw_timm import derive_plan, plan_to_json
from kw_timm.pyramid import PyramidFeatures

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / 'configs/shapes/mask_rcnn_kw1x_mobilenetv2_050_fpn_shapes.py'
# Name -> KW or static, further arguments of the backbone; what is in {} is filled in.
STARTS: dict[str, dict[str, Any]] = {
    'static': dict(kw=False),
    'kw': dict(kw=True),
    'kw published': dict(kw=True, init='published'),
    'static from static': dict(kw=False, init_cfg='Pretrained'),
    'kw from static': dict(kw=True, init_cfg='KernelizeStatic'),
}


def make_config(
    name: str,
    train: Path,
    val: Path,
    images: Path,
    static: str,
    variant: str,
    epochs: int,
    checkpoint: Path | str,
    lr: float = 1e-3,
    scale: tuple[int, int] = (320, 240),
    masks: bool = False,
) -> Any:
    """Return the config of one start.

    Args:
        name: Which of :data:`STARTS`.
        train: Annotations to learn from.
        val: Annotations to evaluate on.
        images: Folder of the images of both.
        static: timm name of the static network.
        variant: See :func:`network`.
        epochs: Epochs; the learning rate falls by ten before the last fifth.
        checkpoint: Weights to start from: a trained static detector, a classifier, or ``timm://NAME``.
        lr: AdamW's learning rate.
        scale: Width and height that images are fitted into.
        masks: Learn masks too, a Mask R-CNN.
    """
    start = dict(STARTS[name])
    backbone: dict[str, Any] = network(static, variant) if start.pop('kw') else dict(name=static)
    if how := start.pop('init_cfg', None):
        backbone['init_cfg'] = dict(type=how, checkpoint=str(checkpoint))
    classes = tuple(category['name'] for category in json.loads(train.read_text())['categories'])
    config = load_config(str(CONFIG))
    config.model.backbone.update(backbone | start)
    shape: dict[str, Any] = {key: value for key, value in backbone.items() if key != 'init_cfg'}
    config.model.neck.in_channels = list(PyramidFeatures(**shape).out_channels)
    if masks:
        config.model.roi_head.mask_head.num_classes = len(classes)
    else:
        config.model.roi_head.update(mask_head=None, mask_roi_extractor=None)
    metric = ['bbox', 'segm'] if masks else 'bbox'
    config.model.roi_head.bbox_head.num_classes = len(classes)
    config.model.rpn_head.anchor_generator.scales = [8]
    last = max(epochs - max(epochs // 5, 1), 1)
    if GENERATION == 2:
        parts = [config.data.train, config.data.val, config.data.test]
        for part, file in zip(parts, (train, val, val), strict=True):
            part.update(ann_file=str(file), img_prefix=f'{images}/', classes=classes)
        config.runner.max_epochs = epochs
        config.lr_config.step = [last]
        config.optimizer.lr = lr
        config.evaluation.update(interval=epochs, metric=metric)
    else:
        parts = [config[f'{split}_dataloader'].dataset for split in ('train', 'val', 'test')]
        for part, file in zip(parts, (train, val, val), strict=True):
            part.update(ann_file=str(file), data_prefix=dict(img=f'{images}/'), metainfo=dict(classes=classes))
        for evaluator in (config.val_evaluator, config.test_evaluator):
            evaluator.update(ann_file=str(val), metric=metric)
        config.train_cfg.update(max_epochs=epochs, val_interval=epochs)
        config.param_scheduler[-1].milestones = [last]
        config.optim_wrapper.optimizer.lr = lr
    for part in parts:
        _prepare_images(part.pipeline, scale, masks)
    if start.get('init') == 'published':
        config.custom_hooks = [*config.custom_hooks, dict(type='TemperatureHook', epochs=max(epochs // 2, 1))]
    return config


def network(static: str, variant: str) -> dict[str, Any]:
    """Return the backbone's arguments for a KW network: by its name, or cells per mixture of a plan that is derived."""
    try:
        budget = float(variant)
    except ValueError:
        return dict(name=variant)
    plan = plan_to_json(derive_plan(timm.create_model(static, num_classes=0), budget))
    return dict(name='kernelized', static=static, plan=plan)


def _prepare_images(steps: Sequence[Any], scale: tuple[int, int], masks: bool) -> None:
    for step in steps:
        if 'transforms' in step:
            _prepare_images(step.transforms, scale, masks)
        if step.type == 'LoadAnnotations':
            step.with_mask = masks
        if 'keys' in step and step.type == 'Collect' and not masks:
            step['keys'] = [key for key in step['keys'] if key != 'gt_masks']
        for key in ('img_scale', 'scale'):
            if key in step:
                step[key] = scale
        if step.type == 'RandomFlip' and 'direction' in step:
            step.direction = 'horizontal'


def train(config: Any, folder: Path, seed: int, what: str = 'bbox') -> float:
    """Train and evaluate in a process of its own; return the AP of ``'bbox'`` or ``'segm'``; what is there is kept."""
    result = folder / 'ap.json'
    if result.is_file():
        return float(json.loads(result.read_text()))
    folder.mkdir(parents=True, exist_ok=True)
    config.dump(str(folder / 'config.py'))
    command = [sys.executable, '-m', 'kw_mmdet', 'train', str(folder / 'config.py'), '--work-dir', str(folder)]
    log = folder / 'train.log'
    with log.open('w') as file:
        code = subprocess.call([*command, '--seed', str(seed)], stdout=file, stderr=subprocess.STDOUT)
    if code:
        raise SystemExit(f'a training failed, see {log}')
    ap = _last_ap(folder, what)
    result.write_text(json.dumps(ap))
    return ap


def _last_ap(folder: Path, what: str) -> float:
    key = f'{what}_mAP' if GENERATION == 2 else f'coco/{what}_mAP'
    pattern = '*.log.json' if GENERATION == 2 else '*/vis_data/scalars.json'
    lines = [json.loads(line) for file in sorted(folder.glob(pattern)) for line in file.read_text().splitlines()]
    return float([line for line in lines if key in line][-1][key])


def main(argv: Sequence[str] | None = None) -> None:
    """Run the comparison and print its table."""
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('train', type=Path, help='annotations to learn from')
    parser.add_argument('val', type=Path, help='annotations to evaluate on')
    parser.add_argument('images', type=Path, help='folder of the images')
    parser.add_argument('--static', default='mobilenetv2_050', help='static network (default: %(default)s)')
    parser.add_argument('--kw', nargs='+', default=['kw1x_mobilenetv2_050'], help='names, or cells per mixture')
    parser.add_argument('--weights', help="to start from: file or timm://NAME (default: the static runs' detectors)")
    parser.add_argument('--epochs', type=int, default=4, help='epochs of each training (default: %(default)s)')
    parser.add_argument('--lr', type=float, default=1e-3, help="AdamW's learning rate (default: %(default)s)")
    parser.add_argument('--scale', type=int, nargs=2, default=(320, 240), help='size of images (default: 320 240)')
    parser.add_argument('--masks', action='store_true', help='Mask R-CNN, and the AP of its masks')
    parser.add_argument('--seeds', type=int, default=3, help='trainings of each kind (default: %(default)s)')
    parser.add_argument('--starts', nargs='+', choices=STARTS, default=list(STARTS), help='(all)')
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/starts'), help='default: %(default)s')
    args = parser.parse_args(argv)
    kinds = [(start, kw) for start in args.starts for kw in (args.kw if STARTS[start]['kw'] else [''])]
    found: dict[str, list[float]] = {f'{start} {kw}'.strip(): [] for start, kw in kinds}
    for seed, (start, kw) in tqdm([(seed, kind) for seed in range(args.seeds) for kind in kinds], unit='training'):
        name = f'{start} {kw}'.strip()
        config = make_config(
            start,
            *(args.train, args.val, args.images, args.static, kw, args.epochs),
            args.weights or args.work_dir / f'static_{seed}/latest.pth',
            args.lr,
            tuple(args.scale),
            args.masks,
        )
        folder = args.work_dir / f'{name.replace(" ", "_")}_{seed}'
        found[name].append(train(config, folder, seed, 'segm' if args.masks else 'bbox'))
        tqdm.write(f'{name}, seed {seed}: {found[name][-1]:.3f}')
    what = 'masks' if args.masks else 'boxes'
    print(f'\nAP of {what} after {args.epochs} epochs, mean and standard deviation of {args.seeds} seeds')
    for name, values in found.items():
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        print(f'{name:50}{statistics.mean(values):.3f} +- {spread:.3f}   ({", ".join(f"{v:.3f}" for v in values)})')
    print(f'everything else: {args.work_dir}')


if __name__ == '__main__':
    main()
