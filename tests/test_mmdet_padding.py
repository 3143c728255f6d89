"""How a backbone that leaves padding out learns the sizes of a detector's batch."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import lively
from torch import nn

pytest.importorskip('mmdet', reason='needs MMDetection')
from kw_mmdet import KWBackbone

SIZES = [(64, 96), (32, 64)]


class Detector(nn.Module):
    """Calls its backbone with the images alone, as MMDetection's do; one batch, or one for each scale of a test."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = KWBackbone('kw1x_resnet18', **kwargs)
        lively(self.backbone.model)
        self.backbone.double().eval()

    def forward(self, img: Any = None, img_metas: Any = None, inputs: Any = None, data_samples: Any = None) -> Any:
        images = inputs if img is None else img
        return [self.backbone(x) for x in images] if isinstance(images, list) else self.backbone(images)


def images() -> tuple[torch.Tensor, torch.Tensor]:
    """A batch, and its small image alone."""
    small = torch.randn(1, 3, *SIZES[1], dtype=torch.float64)
    large = torch.randn(1, 3, *SIZES[0], dtype=torch.float64)
    return torch.cat([large, F.pad(small, (0, 32, 0, 32))]), small


def metas(form: int, sizes: Any = SIZES) -> list[Any]:
    if form == 2:
        return [dict(img_shape=(*size, 3), pad_shape=(*SIZES[0], 3)) for size in sizes]
    return [SimpleNamespace(metainfo=dict(img_shape=size, batch_input_shape=SIZES[0])) for size in sizes]


def call(detector: nn.Module, form: int, x: Any, meta: Any) -> Any:
    return detector(img=x, img_metas=meta) if form == 2 else detector(inputs=x, data_samples=meta)


def assert_alone(features: Any, alone: Any) -> None:
    for padded, expected in zip(features, alone, strict=True):
        height, width = expected.shape[2:]
        torch.testing.assert_close(padded[1:, :, :height, :width], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('form', [2, 3])
def test_sizes_come_from_the_batch(form):
    detector = Detector(ignore_padding=True)
    x, small = images()
    with torch.no_grad():
        alone = detector.backbone(small, sizes=SIZES[1:])
        for each in (detector, copy.deepcopy(detector), nn.Sequential(detector)[0]):
            assert_alone(call(each, form, x, metas(form)), alone)
            assert each.backbone.batch_sizes == []
        # Two scales of a test that were padded alike.
        mirrored = metas(form, SIZES[:1] * 2)
        first, second = call(detector, form, [x, x], [metas(form), mirrored])
        assert_alone(first, alone)
        assert not torch.equal(first[0], second[0])
        published = Detector()
        assert all(
            torch.equal(a, b) for a, b in zip(call(published, form, x, metas(form)), published.backbone(x), strict=True)
        )


def test_unknown_sizes_are_an_error():
    detector = Detector(ignore_padding=True)
    x, _ = images()
    for wrong in (None, metas(2)[:1], [dict()] * 2):
        with pytest.raises(ValueError, match='ignore_padding=True, but the sizes of the images'):
            detector(img=x, img_metas=wrong)
    with pytest.raises(ValueError, match='sizes of the images'):
        detector.backbone(x)
    with pytest.raises(ValueError, match='do not go together'):
        KWBackbone('kw1x_resnet18', ignore_padding=True, grad_checkpointing=True)


def test_a_detector_of_mmdetection():
    """Training and testing, with MMDetection's own forward; what 2.x calls it with."""
    builders = pytest.importorskip('mmdet.models').__dict__
    if 'build_detector' not in builders:
        pytest.skip('needs MMDetection 2.x')
    from mmcv import Config

    anchors = dict(type='AnchorGenerator', scales=[8], ratios=[1.0], strides=[32])
    model = dict(
        type='RetinaNet',
        backbone=dict(type='KWBackbone', name='kw1x_resnet18', out_indices=(3,), ignore_padding=True),
        neck=dict(type='FPN', in_channels=[512], out_channels=16, num_outs=1),
        bbox_head=dict(
            type='RetinaHead',
            num_classes=2,
            in_channels=16,
            stacked_convs=1,
            feat_channels=16,
            anchor_generator=anchors,
            bbox_coder=dict(type='DeltaXYWHBBoxCoder'),
            loss_cls=dict(type='FocalLoss', use_sigmoid=True),
            loss_bbox=dict(type='L1Loss'),
        ),
        train_cfg=dict(
            assigner=dict(type='MaxIoUAssigner', pos_iou_thr=0.5, neg_iou_thr=0.4, min_pos_iou=0),
            allowed_border=-1,
            pos_weight=-1,
        ),
        test_cfg=dict(nms_pre=10, score_thr=0.0, nms=dict(type='nms', iou_threshold=0.5), max_per_img=5),
    )
    detector = builders['build_detector'](Config(dict(model=model)).model)
    lively(detector.backbone.model)
    seen: list[Any] = []
    detector.backbone.register_forward_hook(lambda module, args, output: seen.append(output))
    x, small = (t.float() for t in images())
    given = [meta | dict(scale_factor=1.0, flip=False, ori_shape=meta['img_shape']) for meta in metas(2)]
    boxes = [torch.tensor([[4.0, 4.0, 28.0, 28.0]])] * 2
    detector.eval()
    with torch.no_grad():
        detector(img=[x], img_metas=[given], return_loss=False)
        alone = detector.backbone(small, sizes=SIZES[1:])
        detector.val_step(dict(img=x, img_metas=given, gt_bboxes=boxes, gt_labels=[torch.tensor([0])] * 2), None)
    assert len(seen) == 3
    for features in (seen[0], seen[2]):
        torch.testing.assert_close(features[0][1:, :, :1, :2], alone[0], rtol=1e-3, atol=1e-3)
