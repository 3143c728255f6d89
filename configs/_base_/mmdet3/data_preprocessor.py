_base_ = '../values/images.py'
model = dict(
    data_preprocessor=dict(
        type='DetDataPreprocessor',
        mean={{_base_.images.mean}},
        std={{_base_.images.std}},
        bgr_to_rgb=True,
        pad_mask=True,
        pad_size_divisor={{_base_.images.size_divisor}},
    )
)
