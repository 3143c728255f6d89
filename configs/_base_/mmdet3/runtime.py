_base_ = '../values/runtime.py'
default_scope = 'mmdet'
default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval={{_base_.runtime.log_interval}}),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(type='CheckpointHook', interval={{_base_.runtime.checkpoint_interval}}),
    sampler_seed=dict(type='DistSamplerSeedHook'),
    visualization=dict(type='DetVisualizationHook'),
)
env_cfg = dict(
    cudnn_benchmark=False,
    mp_cfg=dict(
        mp_start_method={{_base_.runtime.mp_start_method}}, opencv_num_threads={{_base_.runtime.opencv_num_threads}}
    ),
    dist_cfg=dict(backend={{_base_.runtime.backend}}),
)
visualizer = dict(type='DetLocalVisualizer', vis_backends=[dict(type='LocalVisBackend')], name='visualizer')
log_processor = dict(type='LogProcessor', window_size={{_base_.runtime.log_interval}}, by_epoch=True)
resume = False
