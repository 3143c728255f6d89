"""How detectors begin, compared: what is trained, and on real photographs how well."""

import json
from pathlib import Path

import pytest

pytest.importorskip('mmdet', reason='needs MMDetection')
import compare_starts
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


@pytest.mark.slow
@pytest.mark.skipif(not PHOTOGRAPHS.is_dir(), reason='the photographs are not beside the checkout')
def test_kw_learns_from_few_photographs_as_well_as_static(tmp_path, capsys):
    """At one budget, over three seeds, KW is not below static by more than the spread of seeds: half an hour."""
    files = [str(PHOTOGRAPHS / name) for name in ('train.json', 'val.json', 'images')]
    starts = ['static', 'kw', 'static from static', 'kw from static']
    compare_starts.main([*files, '--epochs', '4', '--seeds', '3', '--work-dir', str(tmp_path), '--starts', *starts])
    table = {line[:20].strip(): line[20:].split() for line in capsys.readouterr().out.splitlines() if '+-' in line}
    for kw, static in (('kw', 'static'), ('kw from static', 'static from static')):
        mean, spread = float(table[static][0]), max(float(table[static][2]), float(table[kw][2]))
        assert float(table[kw][0]) > mean - spread, table
