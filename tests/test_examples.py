"""Every program under `examples/`, run at small size."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
PROGRAMS = sorted((ROOT / 'examples').glob('*.py'))
SMALL = 'kw1x_mobilenetv2_050'


def run(name: str, folder: Path, *arguments: str) -> str:
    """Run a program in a folder and return what it printed."""
    env = os.environ | {'OMP_NUM_THREADS': '1'}
    command = [sys.executable, str(ROOT / 'examples' / f'{name}.py'), *arguments]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_they_are_short_and_listed():
    about = (ROOT / 'examples/README.md').read_text()
    tested = Path(__file__).read_text()
    for program in PROGRAMS:
        assert len(program.read_text().splitlines()) < 80, program.name
        assert f'`{program.name}`' in about
        assert f"'{program.stem}'" in tested


@pytest.mark.slow
def test_kernelize_own(tmp_path):
    said = run('kernelize_own', tmp_path, '--steps', '3')
    differs = float(said.split('differs from the static network by ')[1].split()[0])
    assert differs < 1e-5


@pytest.mark.slow
def test_finetune_folder(tmp_path):
    """Two classes that a network can tell apart: red and blue images."""
    for split, count in (('train', 8), ('val', 2)):
        for channel, name in ((0, 'red'), (2, 'blue')):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = np.random.default_rng(i).integers(0, 60, (64, 64, 3), np.uint8)
                pixels[..., channel] += 180
                Image.fromarray(pixels).save(folder / f'{i}.png')
    said = run('finetune_folder', tmp_path, '.', '--name', SMALL, '--random', '--epochs', '2', '--batch', '8')
    assert 'epoch 2:' in said
    assert 'classes blue, red' in said
    assert (tmp_path / 'finetuned.pth').is_file()


@pytest.mark.slow
def test_own_coco_mask_rcnn(tmp_path):
    pytest.importorskip('mmdet', reason='needs MMDetection')
    from make_shapes import make_shapes

    make_shapes(tmp_path / 'shapes', train=4, val=2, size=96)
    said = run(
        *('own_coco_mask_rcnn', tmp_path, 'circle', 'square', 'triangle', '--epochs', '1'),
        *('--base', 'shapes/mask_rcnn_kw1x_mobilenetv2_050_fpn_shapes.py'),
        *('--train', 'shapes/annotations/train.json', 'shapes/train'),
        *('--val', 'shapes/annotations/val.json', 'shapes/val'),
    )
    assert 'bbox_mAP' in said or 'coco/bbox_mAP' in said
    assert (tmp_path / 'own_data/epoch_1.pth').is_file()


@pytest.mark.slow
def test_torchvision_mask_rcnn(tmp_path):
    said = run('torchvision_mask_rcnn', tmp_path, '--name', SMALL, '--random', '--size', '96')
    assert 'loss_mask' in said
    assert 'boxes, masks' in said


@pytest.mark.slow
def test_export_onnx(tmp_path):
    pytest.importorskip('onnxruntime', reason='needs the extra export')
    said = run('export_onnx', tmp_path, SMALL, '--random', '--size', '64')
    assert 'batch 3, 96 x 96' in said
    assert (tmp_path / 'network.onnx').is_file()


@pytest.mark.packages
def test_transformers_detr(tmp_path):
    pytest.importorskip('transformers')
    said = run('transformers_detr', tmp_path, '--name', SMALL, '--random', '--size', '96', '--layers', '1')
    assert float(said.split('differs by ')[1]) < 1e-4


@pytest.mark.packages
def test_smp_unet(tmp_path):
    pytest.importorskip('segmentation_models_pytorch')
    said = run('smp_unet', tmp_path, '--name', SMALL, '--size', '64', '--steps', '2')
    assert 'intersection over union' in said
    assert (tmp_path / 'unet.pth').is_file()
