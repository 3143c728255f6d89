"""The commands run from a checkout: draw data, train, resume, test, draw. Real programs on a tiny data set.

Under either generation of MMDetection: options are those of 2.x, which 3.x is given in its own words.
"""

import json
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip('mmdet', reason='needs MMDetection')
import demo
from kw_mmdet.cli import main
from kw_mmdet.generation import GENERATION
from kw_mmdet.predict import read_image

ROOT = Path(__file__).parent.parent
CONFIG = 'configs/shapes/mask_rcnn_kw1x_mobilenetv2_050_fpn_shapes.py'
# What the tests set, by the names of each generation.
TRAIN_DATA = 'data.train' if GENERATION == 2 else 'train_dataloader.dataset'
BATCH = 'data.samples_per_gpu' if GENERATION == 2 else 'train_dataloader.batch_size'
HALF = 'fp16.loss_scale=512.' if GENERATION == 2 else 'optim_wrapper.type=AmpOptimWrapper'
LOG_INTERVAL = 'log_config.interval' if GENERATION == 2 else 'default_hooks.logger.interval'


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, 'PYTHON': sys.executable, 'MPLBACKEND': 'Agg', **environment}
    return subprocess.run([str(c) for c in command], cwd=ROOT, env=env, capture_output=True, text=True, timeout=280)


@pytest.fixture(scope='module')
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('shapes') / 'data'
    done = run(sys.executable, 'tools/make_shapes.py', folder, '--train', '6', '--val', '3', '--size', '96')
    assert done.returncode == 0, done.stderr
    return folder


def cfg_options(data: Path, epochs: int = 1, **others: int) -> list[str]:
    """Return options that name the data and the length of the training; evaluated after every epoch."""
    values = demo.overridden(data, epochs, evaluate_every=1) | {LOG_INTERVAL: 1, BATCH: 2} | others
    return ['--cfg-options', *(f'{key}={value}' for key, value in values.items())]


@pytest.fixture(scope='module')
def options(data) -> list[str]:
    return cfg_options(data)


def command(name: str, *arguments: str | Path) -> list[str]:
    return ['bash', f'tools/dist_{name}.sh', *map(str, arguments)]


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f'/proc/{pid}/task/{pid}/children').read_text().split()]


def start(*command: str | Path, **environment: str) -> subprocess.Popen[str]:
    env = {**os.environ, 'PYTHON': sys.executable, **environment}
    return subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def newest_epoch(work: Path) -> int:
    return max(int(path.stem.removeprefix('epoch_')) for path in work.glob('epoch_*.pth'))


@pytest.fixture(scope='module')
def trained(data, tmp_path_factory) -> Path:
    """Train two processes, break off after an epoch and its evaluation, resume on two machines of one process.

    Broken off by the end of one process, under 3.x as a terminal does it: all of them hear the signal.
    """
    work = tmp_path_factory.mktemp('run')
    options = cfg_options(data, 99, **{BATCH: 1})
    first = start(*command('train', CONFIG, '2', '--work-dir', work, '--seed', '1', *options))
    lines: list[str] = []
    for line in first.stdout:
        lines.append(line)
        if 'Epoch(val) [1]' in line and 'segm_mAP_50' in line:
            (torchrun,) = children(first.pid)
            if GENERATION == 2:
                os.kill(children(torchrun)[0], signal.SIGTERM)
            else:
                os.killpg(first.pid, signal.SIGINT)
    text = ''.join(lines)
    assert first.wait() not in (0, None), text
    assert re.search(r'Epoch(\(train\) *)? \[1\]\[3/3\]', text), text
    assert re.search(r'Epoch\(val\) \[1\]\[2(/2)?\].*bbox_mAP', text), text
    assert (work / 'epoch_1.pth').is_file()

    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        machines = dict(NNODES='2', PORT=str(probe.getsockname()[1]))
    done = newest_epoch(work)
    options = cfg_options(data, done + 1, **{BATCH: 1})
    resume = command('train', CONFIG, '1', '--work-dir', work, '--auto-resume', *options)
    both = [start(*resume, **machines, NODE_RANK=rank) for rank in '01']
    for process in both:
        output, _ = process.communicate(timeout=280)
        assert process.returncode == 0, output
        text = output if 'resumed epoch' in output.lower() else text
    assert re.search(f'resumed epoch:? {done}, iter:? {3 * done}', text.lower()), text
    assert newest_epoch(work) == done + 1
    return work / f'epoch_{done + 1}.pth'


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


def test_training_writes_checkpoints(trained):
    checkpoint = torch.load(trained, map_location='cpu', weights_only=True)
    assert any(key.startswith('backbone.model.warehouses.') for key in checkpoint['state_dict'])
    assert not any('assignment' in key for key in checkpoint['state_dict'])


def measured(work: Path) -> dict[str, float]:
    """Return what a test program measured, without the times that it took."""
    if GENERATION == 2:
        return json.loads(next(work.glob('eval_*.json')).read_text())['metric']
    metric = json.loads(next(work.glob('*/*.json')).read_text())
    return {key.removeprefix('coco/'): value for key, value in metric.items() if not key.endswith('time')}


def detections(file: Path) -> list[dict[str, list]]:
    """Return per image what ``--out`` wrote: boxes (with scores and classes) and masks."""
    found = pickle.loads(file.read_bytes())
    if GENERATION == 2:
        return [dict(boxes=boxes, masks=masks) for boxes, masks in found]
    found = [image['pred_instances'] for image in found]
    return [
        dict(boxes=[one[key].numpy() for key in ('bboxes', 'scores', 'labels')], masks=one['masks']) for one in found
    ]


# What threads a process has left when the interpreter begins to end: gloo's may abort it.
THREADS = """
import atexit, os, pathlib

@atexit.register
def write():
    names = sorted(task.joinpath('comm').read_text().strip() for task in pathlib.Path('/proc/self/task').iterdir())
    pathlib.Path(os.environ['THREADS'], str(os.getpid())).write_text(' '.join(names))
"""


def test_two_processes_test_as_one_does_which_also_draws(trained, options, tmp_path):
    (tmp_path / 'left').mkdir()
    (tmp_path / 'sitecustomize.py').write_text(THREADS)  # of every process
    paths = os.pathsep.join([str(tmp_path), os.environ.get('PYTHONPATH', '')])
    metrics, found = [], []
    # 3.x shows in a window what it draws.
    show = ['--show'] if GENERATION == 2 else []
    for processes, drawing in (
        ('2', []),
        ('1', [*show, '--show-dir', tmp_path / 'drawn', '--show-score-thr', '0.0']),
    ):
        work = tmp_path / processes
        evaluate = ['--eval', 'bbox', 'segm', '--work-dir', work, '--out', tmp_path / f'{processes}.pkl', *drawing]
        command_line = command('test', CONFIG, trained, processes, *evaluate, *options)
        done = run(*command_line, PYTHONPATH=paths, THREADS=str(tmp_path / 'left'))
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        metrics.append(measured(work))
        found.append(detections(tmp_path / f'{processes}.pkl'))
    assert {'bbox_mAP', 'bbox_mAP_50', 'segm_mAP', 'segm_mAP_50'} <= metrics[0].keys()
    assert metrics[0] == metrics[1]
    assert len(found[0]) == len(found[1]) == 3
    assert sum(len(boxes) for image in found[0] for boxes in image['boxes']) > 0
    for two, one in zip(*found, strict=True):
        for boxes, expected in zip(two['boxes'], one['boxes'], strict=True):
            assert np.array_equal(boxes, expected)
        assert two['masks'] == one['masks']
    assert len(sorted((tmp_path / 'drawn').rglob('*.png'))) == 3
    left = [file.read_text() for file in (tmp_path / 'left').iterdir()]
    assert len(left) >= 3
    assert not any('gloo' in names for names in left)


def test_single_image(trained, data, tmp_path):
    image = data / 'val/00000.png'
    out = tmp_path / 'sub' / 'drawn.png'
    done = run(sys.executable, 'tools/image_demo.py', image, CONFIG, trained, '--out-file', out, '--score-thr', '0.0')
    assert done.returncode == 0, done.stderr
    assert cv2.imread(str(out)).shape == cv2.imread(str(image)).shape
    assert 'drawn:' in done.stderr


def odd_images(folder: Path) -> None:
    """Write what people have: grey, 16-bit, RGBA, CMYK, rotated, in other formats, small, and broken ones."""
    folder.mkdir()
    pixels = cv2.resize(np.random.RandomState(0).randint(0, 255, (3, 4, 3), np.uint8), (64, 40))
    image = Image.fromarray(pixels)
    image.convert('L').save(folder / 'grey.png')
    cv2.imwrite(str(folder / 'deep.png'), pixels[..., ::-1].astype(np.uint16) * 257)
    image.convert('RGBA').save(folder / 'transparent.png')
    image.convert('CMYK').save(folder / 'print.jpg')
    image.convert('CMYK').save(folder / 'print.tif')
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    image.save(folder / 'turned.jpg', exif=exif)
    image.resize((1, 1)).save(folder / 'dot.png')
    (folder / 'inner').mkdir()
    image.save(folder / 'inner/grey.png')
    (folder / 'empty.jpg').touch()
    (folder / 'text.png').write_text('no image')
    for name in ('cut.jpg', 'cut.png'):
        image.save(folder / name)
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: len(whole) // 2])


def test_predict_reads_what_people_have(trained, tmp_path, capsys):
    odd_images(tmp_path / 'images')
    # Without class names, and without the optimizer.
    bare = tmp_path / 'bare.pth'
    torch.save({'state_dict': torch.load(trained, weights_only=True)['state_dict']}, bare)
    output = tmp_path / 'images' / 'found'
    arguments = ['predict', str(tmp_path / 'images'), '--config', CONFIG, '--checkpoint', str(bare)]
    arguments += ['--output', str(output), '--score-thr', '0']
    for _ in range(2):  # drawings of the first time are no images of the second
        assert main(arguments) == 1
        said = capsys.readouterr()
        assert '8 of 12 images' in said.out
        for name, message in [('empty.jpg', 'is empty'), ('cut.jpg', 'cut off'), ('cut.png', 'cut off')]:
            assert any(name in line and message in line for line in said.err.splitlines()), (name, said.err)
        assert 'text.png' in said.err
        assert 'Traceback' not in said.err
    drawn = {path.relative_to(output).as_posix() for path in output.rglob('*') if path.is_file()}
    names = {'grey.png', 'deep.png', 'transparent.png', 'print.jpg', 'print.tif', 'turned.jpg', 'dot.png'}
    assert drawn == {*names, 'inner/grey.png', 'detections.json'}
    assert cv2.imread(str(output / 'turned.jpg')).shape == (64, 40, 3)
    found = json.loads((output / 'detections.json').read_text())
    assert found
    for result in found:
        assert result['image_id'] in drawn
        assert result['category_name'] == ('circle', 'square', 'triangle')[result['category_id'] - 1]
        assert 0 <= result['score'] <= 1
        assert len(result['bbox']) == 4
    turned = next(result for result in found if result['image_id'] == 'turned.jpg')
    assert turned['segmentation']['size'] == [64, 40]


def test_images_are_read_alike_in_every_form(tmp_path):
    odd_images(tmp_path / 'images')
    image = read_image(tmp_path / 'images/inner/grey.png')
    for name in ('deep.png', 'transparent.png'):
        assert np.array_equal(read_image(tmp_path / 'images' / name), image)
    grey = read_image(tmp_path / 'images/grey.png')
    assert (grey[..., 0] == grey[..., 1]).all()
    for name in ('print.jpg', 'print.tif'):
        assert np.abs(read_image(tmp_path / 'images' / name).astype(int) - image).mean() < 10
    assert np.abs(read_image(tmp_path / 'images/turned.jpg').astype(int) - np.rot90(image, -1)).mean() < 10


def test_info_says_what_a_config_stands_for(capsys):
    assert main(['info', 'mask_rcnn_kw1x_mobilenetv2_100_fpn_1x_coco']) == 0
    lines = dict(re.split(r'  +', line, maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines['levels'] == (
        'stride 4: 24 channels, stride 8: 32 channels, stride 16: 96 channels, stride 32: 1280 channels'
    )
    assert 'backbone.model.conv_stem' in lines['frozen']
    assert 'kw-timm/kw1x_mobilenetv2_100.osvai_in1k on the Hub' in lines['backbone weights']
    assert lines['train classes'] == "COCO's own"
    assert lines['length'] == '12 epochs'


@pytest.mark.parametrize(
    ('command', 'message'),
    [
        (['train', 'configs/nowhere.py'], "no config 'configs/nowhere.py'"),
        (['train', 'mask_rcnn_kw1x_resnet50_fpn'], 'Similar ones are'),
        (['train', CONFIG, '--processes', '0'], 'GPUS) must be a positive number'),
        (['test', CONFIG, 'nowhere.pth', '--eval', 'bbox'], "no checkpoint 'nowhere.pth'"),
        (['train', CONFIG, '--cfg-options', 'model.neck.in_channels=[1,2,3,4]'], 'Neck and backbone disagree'),
        (['train', CONFIG, '--cfg-options', f'{TRAIN_DATA}.ann_file=nowhere.json'], 'no annotation file'),
        (['train', CONFIG, '--cfg-options', 'oops'], 'takes KEY=VALUE'),
        (['train', CONFIG, '--cfg-options', HALF], 'Half precision'),
        (['predict', 'nowhere', '--config', CONFIG, '--checkpoint', 'nowhere.pth'], "no image or folder 'nowhere'"),
        (['info', 'nowhere'], "no config 'nowhere'"),
    ],
)
def test_errors_before_anything_is_run(command, message, options, capsys):
    if '--cfg-options' in command:
        command = [*command[:-1], *options[1:], command[-1]]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count('\n') == 1


@pytest.mark.parametrize('name', ['train', 'test'])
def test_scripts_say_how_they_are_used(name):
    done = run(*command(name, CONFIG))
    assert done.returncode == 2
    assert 'usage:' in done.stderr


def test_a_script_passes_errors_on():
    done = run(*command('train', 'configs/nowhere.py', '2'))
    assert done.returncode == 2
    assert "no config 'configs/nowhere.py'" in done.stderr
    assert 'Traceback' not in done.stderr


def test_annotations_without_the_named_classes(options, tmp_path, capsys):
    config = tmp_path / 'config.py'
    classes = "('circle', 'square', 'hexagon')"
    if GENERATION == 2:
        changed = f'data = dict(train=dict(classes={classes}))'
    else:
        changed = f'train_dataloader = dict(dataset=dict(metainfo=dict(classes={classes})))'
    config.write_text(f"_base_ = '{ROOT / CONFIG}'\n{changed}\n")
    assert main(['train', str(config), *options]) == 2
    assert 'has no class named hexagon; it has circle, square, triangle' in capsys.readouterr().err


def test_a_checkpoint_of_another_detector_is_refused(trained, data, tmp_path, capsys):
    other = tmp_path / 'other.pth'
    torch.save({'state_dict': {'backbone.weight': torch.zeros(1)}}, other)
    cut = tmp_path / 'cut.pth'
    cut.write_bytes(trained.read_bytes()[:10000])
    for checkpoint, message in ((other, 'does not fit the config'), (cut, 'cut off')):
        arguments = ['predict', str(data / 'val'), '--config', CONFIG, '--checkpoint', str(checkpoint)]
        assert main([*arguments, '--output', str(tmp_path / 'found')]) == 2
        assert message in capsys.readouterr().err


def test_demo_end_to_end_after_an_interruption(tmp_path, monkeypatch, capsys):
    data = demo.make_shapes(tmp_path / 'data', 4, 4)
    options = [f'{key}={value}' for key, value in demo.overridden(data, 1).items()]
    checkpoint = demo.train(tmp_path / 'run', options, 1)
    assert checkpoint.name == 'epoch_1.pth'
    # As an interruption while a checkpoint is written would leave it.
    whole = checkpoint.read_bytes()
    (tmp_path / 'run/epoch_2.pth').write_bytes(whole[: len(whole) // 2])
    monkeypatch.setattr(sys, 'argv', ['demo.py', *f'--work-dir {tmp_path} --train 4 --val 4 --epochs 2'.split()])
    demo.main()
    said = capsys.readouterr().out
    assert 'AP50' in said
    assert cv2.imread(str(tmp_path / 'detections.png')).shape[:2] == (384, 4 * 384)
    assert 'epoch_2.pth cannot be read' in said
    assert 'going on from' in said
    assert f'checkpoint: {tmp_path / "run/epoch_2.pth"}\n' in said
    assert 'training' in said.splitlines()[-1]  # how long it took
