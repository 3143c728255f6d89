# The 1x schedule with ConvNeXt's layer-wise learning-rate decay.
_base_ = './adamw_1x.py'
optimizer = dict(constructor='ConvNeXtLayerDecay', paramwise_cfg=dict(_delete_=True, decay_rate=0.95))
lr_config = dict(step=[9, 11])
