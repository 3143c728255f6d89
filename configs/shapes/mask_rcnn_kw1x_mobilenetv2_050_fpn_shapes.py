# The demo: a small Mask R-CNN from random weights on drawn shapes (tools/make_shapes.py), minutes on two CPU cores.
# Also a pattern for data of one's own: classes, num_classes, ann_file and img_prefix are all there is to set.
_base_ = '../mask_rcnn/mask_rcnn_kw1x_mobilenetv2_100_fpn_1x_coco.py'
custom_hooks = [dict(type='NumClassCheckHook'), dict(type='TemperatureHook', epochs=2)]
classes = ('circle', 'square', 'triangle')
data_root = 'work_dirs/shapes/data/'
size = 192
model = dict(
    # norm_eval stays on, from random weights too: statistics of 4 images are too noisy for the attention's norms.
    backbone=dict(name='kw1x_mobilenetv2_050', frozen_stages=-1, init_cfg=None),
    neck=dict(in_channels=[16, 16, 48, 1280], out_channels=64),
    rpn_head=dict(in_channels=64, feat_channels=64, anchor_generator=dict(scales=[4])),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=64),
        bbox_head=dict(in_channels=64, fc_out_channels=256, num_classes=3),
        mask_roi_extractor=dict(out_channels=64),
        mask_head=dict(num_convs=2, in_channels=64, conv_out_channels=64, num_classes=3),
    ),
    train_cfg=dict(rpn_proposal=dict(nms_pre=500, max_per_img=200), rcnn=dict(sampler=dict(num=128))),
    test_cfg=dict(rpn=dict(nms_pre=500, max_per_img=200)),
)
img_norm_cfg = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='Resize', img_scale=(size, size), keep_ratio=True),
    dict(type='RandomFlip', flip_ratio=0.5, direction=['horizontal', 'vertical', 'diagonal']),
    dict(type='Normalize', **img_norm_cfg),
    dict(type='Pad', size_divisor=32),
    dict(type='DefaultFormatBundle'),
    dict(type='Collect', keys=['img', 'gt_bboxes', 'gt_labels', 'gt_masks']),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='MultiScaleFlipAug',
        img_scale=(size, size),
        flip=False,
        transforms=[
            dict(type='Resize', keep_ratio=True),
            dict(type='Normalize', **img_norm_cfg),
            dict(type='Pad', size_divisor=32),
            dict(type='ImageToTensor', keys=['img']),
            dict(type='Collect', keys=['img']),
        ],
    ),
]
held_out = dict(
    ann_file=data_root + 'annotations/val.json',
    img_prefix=data_root + 'val/',
    classes=classes,
    pipeline=test_pipeline,
)
data = dict(
    samples_per_gpu=4,
    workers_per_gpu=0,
    train=dict(
        ann_file=data_root + 'annotations/train.json',
        img_prefix=data_root + 'train/',
        classes=classes,
        pipeline=train_pipeline,
    ),
    val=held_out,
    test=held_out,
)
optimizer = dict(lr=0.001)
lr_config = dict(warmup_iters=100, step=[7])
runner = dict(max_epochs=8)
evaluation = dict(interval=8, metric=['bbox', 'segm'])
checkpoint_config = dict(interval=1, max_keep_ckpts=2)
log_config = dict(interval=20)
