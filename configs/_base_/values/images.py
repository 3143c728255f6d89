# Images as the networks get them: RGB, padded to a multiple.
images = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], size_divisor=32)
