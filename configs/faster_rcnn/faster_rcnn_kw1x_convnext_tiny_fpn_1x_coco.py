_base_ = [
    '../_base_/models/faster_rcnn_fpn.py',
    '../_base_/datasets/coco_detection.py',
    '../_base_/schedules/adamw_1x_convnext.py',
    '../_base_/default_runtime.py',
]
model = dict(
    backbone=dict(
        name='kw1x_convnext_tiny',
        drop_path_rate=0.4,
        ls_init_value=1.0,
        init_cfg=dict(type='Pretrained', checkpoint='timm://kw1x_convnext_tiny'),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
