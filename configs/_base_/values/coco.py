# COCO and the multi-scale augmentation of the published results.
coco = dict(
    train_ann_file='data/coco/annotations/instances_train2017.json',
    train_images='data/coco/train2017/',
    val_ann_file='data/coco/annotations/instances_val2017.json',
    val_images='data/coco/val2017/',
    batch=2,
    workers=2,
    min_size=32,
    flip=0.5,
    # One of the long scales, or one of the short ones, a crop, and then one of the long scales.
    long_scales=[(side, 1333) for side in range(480, 801, 32)],
    short_scales=[(400, 1333), (500, 1333), (600, 1333)],
    crop=dict(type='RandomCrop', crop_type='absolute_range', crop_size=(384, 600), allow_negative_crop=True),
    test_scale=(1333, 800),
)
