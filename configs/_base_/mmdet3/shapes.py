_base_ = ['../../mask_rcnn/mask_rcnn_kw1x_mobilenetv2_100_fpn_1x_coco.py', '../values/shapes.py']
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='Resize', scale={{_base_.shapes.scale}}, keep_ratio=True),
    dict(type='RandomFlip', prob={{_base_.shapes.flip}}, direction={{_base_.shapes.flips}}),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale={{_base_.shapes.scale}}, keep_ratio=True),
    {{_base_.pack}},
]
metainfo = dict(classes={{_base_.shapes.classes}})
train_dataloader = dict(
    batch_size={{_base_.shapes.batch}},
    num_workers={{_base_.shapes.workers}},
    dataset=dict(
        ann_file={{_base_.shapes.train_ann_file}},
        data_prefix=dict(img={{_base_.shapes.train_images}}),
        metainfo=metainfo,
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    num_workers={{_base_.shapes.workers}},
    dataset=dict(
        ann_file={{_base_.shapes.val_ann_file}},
        data_prefix=dict(img={{_base_.shapes.val_images}}),
        metainfo=metainfo,
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file={{_base_.shapes.val_ann_file}})
test_evaluator = val_evaluator
optim_wrapper = dict(optimizer=dict(lr={{_base_.shapes.lr}}, fused=True))
param_scheduler = [
    dict(
        type='LinearLR',
        by_epoch=False,
        begin=0,
        end={{_base_.shapes.warmup_end}},
        start_factor={{_base_.schedule.warmup_ratio}},
    ),
    dict(type='MultiStepLR', by_epoch=True, milestones={{_base_.shapes.milestones}}),
]
train_cfg = dict(max_epochs={{_base_.shapes.epochs}}, val_interval={{_base_.shapes.epochs}})
default_hooks = dict(
    logger=dict(interval={{_base_.shapes.log_interval}}), checkpoint=dict(max_keep_ckpts={{_base_.shapes.checkpoints}})
)
auto_scale_lr = dict(base_batch_size={{_base_.shapes.batch}})
