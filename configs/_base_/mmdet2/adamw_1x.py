_base_ = '../values/schedule.py'
optimizer = dict(
    type='AdamW',
    lr={{_base_.schedule.lr}},
    betas={{_base_.schedule.betas}},
    weight_decay={{_base_.schedule.weight_decay}},
    paramwise_cfg=dict(norm_decay_mult={{_base_.schedule.norm_decay_mult}}),
)
optimizer_config = dict()
lr_config = dict(
    policy='step',
    warmup='linear',
    warmup_iters={{_base_.schedule.warmup_iters}},
    warmup_ratio={{_base_.schedule.warmup_ratio}},
    step={{_base_.schedule.milestones}},
)
runner = dict(type='EpochBasedRunner', max_epochs={{_base_.schedule.epochs}})
