# 12 epochs at batch 16 (8 GPUs x 2 images).
schedule = dict(
    epochs=12,
    milestones=[8, 11],
    warmup_ratio=0.001,
    warmup_iters=500,
    warmup_end=501,  # mmengine counts the first iteration at the full rate
    lr=0.0001,
    betas=(0.9, 0.999),
    weight_decay=0.05,
    norm_decay_mult=0.0,
)
auto_scale_lr = dict(enable=False, base_batch_size=16)
