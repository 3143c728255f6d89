_base_ = '../values/coco.py'
long_scales = dict(type='RandomChoiceResize', scales={{_base_.coco.long_scales}}, keep_ratio=True)
short_scales = dict(type='RandomChoiceResize', scales={{_base_.coco.short_scales}}, keep_ratio=True)
multi_scale = dict(type='RandomChoice', transforms=[[long_scales], [short_scales, {{_base_.coco.crop}}, long_scales]])
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='RandomFlip', prob={{_base_.coco.flip}}),
    multi_scale,
    dict(type='PackDetInputs'),
]
pack = dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'))
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale={{_base_.coco.test_scale}}, keep_ratio=True),
    pack,
]
train_dataloader = dict(
    batch_size={{_base_.coco.batch}},
    num_workers={{_base_.coco.workers}},
    sampler=dict(type='DefaultSampler', shuffle=True),
    batch_sampler=dict(type='AspectRatioBatchSampler'),
    dataset=dict(
        type='CocoDataset',
        ann_file={{_base_.coco.train_ann_file}},
        data_prefix=dict(img={{_base_.coco.train_images}}),
        filter_cfg=dict(filter_empty_gt=True, min_size={{_base_.coco.min_size}}),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers={{_base_.coco.workers}},
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='CocoDataset',
        ann_file={{_base_.coco.val_ann_file}},
        data_prefix=dict(img={{_base_.coco.val_images}}),
        test_mode=True,
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type='CocoMetric', ann_file={{_base_.coco.val_ann_file}}, metric=['bbox'])
test_evaluator = val_evaluator
