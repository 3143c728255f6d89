_base_ = [
    '../_base_/models/mask_rcnn_fpn.py',
    '../_base_/datasets/coco_instance.py',
    '../_base_/schedules/adamw_1x_convnext.py',
    '../_base_/default_runtime.py',
]
model = dict(
    backbone=dict(
        name='convnext_tiny',
        drop_path_rate=0.4,
        ls_init_value=1.0,
        init_cfg=dict(type='Pretrained', checkpoint='timm://convnext_tiny'),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
