# What ConvNeXt's schedule has of its own.
layer_decay = dict(constructor='ConvNeXtLayerDecay', decay_rate=0.95, milestones=[9, 11])
