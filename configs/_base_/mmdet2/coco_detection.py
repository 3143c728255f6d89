_base_ = ['../values/images.py', '../values/coco.py']
long_scales = dict(
    type='Resize', img_scale={{_base_.coco.long_scales}}, multiscale_mode='value', keep_ratio=True, override=True
)
short_scales = dict(type='Resize', img_scale={{_base_.coco.short_scales}}, multiscale_mode='value', keep_ratio=True)
multi_scale = dict(type='AutoAugment', policies=[[long_scales], [short_scales, {{_base_.coco.crop}}, long_scales]])
normalize = dict(type='Normalize', mean={{_base_.images.mean}}, std={{_base_.images.std}}, to_rgb=True)
pad = dict(type='Pad', size_divisor={{_base_.images.size_divisor}})
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='RandomFlip', flip_ratio={{_base_.coco.flip}}),
    multi_scale,
    normalize,
    pad,
    dict(type='DefaultFormatBundle'),
    dict(type='Collect', keys=['img', 'gt_bboxes', 'gt_labels']),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='MultiScaleFlipAug',
        img_scale={{_base_.coco.test_scale}},
        flip=False,
        transforms=[
            dict(type='Resize', keep_ratio=True),
            dict(type='RandomFlip'),
            normalize,
            pad,
            dict(type='ImageToTensor', keys=['img']),
            dict(type='Collect', keys=['img']),
        ],
    ),
]
held_out = dict(
    type='CocoDataset',
    ann_file={{_base_.coco.val_ann_file}},
    img_prefix={{_base_.coco.val_images}},
    pipeline=test_pipeline,
)
data = dict(
    samples_per_gpu={{_base_.coco.batch}},
    workers_per_gpu={{_base_.coco.workers}},
    train=dict(
        type='CocoDataset',
        ann_file={{_base_.coco.train_ann_file}},
        img_prefix={{_base_.coco.train_images}},
        pipeline=train_pipeline,
    ),
    val=held_out,
    test=held_out,
)
evaluation = dict(metric=['bbox'])
