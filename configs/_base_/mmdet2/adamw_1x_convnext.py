_base_ = ['./adamw_1x.py', '../values/layer_decay.py']
optimizer = dict(
    constructor={{_base_.layer_decay.constructor}},
    paramwise_cfg=dict(_delete_=True, decay_rate={{_base_.layer_decay.decay_rate}}),
)
lr_config = dict(step={{_base_.layer_decay.milestones}})
