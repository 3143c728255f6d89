runtime = dict(log_interval=50, checkpoint_interval=1, backend='nccl', mp_start_method='fork', opencv_num_threads=0)
