"""Mask R-CNN with a KW backbone on your own data in COCO's format: writes a config, checks it, trains, tests.

Example:
    python examples/own_coco_mask_rcnn.py cat dog --train my/train.json my/train --val my/val.json my/val
"""

import argparse
import json
import sys
from pathlib import Path

from kw_mmdet.cli import main as kw_mmdet
from kw_mmdet.configs import configs_path
from kw_mmdet.generation import GENERATION


def config(options: argparse.Namespace) -> str:
    """Return the text of a config for the MMDetection that is installed."""
    classes = tuple(options.classes)
    heads = dict(bbox_head=dict(num_classes=len(classes)), mask_head=dict(num_classes=len(classes)))
    lines = [f'_base_ = {configs_path(options.base)!r}', f'model = dict(roi_head={heads!r})']
    sets = {'train': options.train, 'val': options.val, 'test': options.val}
    if GENERATION == 2:
        data = {
            split: dict(classes=classes, ann_file=file, img_prefix=f'{folder}/')
            for split, (file, folder) in sets.items()
        }
        lines.append(f'data = dict(samples_per_gpu={options.batch}, workers_per_gpu=0, **{data!r})')
        lines.append(f'runner = dict(max_epochs={options.epochs})')
    else:
        for split, (file, folder) in sets.items():
            prefix = dict(img=f'{folder}/')
            data = dict(metainfo=dict(classes=classes), data_root='', ann_file=file, data_prefix=prefix)
            more = f'batch_size={options.batch}, ' if split == 'train' else ''
            lines.append(f'{split}_dataloader = dict({more}num_workers=0, persistent_workers=False, dataset={data!r})')
        lines += [f'{split}_evaluator = dict(ann_file={options.val[0]!r})' for split in ('val', 'test')]
        lines.append(f'train_cfg = dict(max_epochs={options.epochs})')
    return '\n'.join(lines) + '\n'


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('classes', nargs='+', help='names, as in the annotations')
    parser.add_argument('--train', nargs=2, required=True, metavar=('JSON', 'IMAGES'))
    parser.add_argument('--val', nargs=2, required=True, metavar=('JSON', 'IMAGES'))
    parser.add_argument('--base', default='mask_rcnn/mask_rcnn_kw1x_resnet50_fpn_1x_coco.py')
    parser.add_argument('--epochs', type=int, default=12)
    parser.add_argument('--batch', type=int, default=2, help='images of a process')
    parser.add_argument('--output', type=Path, default=Path('own_data'))
    parser.add_argument('--cfg-options', nargs='+', default=[], metavar='KEY=VALUE')
    options = parser.parse_args()
    named = {category['name'] for category in json.loads(Path(options.train[0]).read_text())['categories']}
    if not set(options.classes) <= named:
        parser.error(f'the annotations have the classes {", ".join(sorted(named))}')

    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / 'own_data.py'
    file.write_text(config(options))
    changed = ['--cfg-options', *options.cfg_options] if options.cfg_options else []
    status = kw_mmdet(['train', str(file), '--work-dir', str(options.output), *changed])
    if status:
        return status
    checkpoint = options.output / f'epoch_{options.epochs}.pth'
    metrics = ['--eval', 'bbox', 'segm'] if GENERATION == 2 else []
    return kw_mmdet(['test', str(file), str(checkpoint), '--work-dir', str(options.output), *metrics, *changed])


if __name__ == '__main__':
    sys.exit(main())
