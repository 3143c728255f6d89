_base_ = [
    '../_base_/models/mask_rcnn_fpn.py',
    '../_base_/datasets/coco_instance.py',
    '../_base_/schedules/adamw_1x.py',
    '../_base_/default_runtime.py',
]
model = dict(
    backbone=dict(
        name='kw4x_resnet50',
        frozen_stages=1,
        drop_path_rate=0.1,
        init_cfg=dict(type='Pretrained', checkpoint='timm://kw4x_resnet50'),
    ),
    neck=dict(in_channels=[256, 512, 1024, 2048]),
)
