_base_ = '../values/schedule.py'
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(
        type='AdamW',
        lr={{_base_.schedule.lr}},
        betas={{_base_.schedule.betas}},
        weight_decay={{_base_.schedule.weight_decay}},
    ),
    paramwise_cfg=dict(norm_decay_mult={{_base_.schedule.norm_decay_mult}}),
)
warmup = dict(
    type='LinearLR',
    by_epoch=False,
    begin=0,
    end={{_base_.schedule.warmup_end}},
    start_factor={{_base_.schedule.warmup_ratio}},
)
param_scheduler = [warmup, dict(type='MultiStepLR', by_epoch=True, milestones={{_base_.schedule.milestones}})]
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs={{_base_.schedule.epochs}}, val_interval=1)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
