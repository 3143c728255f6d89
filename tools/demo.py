"""The main job end to end: draw data, train a KW Mask R-CNN on it, evaluate, draw its detections.

Started again after an interruption, it goes on from the last whole checkpoint.

Example:
    python tools/demo.py
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from kw_mmdet.generation import GENERATION
from kw_mmdet.predict import Detector, read_image, write_image
from kw_mmdet.predict import draw as draw_found
from kw_mmdet.programs import load_config
from make_shapes import make_shapes

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / 'configs/shapes/mask_rcnn_kw1x_mobilenetv2_050_fpn_shapes.py'
DRAWN = 0.5  # score from which detections are drawn; of boxes on one object, whose overlap is larger, the best
ENLARGED = 3  # factor at which detections are drawn, for legible labels
BATCH = 8  # of all processes together
METRICS = {'mAP': 'AP', 'mAP_50': 'AP50', 'mAP_75': 'AP75'}


class Clock:
    """How long each part took. ``make demo`` says when it began, so that set-up is the first."""

    def __init__(self) -> None:
        self.last = self.began = time.time()
        self.laps: dict[str, float] = {}
        if began := os.environ.get('MAKE_BEGAN'):
            self.last = self.began = float(began)
            self.lap('set-up')

    def lap(self, name: str) -> None:
        """End a part."""
        now = time.time()
        self.laps[name] = now - self.last
        self.last = now

    def __str__(self) -> str:
        parts = ', '.join(f'{name} {seconds:.0f} s' for name, seconds in self.laps.items())
        return f'{parts}: {self.last - self.began:.0f} s in all'


def overridden(data: Path, epochs: int, evaluate_every: int | None = None, batch: int = BATCH) -> dict[str, Any]:
    """Return what is changed in the config: where the data are, how long the training is, when it is evaluated.

    Keys are dotted, as in ``--cfg-options``; ``evaluate_every`` counts epochs, None: not before the end; ``batch`` is
    each process's.
    """
    interval = evaluate_every or epochs + 1
    changed: dict[str, Any] = {'data.samples_per_gpu' if GENERATION == 2 else 'train_dataloader.batch_size': batch}
    for split, folder in (('train', 'train'), ('val', 'val'), ('test', 'val')):
        key = f'data.{split}' if GENERATION == 2 else f'{split}_dataloader.dataset'
        file = str(data / 'annotations' / f'{folder}.json')
        changed[f'{key}.ann_file'] = file
        changed[f'{key}.{"img_prefix" if GENERATION == 2 else "data_prefix.img"}'] = f'{data / folder}/'
        if GENERATION > 2 and split != 'train':
            changed[f'{split}_evaluator.ann_file'] = file
    if GENERATION == 2:
        return changed | {'runner.max_epochs': epochs, 'evaluation.interval': interval}
    return changed | {'train_cfg.max_epochs': epochs, 'train_cfg.val_interval': interval}


def max_epochs(config: Any) -> int:
    """Return the epochs of a config."""
    return (config.runner if GENERATION == 2 else config.train_cfg).max_epochs


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


def train(run: Path, options: list[str], epochs: int, processes: int = 1) -> Path:
    """Train, or finish a training that was interrupted.

    Args:
        run: Folder of checkpoints and logs.
        options: ``--cfg-options`` for the demo's config.
        epochs: Epochs of the whole training.
        processes: How many share every batch.

    Returns:
        The last checkpoint.
    """
    done = newest_checkpoint(run)
    if done is not None and int(done.stem.removeprefix('epoch_')) >= epochs:
        print(f'already trained: {done}')
        return done
    command = [sys.executable, '-m', 'kw_mmdet', 'train', str(CONFIG), '--work-dir', str(run), '--seed', '0']
    command += ['--processes', str(processes), '--no-validate']  # evaluated once, below
    print(f'training {epochs} epochs in {processes} processes; checkpoints and the whole log: {run}', flush=True)
    if done is not None:
        print(f'going on from {done}')
        command += ['--resume-from', str(done)]
    run_quietly([*command, '--cfg-options', *options], run / 'train.log', show='Epoch')
    last = newest_checkpoint(run)
    if last is None:
        raise SystemExit(f'training left no checkpoint in {run}')
    return last


def evaluate(run: Path, checkpoint: Path, options: list[str], processes: int = 1) -> dict[str, float]:
    """Return box and mask average precision on the held-out images, as MMDetection's test program measures it."""
    folder = run / f'eval_{checkpoint.stem}'
    for old in folder.glob('eval_*.json'):
        old.unlink()
    command = [sys.executable, '-m', 'kw_mmdet', 'test', str(CONFIG), str(checkpoint), '--work-dir', str(folder)]
    command += ['--processes', str(processes), '--eval', 'bbox', 'segm', '--cfg-options', *options]
    print(f'evaluating on held-out images; the whole log: {run / "test.log"}', flush=True)
    run_quietly(command, run / 'test.log', show='[>')
    # MMDetection 2.x writes one file, 3.x one per run, in folders named by the time.
    if GENERATION == 2:
        return json.loads(next(folder.glob('eval_*.json')).read_text())['metric']
    metric = json.loads(max(folder.glob('*/*.json')).read_text())
    return {key.removeprefix('coco/'): value for key, value in metric.items()}


def draw(checkpoint: Path, data: Path, picture: Path, options: dict[str, Any], count: int = 12) -> None:
    """Draw detections on the first held-out images into one picture."""
    detector = Detector(load_config(str(CONFIG), options), checkpoint)
    tiles = []
    for path in sorted((data / 'val').glob('*.png'))[:count]:
        image = read_image(path)
        large = cv2.resize(image, None, fx=ENLARGED, fy=ENLARGED, interpolation=cv2.INTER_CUBIC)
        found = detector(image).above(DRAWN).apart(DRAWN)
        tiles.append(draw_found(large, found.enlarged(ENLARGED), detector.names))
    columns = 4
    rows = [np.hstack(tiles[i : i + columns]) for i in range(0, len(tiles) - columns + 1, columns)]
    write_image(picture, np.vstack(rows))


def run_quietly(command: list[str], log: Path, show: str) -> None:
    """Run a program; its output goes to a log, of which progress lines are shown."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open('a') as file:
        # Processes share the cores better than threads of one do.
        environment = {'OMP_NUM_THREADS': str(max((os.cpu_count() or 1) // 2, 1)), **os.environ}
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1
        )
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
        raise SystemExit(f'{" ".join(command[2:4])} failed; its whole output is in {log}')


def count_processes() -> int:
    """Return how many processes train: one on a GPU or a single core, else two."""
    return 1 if torch.cuda.is_available() else min(os.cpu_count() or 1, 2)


def print_table(metric: dict[str, float]) -> None:
    """Print box and mask average precision."""
    print(f'\n{"":6}' + ''.join(f'{name:>8}' for name in METRICS.values()))
    for kind, label in (('bbox', 'box'), ('segm', 'mask')):
        print(f'{label:6}' + ''.join(f'{metric[f"{kind}_{key}"]:8.3f}' for key in METRICS))


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = ROOT / 'work_dirs' / ('shapes' if GENERATION == 2 else f'shapes{GENERATION}')
    parser.add_argument('--work-dir', type=Path, default=default, help='default: %(default)s')
    parser.add_argument('--epochs', type=int, help='(those of the config)')
    parser.add_argument('--train', type=int, default=400, help='training images (default: %(default)s)')
    parser.add_argument('--val', type=int, default=100, help='held-out images (default: %(default)s)')
    parser.add_argument('--processes', type=int, choices=(1, 2, 4), default=count_processes(), help='(%(default)s)')
    args = parser.parse_args()
    work = args.work_dir.resolve()
    clock = Clock()
    data = make_shapes(work / 'data', args.train, args.val)
    clock.lap('drawing')
    epochs = args.epochs or max_epochs(load_config(str(CONFIG)))
    overrides = overridden(data, epochs, batch=BATCH // args.processes)
    options = [f'{key}={value}' for key, value in overrides.items()]
    checkpoint = train(work / 'run', options, epochs, args.processes)
    clock.lap('training')
    metric = evaluate(work / 'run', checkpoint, options, args.processes)
    clock.lap('evaluation')
    picture = work / 'detections.png'
    draw(checkpoint, data, picture, overrides)
    print_table(metric)
    print(f'\ncheckpoint: {checkpoint}\ndetections on held-out images: {picture}')
    print(f'on photographs of your own: kw-mmdet predict PHOTOGRAPHS --config {CONFIG} --checkpoint {checkpoint}')
    clock.lap('pictures')
    print(clock)


if __name__ == '__main__':
    main()
