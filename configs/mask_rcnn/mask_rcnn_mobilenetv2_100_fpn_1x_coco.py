_base_ = [
    '../_base_/models/mask_rcnn_fpn.py',
    '../_base_/datasets/coco_instance.py',
    '../_base_/schedules/adamw_1x.py',
    '../_base_/default_runtime.py',
]
model = dict(
    backbone=dict(
        name='mobilenetv2_100',
        frozen_stages=1,
        init_cfg=dict(type='Pretrained', checkpoint='timm://mobilenetv2_100'),
    ),
    neck=dict(in_channels=[24, 32, 96, 1280]),
)
