"""The published accuracies on ImageNet's validation images, and how they were evaluated."""

__all__ = ['EVALUATION', 'PUBLISHED']

# Top-1 and top-5 in percent, of arXiv 2406.07879 and its repository. `tests/test_recipes.py` holds them against the
# manifest of the weights.
PUBLISHED: dict[str, tuple[float, float]] = {
    'resnet18': (70.44, 89.72),
    'kw1d4x_resnet18': (72.73, 90.83),
    'kw1d2x_resnet18': (73.33, 91.42),
    'kw1x_resnet18': (74.77, 92.13),
    'kw2x_resnet18': (75.19, 92.18),
    'kw4x_resnet18': (76.05, 92.68),
    'resnet50': (78.44, 94.24),
    'kw1d2x_resnet50': (79.30, 94.71),
    'kw1x_resnet50': (80.38, 95.19),
    'kw4x_resnet50': (81.05, 95.21),
    'convnext_tiny': (82.07, 95.86),
    'kw1x_convnext_tiny': (82.51, 96.07),
    'mobilenetv2_100': (72.04, 90.42),
    'kw1d2x_mobilenetv2_100': (72.59, 90.71),
    'kw1x_mobilenetv2_100': (74.68, 91.90),
    'kw4x_mobilenetv2_100': (75.92, 92.22),
    'mobilenetv2_050': (64.32, 85.22),
    'kw1d2x_mobilenetv2_050': (65.20, 85.98),
    'kw1x_mobilenetv2_050': (68.29, 87.93),
    'kw4x_mobilenetv2_050': (70.26, 89.19),
}

# Short side 256, centre crop 224.
EVALUATION = {
    'input_size': (3, 224, 224),
    'interpolation': 'bicubic',
    'crop_pct': 0.875,
    'mean': (0.485, 0.456, 0.406),
    'std': (0.229, 0.224, 0.225),
}
