# The demo: a small Mask R-CNN from random weights on drawn shapes (tools/make_shapes.py), minutes on two CPU cores.
# Data, schedule and their values are in ../_base_/values/shapes.py and ../_base_/mmdet*/shapes.py.
_base_ = f'../_base_/mmdet{__import__("mmdet").__version__[0]}/shapes.py'
model = dict(
    # norm_eval stays on, from random weights too: statistics of 8 images are too noisy for the attention's norms.
    # Half of the sampled boxes may be objects: it is they that teach classes and masks, and images are few.
    backbone=dict(name='kw1x_mobilenetv2_050', frozen_stages=-1, init_cfg=None),
    neck=dict(in_channels=[16, 16, 48, 1280], out_channels=64),
    rpn_head=dict(in_channels=64, feat_channels=64, anchor_generator=dict(scales=[4])),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=64, roi_layer=dict(sampling_ratio=1)),
        bbox_head=dict(in_channels=64, fc_out_channels=256, num_classes=3),
        mask_roi_extractor=dict(out_channels=64, roi_layer=dict(sampling_ratio=1)),
        mask_head=dict(num_convs=2, in_channels=64, conv_out_channels=64, num_classes=3),
    ),
    train_cfg=dict(rpn_proposal=dict(nms_pre=250, max_per_img=100), rcnn=dict(sampler=dict(num=32, pos_fraction=0.5))),
    test_cfg=dict(rpn=dict(nms_pre=250, max_per_img=100)),
)
