_base_ = '../values/runtime.py'
checkpoint_config = dict(interval={{_base_.runtime.checkpoint_interval}})
log_config = dict(interval={{_base_.runtime.log_interval}}, hooks=[dict(type='TextLoggerHook')])
dist_params = dict(backend={{_base_.runtime.backend}})
mp_start_method = {{_base_.runtime.mp_start_method}}
opencv_num_threads = {{_base_.runtime.opencv_num_threads}}
resume_from = None
workflow = [('train', 1)]
