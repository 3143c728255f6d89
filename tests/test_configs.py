"""Every config of the published table: hyper-parameters, a training step, an inference."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip('mmdet', reason='needs MMDetection')
from kw_mmdet import check_config
from kw_mmdet.optim import convnext_layer_id
from mmcv import Config
from mmcv.runner import build_optimizer
from mmdet.core.mask import BitmapMasks
from mmdet.models import build_detector

ROOT = Path(__file__).parent.parent / 'configs'
BACKBONES = (
    'resnet50',
    'kw1x_resnet50',
    'kw4x_resnet50',
    'mobilenetv2_100',
    'kw1x_mobilenetv2_100',
    'kw4x_mobilenetv2_100',
    'convnext_tiny',
    'kw1x_convnext_tiny',
)
CHANNELS = {
    'resnet50': [256, 512, 1024, 2048],
    'mobilenetv2_100': [24, 32, 96, 1280],
    'convnext_tiny': [96, 192, 384, 768],
}


MASK, FASTER = ([f'{d}/{d}_{b}' for b in BACKBONES] for d in ('mask_rcnn', 'faster_rcnn'))
# Of every family one, and one Faster R-CNN: what the others consist of is equal to parts of these. All are built by
# test_generations.py.
QUICKLY = [
    name if name in FASTER[4:5] or (name in MASK and 'kw1x' in name) else pytest.param(name, marks=pytest.mark.slow)
    for name in (*MASK, *FASTER)
]


def read(name: str) -> Config:
    return Config.fromfile(str(ROOT / f'{name}_fpn_1x_coco.py'))


@pytest.fixture(scope='module', params=[*MASK, *FASTER])
def config(request) -> Config:
    return read(request.param)


def family(config: Config) -> str:
    return config.model.backbone.name.rpartition('x_')[2]


def test_there_is_a_config_for_every_row():
    for detector in ('mask_rcnn', 'faster_rcnn'):
        names = {path.stem for path in (ROOT / detector).glob('*.py')}
        assert names == {f'{detector}_{backbone}_fpn_1x_coco' for backbone in BACKBONES}


def test_hyper_parameters(config):
    model, is_convnext = config.model, family(config) == 'convnext_tiny'
    assert config.runner == dict(type='EpochBasedRunner', max_epochs=12)
    assert config.lr_config == dict(
        policy='step', warmup='linear', warmup_iters=500, warmup_ratio=0.001, step=[9, 11] if is_convnext else [8, 11]
    )
    assert (config.optimizer.type, config.optimizer.lr, config.optimizer.weight_decay) == ('AdamW', 1e-4, 0.05)
    assert tuple(config.optimizer.betas) == (0.9, 0.999)
    assert config.data.samples_per_gpu == 2
    assert list(model.neck.in_channels) == CHANNELS[family(config)]
    assert (model.neck.out_channels, model.neck.num_outs) == (256, 5)
    anchors = model.rpn_head.anchor_generator
    assert (anchors.scales, anchors.ratios, anchors.strides) == ([8], [0.5, 1.0, 2.0], [4, 8, 16, 32, 64])
    assert model.rpn_head.loss_bbox.type == model.roi_head.bbox_head.loss_bbox.type == 'L1Loss'
    assert model.roi_head.bbox_head.num_classes == 80
    assert model.roi_head.bbox_roi_extractor.roi_layer == dict(type='RoIAlign', output_size=7, sampling_ratio=0)
    if model.type == 'MaskRCNN':
        assert model.roi_head.mask_roi_extractor.roi_layer == dict(type='RoIAlign', output_size=14, sampling_ratio=0)
        assert config.evaluation.metric == ['bbox', 'segm']
    else:
        assert 'mask_head' not in model.roi_head
        assert config.evaluation.metric == ['bbox']
    backbone = model.backbone
    assert backbone.norm_eval is True
    assert backbone.get('frozen_stages', -1) == (-1 if is_convnext else 1)
    drop_path = {'resnet50': 0.1 if backbone.name.startswith('kw') else 0.0, 'mobilenetv2_100': 0.0}
    assert backbone.get('drop_path_rate', 0.0) == drop_path.get(family(config), 0.4)
    assert backbone.get('ls_init_value') == (1.0 if is_convnext else None)
    assert backbone.init_cfg == dict(type='Pretrained', checkpoint=f'timm://{backbone.name}')


def test_augmentation(config):
    pipeline = {step.type: step for step in config.data.train.pipeline}
    assert pipeline['RandomFlip'].flip_ratio == 0.5
    assert pipeline['Normalize'].mean == [123.675, 116.28, 103.53]
    assert pipeline['Normalize'].std == [58.395, 57.12, 57.375]
    assert pipeline['Normalize'].to_rgb is True
    assert pipeline['Pad'].size_divisor == 32
    first, second = pipeline['AutoAugment'].policies
    sides = [(side, 1333) for side in (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)]
    assert [tuple(s) for s in first[0].img_scale] == sides
    small, crop, again = second
    assert [tuple(s) for s in small.img_scale] == [(400, 1333), (500, 1333), (600, 1333)]
    assert (crop.crop_type, crop.crop_size, crop.allow_negative_crop) == ('absolute_range', (384, 600), True)
    assert [tuple(s) for s in again.img_scale] == sides
    assert again.override is True
    test = config.data.test.pipeline[1]
    assert (test.img_scale, test.flip) == ((1333, 800), False)


@pytest.mark.parametrize(('faster', 'mask'), zip(FASTER, MASK, strict=True))
def test_faster_rcnn_is_mask_rcnn_without_masks(faster, mask):
    faster, mask = read(faster), read(mask)
    model = copy.deepcopy(mask.model)
    model.type = 'FasterRCNN'
    del model.roi_head.mask_roi_extractor, model.roi_head.mask_head
    del model.train_cfg.rcnn.mask_size, model.test_cfg.rcnn.mask_thr_binary
    model.train_cfg.rcnn.assigner.match_low_quality = False  # as MMDetection's own do
    assert faster.model == model
    assert faster.optimizer == mask.optimizer


@pytest.mark.parametrize('name', QUICKLY)
def test_training_step_and_inference(name):
    config = read(name)
    check_config({'model': config.model})
    torch.manual_seed(0)
    detector = build_detector(config.model).train()
    optimizer = build_optimizer(detector, config.optimizer)
    trained = [p for p in detector.parameters() if p.requires_grad]
    assert sorted(map(id, trained)) == sorted(
        id(p) for group in optimizer.param_groups for p in group['params'] if p.requires_grad
    )
    norms = [m for m in detector.modules() if 'Norm' in type(m).__name__]
    norms = {id(p) for m in norms for p in m.parameters(recurse=False) if p.requires_grad}
    decayed = {id(p) for group in optimizer.param_groups if group['weight_decay'] > 0 for p in group['params']}
    assert norms
    assert not norms & decayed

    size, box = 96, [[8.0, 16.0, 72.0, 64.0]]
    meta = dict(img_shape=(size, size, 3), ori_shape=(size, size, 3), pad_shape=(size, size, 3), flip=False)
    meta |= dict(scale_factor=np.ones(4, dtype=np.float32), filename='image', batch_input_shape=(size, size))
    mask = np.zeros((1, size, size), dtype=np.uint8)
    mask[:, 16:64, 8:72] = 1
    batch = dict(
        img=torch.randn(1, 3, size, size),
        img_metas=[meta],
        gt_bboxes=[torch.tensor(box)],
        gt_labels=[torch.tensor([3])],
    )
    if config.model.type == 'MaskRCNN':
        batch['gt_masks'] = [BitmapMasks(mask, size, size)]
    before = [p.detach().clone() for p in trained]
    result = detector.train_step(batch, optimizer)
    assert torch.isfinite(result['loss'])
    result['loss'].backward()
    assert [n for n, p in detector.named_parameters() if p.requires_grad and p.grad is None] == []
    optimizer.step()
    assert any(not torch.equal(a, b) for a, b in zip(before, trained, strict=True))

    detector.eval()
    with torch.no_grad():
        detections = detector(img=[batch['img']], img_metas=[[meta]], return_loss=False, rescale=True)
    boxes = detections[0][0] if config.model.type == 'MaskRCNN' else detections[0]
    assert len(boxes) == 80
    assert all(b.shape[1] == 5 for b in boxes)


@pytest.mark.parametrize(
    ('name', 'layer'),
    [
        ('stem.0.attention.fc1.weight', 0),
        ('stem.1.weight', 0),
        ('stages.0.blocks.2.gamma', 1),
        ('stages.1.downsample.1.bias', 2),
        ('stages.1.blocks.0.norm.weight', 2),
        ('stages.2.downsample.0.weight', 3),
        ('stages.2.blocks.2.conv_dw.bias', 3),
        ('stages.2.blocks.3.conv_dw.bias', 4),
        ('stages.2.blocks.8.mlp.fc2.bias', 5),
        ('stages.3.downsample.1.bias', 6),
        ('stages.3.blocks.1.gamma', 6),
        ('warehouses.stage0_dw.weight', 7),
    ],
)
def test_convnext_layer_ids(name, layer):
    assert convnext_layer_id(f'backbone.model.{name}') == layer
    assert convnext_layer_id('backbone.norm0.weight') == convnext_layer_id('neck.lateral_convs.0.conv.weight') == 7


def test_convnext_learning_rates():
    config = Config.fromfile(str(ROOT / 'mask_rcnn/mask_rcnn_kw1x_convnext_tiny_fpn_1x_coco.py'))
    detector = build_detector(config.model)
    shapes = dict(detector.named_parameters())
    for group in build_optimizer(detector, config.optimizer).param_groups:
        for name in group['param_names']:
            assert group['lr'] == pytest.approx(1e-4 * 0.95 ** (7 - convnext_layer_id(name)))
            no_decay = shapes[name].dim() == 1 or name.endswith('.bias')
            assert group['weight_decay'] == (0.0 if no_decay else 0.05)
