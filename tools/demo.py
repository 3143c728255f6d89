"""The main job end to end: draw data, train a KW Mask R-CNN on it, evaluate, draw its detections.

Started again after an interruption, it goes on from the last whole checkpoint.

Example:
    python tools/demo.py
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from make_shapes import make_shapes

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / 'configs/shapes/mask_rcnn_kw1x_mobilenetv2_050_fpn_shapes.py'
ENLARGED = 2  # factor at which detections are drawn, for legible labels
METRICS = {'mAP': 'AP', 'mAP_50': 'AP50', 'mAP_75': 'AP75'}


def newest_checkpoint(run: Path) -> Path | None:
    """Return the newest checkpoint of a run that can be read; ones cut off while written are set aside."""
    epochs = sorted(run.glob('epoch_*.pth'), key=lambda path: int(path.stem.removeprefix('epoch_')), reverse=True)
    for path in epochs:
        try:
            torch.load(path, map_location='cpu', weights_only=True, mmap=True)
        except (RuntimeError, EOFError, OSError) as error:
            print(f'{path.name} cannot be read ({type(error).__name__}) and is set aside')
            path.replace(path.with_suffix('.pth.damaged'))
            continue
        return path
    return None


def train(run: Path, options: list[str], epochs: int) -> Path:
    """Train, or finish a training that was interrupted.

    Args:
        run: Folder of checkpoints and logs.
        options: ``--cfg-options`` for the demo's config.
        epochs: Epochs of the whole training.

    Returns:
        The last checkpoint.
    """
    done = newest_checkpoint(run)
    if done is not None and int(done.stem.removeprefix('epoch_')) >= epochs:
        print(f'already trained: {done}')
        return done
    command = [sys.executable, str(ROOT / 'tools/train.py'), str(CONFIG), '--work-dir', str(run), '--seed', '0']
    command += ['--no-validate']
    print(f'training {epochs} epochs; checkpoints and the whole log: {run}', flush=True)
    if done is not None:
        print(f'going on from {done}')
        command += ['--resume-from', str(done)]
    run_quietly([*command, '--cfg-options', *options], run / 'train.log', show='Epoch [')
    last = newest_checkpoint(run)
    if last is None:
        raise SystemExit(f'training left no checkpoint in {run}')
    return last


def evaluate(run: Path, checkpoint: Path, options: list[str]) -> dict[str, float]:
    """Return box and mask average precision on the held-out images, as MMDetection's test program measures it."""
    folder = run / f'eval_{checkpoint.stem}'
    for old in folder.glob('eval_*.json'):
        old.unlink()
    command = [sys.executable, str(ROOT / 'tools/test.py'), str(CONFIG), str(checkpoint), '--work-dir', str(folder)]
    command += ['--eval', 'bbox', 'segm', '--cfg-options', *options]
    print(f'evaluating on held-out images; the whole log: {run / "test.log"}', flush=True)
    run_quietly(command, run / 'test.log', show='[>')
    return json.loads(next(folder.glob('eval_*.json')).read_text())['metric']


def draw(checkpoint: Path, data: Path, picture: Path, options: dict[str, Any], count: int = 12) -> None:
    """Draw detections on the first held-out images into one picture."""
    import kw_mmdet  # noqa: F401  (registers KWBackbone)
    from mmcv import Config
    from mmdet.apis import inference_detector, init_detector

    config = Config.fromfile(str(CONFIG))
    config.merge_from_dict(options)
    model = init_detector(config, str(checkpoint), device='cuda:0' if torch.cuda.is_available() else 'cpu')
    tiles = []
    for path in sorted((data / 'val').glob('*.png'))[:count]:
        image = cv2.imread(str(path))
        large = cv2.resize(image, None, fx=ENLARGED, fy=ENLARGED, interpolation=cv2.INTER_CUBIC)
        result = enlarge(inference_detector(model, image))
        drawn = model.show_result(large, result, score_thr=0.8, thickness=1, font_size=8, text_color='white')
        tiles.append(cv2.resize(drawn, large.shape[1::-1]))
    columns = 4
    rows = [np.hstack(tiles[i : i + columns]) for i in range(0, len(tiles) - columns + 1, columns)]
    draft = picture.with_suffix('.draft.png')
    cv2.imwrite(str(draft), np.vstack(rows))
    draft.replace(picture)


def enlarge(result: tuple[list[np.ndarray], list[list[np.ndarray]]]) -> tuple[list[np.ndarray], list[list[np.ndarray]]]:
    """Scale detections, boxes and masks per class, to the size that they are drawn at."""
    boxes = [np.hstack([found[:, :4] * ENLARGED, found[:, 4:]]) for found in result[0]]
    masks = [[np.kron(mask, np.ones((ENLARGED, ENLARGED), dtype=bool)) for mask in found] for found in result[1]]
    return boxes, masks


def run_quietly(command: list[str], log: Path, show: str) -> None:
    """Run a program; its output goes to a log, of which progress lines are shown."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open('a') as file:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1)
        assert process.stdout is not None
        tail: list[str] = []
        try:
            for line in process.stdout:
                file.write(line)
                tail = [*tail, line][-15:]
                if show in line:
                    print(line.split(' - INFO - ')[-1].rstrip(), flush=True)
        except KeyboardInterrupt:
            process.wait()
            raise SystemExit('\ninterrupted; the same command goes on from the last checkpoint') from None
    if process.wait() != 0:
        sys.stderr.writelines(tail)
        raise SystemExit(f'{Path(command[1]).name} failed; its whole output is in {log}')


def print_table(metric: dict[str, float]) -> None:
    """Print box and mask average precision."""
    print(f'\n{"":6}' + ''.join(f'{name:>8}' for name in METRICS.values()))
    for kind, label in (('bbox', 'box'), ('segm', 'mask')):
        print(f'{label:6}' + ''.join(f'{metric[f"{kind}_{key}"]:8.3f}' for key in METRICS))


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--work-dir', type=Path, default=ROOT / 'work_dirs/shapes', help='default: %(default)s')
    parser.add_argument('--epochs', type=int, default=8)
    parser.add_argument('--train', type=int, default=400, help='training images (default: %(default)s)')
    parser.add_argument('--val', type=int, default=100, help='held-out images (default: %(default)s)')
    args = parser.parse_args()
    work = args.work_dir.resolve()
    began = time.monotonic()
    data = make_shapes(work / 'data', args.train, args.val)
    overrides = {'runner.max_epochs': args.epochs}
    for split, folder in (('train', 'train'), ('val', 'val'), ('test', 'val')):
        overrides[f'data.{split}.ann_file'] = str(data / 'annotations' / f'{folder}.json')
        overrides[f'data.{split}.img_prefix'] = f'{data / folder}/'
    options = [f'{key}={value}' for key, value in overrides.items()]
    checkpoint = train(work / 'run', options, args.epochs)
    metric = evaluate(work / 'run', checkpoint, options)
    picture = work / 'detections.png'
    draw(checkpoint, data, picture, overrides)
    print_table(metric)
    print(f'\ncheckpoint: {checkpoint}\ndetections on held-out images: {picture}')
    print(f'{time.monotonic() - began:.0f} s in all')


if __name__ == '__main__':
    main()
