_base_ = [
    '../_base_/models/faster_rcnn_fpn.py',
    '../_base_/datasets/coco_detection.py',
    '../_base_/schedules/adamw_1x.py',
    '../_base_/default_runtime.py',
]
model = dict(
    backbone=dict(
        name='kw4x_mobilenetv2_100',
        frozen_stages=1,
        init_cfg=dict(type='Pretrained', checkpoint='timm://kw4x_mobilenetv2_100'),
    ),
    neck=dict(in_channels=[24, 32, 96, 1280]),
)
