_base_ = ['./adamw_1x.py', '../values/layer_decay.py']
optim_wrapper = dict(
    constructor={{_base_.layer_decay.constructor}},
    paramwise_cfg=dict(_delete_=True, decay_rate={{_base_.layer_decay.decay_rate}}),
)
param_scheduler = [
    {{_base_.warmup}},
    dict(type='MultiStepLR', by_epoch=True, milestones={{_base_.layer_decay.milestones}}),
]
