"""The commands run from a checkout: draw data, train, resume, test, draw. Real programs on a tiny data set."""

import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import pytest
import torch

pytest.importorskip('mmdet', reason='needs MMDetection')
ROOT = Path(__file__).parent.parent
CONFIG = 'configs/shapes/mask_rcnn_kw1x_mobilenetv2_050_fpn_shapes.py'


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, 'PYTHON': sys.executable, 'MPLBACKEND': 'Agg', **environment}
    return subprocess.run([str(c) for c in command], cwd=ROOT, env=env, capture_output=True, text=True, timeout=280)


@pytest.fixture(scope='module')
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('shapes') / 'data'
    done = run(sys.executable, 'tools/make_shapes.py', folder, '--train', '6', '--val', '3', '--size', '96')
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope='module')
def options(data) -> list[str]:
    paths = [f'data.{split}.img_prefix={data / folder}/' for split, folder in (('train', 'train'), ('test', 'val'))]
    paths += [
        f'data.{split}.ann_file={data}/annotations/{folder}.json'
        for split, folder in (('train', 'train'), ('test', 'val'))
    ]
    paths += [f'data.val.ann_file={data}/annotations/val.json', f'data.val.img_prefix={data}/val/']
    return ['--cfg-options', *paths, 'log_config.interval=1', 'data.samples_per_gpu=2']


@pytest.fixture(scope='module')
def trained(options, tmp_path_factory) -> Path:
    work = tmp_path_factory.mktemp('run')
    done = run('bash', 'tools/dist_train.sh', CONFIG, '1', '--work-dir', work, *options, 'runner.max_epochs=1')
    assert done.returncode == 0, done.stdout + done.stderr
    assert 'Epoch [1][3/3]' in done.stdout + done.stderr
    return work


def test_drawn_data_is_coco_and_repeatable(data, tmp_path):
    annotations = json.loads((data / 'annotations/val.json').read_text())
    assert {c['name'] for c in annotations['categories']} == {'circle', 'square', 'triangle'}
    assert len(annotations['images']) == 3
    for annotation in annotations['annotations']:
        x, y, w, h = annotation['bbox']
        assert x >= 0
        assert y >= 0
        assert x + w <= 96
        assert y + h <= 96
        assert 0 < annotation['area'] <= w * h
    again = run(sys.executable, 'tools/make_shapes.py', tmp_path / 'b', '--train', '6', '--val', '3', '--size', '96')
    assert again.returncode == 0
    assert json.loads((tmp_path / 'b/annotations/val.json').read_text()) == annotations
    other = run(sys.executable, 'tools/make_shapes.py', data, '--train', '7')
    assert other.returncode == 2
    assert 'is not this data set' in other.stderr
    assert json.loads((data / 'annotations/val.json').read_text()) == annotations


def test_training_writes_checkpoints_and_resumes(trained, options):
    checkpoint = torch.load(trained / 'epoch_1.pth', map_location='cpu', weights_only=True)
    assert any(key.startswith('backbone.model.warehouses.') for key in checkpoint['state_dict'])
    assert not any('assignment' in key for key in checkpoint['state_dict'])
    done = run(
        'bash',
        'tools/dist_train.sh',
        CONFIG,
        '1',
        '--work-dir',
        trained,
        '--auto-resume',
        *options,
        'runner.max_epochs=2',
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert 'resumed epoch 1, iter 3' in done.stdout + done.stderr
    assert (trained / 'epoch_2.pth').is_file()


def test_testing_evaluates_and_draws(trained, options, data, tmp_path):
    done = run(
        'bash', 'tools/dist_test.sh', CONFIG, trained / 'epoch_1.pth', '1', '--eval', 'bbox', 'segm',
        '--show-dir', tmp_path / 'drawn', '--show-score-thr', '0.0', '--work-dir', tmp_path, *options,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    metric = json.loads(next(tmp_path.glob('eval_*.json')).read_text())['metric']
    assert {'bbox_mAP', 'bbox_mAP_50', 'segm_mAP', 'segm_mAP_50'} <= metric.keys()
    drawn = sorted((tmp_path / 'drawn').rglob('*.png'))
    assert len(drawn) == 3
    shown = run(
        'bash', 'tools/dist_test.sh', CONFIG, trained / 'epoch_1.pth', '1', '--eval', 'bbox', 'segm', '--show', *options
    )
    assert shown.returncode == 0, shown.stdout + shown.stderr


def test_single_image(trained, data, tmp_path):
    image = data / 'val/00000.png'
    out = tmp_path / 'sub' / 'drawn.png'
    arguments = ('--out-file', out, '--score-thr', '0.0')
    done = run(sys.executable, 'tools/image_demo.py', image, CONFIG, trained / 'epoch_1.pth', *arguments)
    assert done.returncode == 0, done.stderr
    assert cv2.imread(str(out)).shape[:2] >= cv2.imread(str(image)).shape[:2]
    broken = tmp_path / 'broken.png'
    broken.write_bytes(b'no image')
    done = run(sys.executable, 'tools/image_demo.py', broken, CONFIG, trained / 'epoch_1.pth')
    assert done.returncode == 2
    assert 'not an image' in done.stderr


@pytest.mark.parametrize(
    ('command', 'message'),
    [
        (['dist_train.sh', 'configs/nowhere.py', '1'], "no config 'configs/nowhere.py'"),
        (['dist_train.sh', CONFIG, '0'], 'GPUS must be a positive number'),
        (['dist_train.sh', CONFIG], 'usage:'),
        (['dist_test.sh', CONFIG, 'nowhere.pth', '1'], "no checkpoint 'nowhere.pth'"),
        (
            ['dist_train.sh', CONFIG, '1', '--cfg-options', 'model.neck.in_channels=[1,2,3,4]'],
            'Neck and backbone disagree',
        ),
        (['dist_train.sh', CONFIG, '1', '--cfg-options', 'data.train.ann_file=nowhere.json'], 'no annotation file'),
    ],
)
def test_errors_before_anything_is_run(command, message, options):
    if '--cfg-options' in command:
        command = [*command[:4], *options[1:], *command[4:]]
    done = run('bash', f'tools/{command[0]}', *command[1:])
    assert done.returncode != 0
    assert message in done.stderr
    assert 'Traceback' not in done.stderr


def test_annotations_without_the_named_classes(data, options, tmp_path):
    config = tmp_path / 'config.py'
    config.write_text(f"_base_ = '{ROOT / CONFIG}'\ndata = dict(train=dict(classes=('circle', 'square', 'hexagon')))\n")
    done = run('bash', 'tools/dist_train.sh', config, '1', *options)
    assert done.returncode != 0
    assert 'has no class named hexagon; it has circle, square, triangle' in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason='checks what is said without a GPU')
def test_several_processes_need_gpus():
    done = run('bash', 'tools/dist_train.sh', CONFIG, '2')
    assert done.returncode == 2
    assert 'no GPU is visible' in done.stderr


def test_demo_end_to_end_and_again(tmp_path):
    command = [sys.executable, 'tools/demo.py', '--work-dir', tmp_path, '--train', '8', '--val', '12', '--epochs', '1']
    done = run(*command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert 'AP50' in done.stdout
    assert cv2.imread(str(tmp_path / 'detections.png')).shape[:2] == (3 * 384, 4 * 384)
    # As an interruption while a checkpoint is written would leave it.
    checkpoint = tmp_path / 'run/epoch_1.pth'
    whole = checkpoint.read_bytes()
    (tmp_path / 'run/epoch_2.pth').write_bytes(whole[: len(whole) // 2])
    again = run(*command[:-1], '2')
    assert again.returncode == 0, again.stdout + again.stderr
    assert 'epoch_2.pth cannot be read' in again.stdout
    assert 'going on from' in again.stdout
    assert 'epoch_2.pth' in again.stdout.splitlines()[-3]
