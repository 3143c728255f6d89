"""What timm asks of each of its own models, asked of each variant, with smaller images."""

import math

import pytest
import timm
import torch
from networks import VARIANTS, check_backward, check_forward, check_head, check_intermediates, images, lively
from torch import nn

SIZE = 64
# Those that differ from a smaller one in numbers only.
LARGE = (
    'kw2x_resnet18',
    'kw4x_resnet18',
    'kw1d2x_resnet50',
    'kw1x_resnet50',
    'kw4x_resnet50',
    'kw1x_mobilenetv2_100',
    'kw4x_mobilenetv2_100',
)


@pytest.fixture(scope='module', params=[pytest.param(n, marks=pytest.mark.slow) if n in LARGE else n for n in VARIANTS])
def name(request) -> str:
    return request.param


@pytest.fixture(scope='module')
def made(name) -> nn.Module:
    torch.manual_seed(0)
    return lively(timm.create_model(name))


def test_forward(made):
    check_forward(made, SIZE, rtol=0, atol=0)


def test_head_and_pooling(made):
    features, unpooled = check_head(made, SIZE)
    assert features.shape == (1, made.num_features, SIZE // 32, SIZE // 32)
    assert unpooled.shape == features.shape


def test_forward_intermediates(made):
    _, features, only = check_intermediates(made, SIZE)
    assert len(only) == 2
    assert torch.equal(only[1], features[-1])


def test_backward(made):
    check_backward(made, SIZE)


@torch.no_grad()
def test_features(name):
    torch.manual_seed(0)
    model = timm.create_model(name, features_only=True).eval()
    channels, reduction = model.feature_info.channels(), model.feature_info.reduction()
    assert reduction == ([4, 8, 16, 32] if 'convnext' in name else [2, 4, 8, 16, 32])
    # 96 pixels, and a size that no stride divides.
    for size in (96, 75) if name.startswith('kw1x') else (96,):
        outputs = model(images(1, size))
        assert [o.shape[1] for o in outputs] == channels
        for o, r in zip(outputs, reduction, strict=True):
            assert o.isfinite().all()
            assert size // r <= o.shape[-1] <= math.ceil(size / r)


def test_construction_without_head_or_pooling(name):
    with torch.device('meta'):
        model = timm.create_model(name, num_classes=0, global_pool='').eval()
        assert model(torch.empty(1, 3, 224, 224)).shape == (1, model.num_features, 7, 7)
