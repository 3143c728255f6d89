"""Every config means the same to both generations of MMDetection, and their checkpoints can be exchanged."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from kw_timm.random_weights import settle

pytest.importorskip('mmdet', reason='needs MMDetection')
import mmdet_forms
from mmdet_forms import TRIED, all_configs

if mmdet_forms.GENERATION != 2:
    pytest.skip('compares from MMDetection 2', allow_module_level=True)

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / 'configs'


def draw_data(folder: Path) -> None:
    """Three images, of which one has no object and one is too small, beside one that can be trained on."""
    generator = np.random.default_rng(0)
    sizes = {1: (200, 150), 2: (30, 30), 3: (200, 150)}
    for i, (width, height) in sizes.items():
        coarse = generator.integers(0, 255, (height // 10, width // 10, 3), dtype=np.uint8)
        cv2.imwrite(str(folder / f'{i}.png'), cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC))
    names = ('person', 'car', 'circle', 'square')
    boxes = {1: (10.0, 20.0, 90.0, 70.0), 2: (100.0, 60.0, 80.0, 75.0), 3: (60.0, 30.0, 40.0, 90.0)}
    objects = [
        dict(id=i, image_id=1, category_id=category, bbox=[x, y, w, h], area=w * h, iscrowd=0)
        | dict(segmentation=[[x, y, x + w, y + h / 4, x + w / 2, y + h]])
        for i, (x, y, w, h) in boxes.items()
        for category in (1, 3)
    ]
    objects.append(objects[0] | dict(image_id=2))
    for i, item in enumerate(objects):
        item['id'] = i + 1
    images = [dict(id=i, file_name=f'{i}.png', width=w, height=h) for i, (w, h) in sizes.items()]
    categories = [dict(id=i + 1, name=name) for i, name in enumerate(names)]
    (folder / 'annotations.json').write_text(
        json.dumps(dict(images=images, annotations=objects, categories=categories))
    )


@pytest.fixture(scope='module')
def both(tmp_path_factory, mmdet3_python) -> tuple[dict[str, Any], dict[str, Any], Path]:
    """What MMDetection 2 makes of the configs, what 3 does, and the folder of the checkpoints that both wrote."""
    work = tmp_path_factory.mktemp('forms')
    data, checkpoints = work / 'data', work / 'checkpoints'
    data.mkdir()
    checkpoints.mkdir()
    draw_data(data)
    for name in TRIED:
        torch.manual_seed(0)
        model = mmdet_forms.build_detector(mmdet_forms.Config.fromfile(str(CONFIGS / f'{name}.py')).model)
        settle(model.backbone)
        for parameter in (model.rpn_head.rpn_cls.weight, model.roi_head.bbox_head.fc_cls.weight):
            torch.nn.init.normal_(parameter, std=0.2)  # scores that can be told apart
        mmdet_forms.save(model, checkpoints / f'{Path(name).name}.pth')
    command = [mmdet3_python, ROOT / 'tests/mmdet_forms.py', CONFIGS, data, checkpoints, work / '3.pt']
    paths = os.pathsep.join(map(str, (ROOT, ROOT / 'adapters')))
    env = {**os.environ, 'PYTHONPATH': paths}
    other = subprocess.run(list(map(str, command)), env=env, capture_output=True, text=True, timeout=280)
    assert other.returncode == 0, other.stdout + other.stderr
    first = mmdet_forms.main(CONFIGS, data, checkpoints, work / '2.pt')
    return first, torch.load(work / '3.pt', weights_only=True), work


@pytest.mark.parametrize('name', all_configs(CONFIGS))
def test_configs_mean_the_same(both, name):
    ours, theirs = both[0]['described'][name], both[1]['described'][name]
    for part in ours['settings']:
        assert ours['settings'][part] == theirs['settings'][part], part
    assert ours == theirs
    assert len(ours['groups']) + len(ours['frozen']) > 50


def test_learning_rates_of_every_step(both):
    assert len({tuple(rates) for rates in both[0]['rates'].values()}) == 3
    for name, rates in both[0]['rates'].items():
        epochs = both[0]['described'][name]['settings']['epochs']
        assert len(rates) == epochs * mmdet_forms.STEPS
        assert rates[0] < rates[1]
        assert both[1]['rates'][name] == pytest.approx(rates, rel=1e-9)


@pytest.mark.parametrize('name', TRIED)
def test_data_losses_and_detections(both, name):
    ours, theirs = both[0]['tried'][name], both[1]['tried'][name]
    assert ours['length'] == theirs['length'] == 1
    assert len(ours['seen']) == len(theirs['seen']) >= mmdet_forms.SEEDS
    for a, b in zip(ours['seen'], theirs['seen'], strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=1e-4)
    for key, value in ours['losses'].items():
        torch.testing.assert_close(theirs['losses'][key], value, rtol=1e-3, atol=1e-4, msg=key)
    for a, b in zip(ours['detections'], theirs['detections'], strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-3)
    assert len(ours['detections'][0]) > 10


@pytest.mark.parametrize('name', TRIED)
def test_checkpoints_can_be_exchanged(both, name):
    stem = Path(name).name
    weights = [torch.load(both[2] / f'{stem}_by_{i}.pth', weights_only=True)['state_dict'] for i in (2, 3)]
    torch.testing.assert_close(weights[1], weights[0], rtol=0, atol=0)
    model = mmdet_forms.build_detector(mmdet_forms.Config.fromfile(str(CONFIGS / f'{name}.py')).model)
    mmdet_forms.load_checkpoint(model, str(both[2] / f'{stem}_by_3.pth'), map_location='cpu', strict=True)
