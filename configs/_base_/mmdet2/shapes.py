_base_ = ['../../mask_rcnn/mask_rcnn_kw1x_mobilenetv2_100_fpn_1x_coco.py', '../values/shapes.py']
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='Resize', img_scale={{_base_.shapes.scale}}, keep_ratio=True),
    dict(type='RandomFlip', flip_ratio={{_base_.shapes.flip}}, direction={{_base_.shapes.flips}}),
    {{_base_.normalize}},
    {{_base_.pad}},
    dict(type='DefaultFormatBundle'),
    dict(type='Collect', keys=['img', 'gt_bboxes', 'gt_labels', 'gt_masks']),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='MultiScaleFlipAug',
        img_scale={{_base_.shapes.scale}},
        flip=False,
        transforms=[
            dict(type='Resize', keep_ratio=True),
            {{_base_.normalize}},
            {{_base_.pad}},
            dict(type='ImageToTensor', keys=['img']),
            dict(type='Collect', keys=['img']),
        ],
    ),
]
held_out = dict(
    ann_file={{_base_.shapes.val_ann_file}},
    img_prefix={{_base_.shapes.val_images}},
    classes={{_base_.shapes.classes}},
    pipeline=test_pipeline,
)
data = dict(
    samples_per_gpu={{_base_.shapes.batch}},
    workers_per_gpu={{_base_.shapes.workers}},
    train=dict(
        ann_file={{_base_.shapes.train_ann_file}},
        img_prefix={{_base_.shapes.train_images}},
        classes={{_base_.shapes.classes}},
        pipeline=train_pipeline,
    ),
    val=held_out,
    test=held_out,
)
optimizer = dict(lr={{_base_.shapes.lr}}, fused=True)
lr_config = dict(warmup_iters={{_base_.shapes.warmup_iters}}, step={{_base_.shapes.milestones}})
runner = dict(max_epochs={{_base_.shapes.epochs}})
evaluation = dict(interval={{_base_.shapes.epochs}})
checkpoint_config = dict(max_keep_ckpts={{_base_.shapes.checkpoints}})
log_config = dict(interval={{_base_.shapes.log_interval}})
auto_scale_lr = dict(base_batch_size={{_base_.shapes.batch}})
