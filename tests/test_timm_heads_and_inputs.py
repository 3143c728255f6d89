"""Classifiers, pooling, input channels and input sizes."""

import pytest
import timm
import torch
from networks import SMALLEST, images, network
from torch import nn

from kw_timm.layers import KWLinear
from kw_timm.weights import to_reference_state_dict

# One with a KW classifier among them.
HEADS = (*SMALLEST, 'kw1d2x_mobilenetv2_050')

# What depends on the input channels.
STEM = {
    'resnet': {'conv1.weight'},
    'mobilenetv2': {'warehouses.stem.weight', 'conv_stem.attention.fc1.weight'},
    'convnext': {'warehouses.stem.weight', 'stem.0.attention.fc1.weight'},
}


def first_level(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model.forward_intermediates(x, indices=[0], intermediates_only=True, stop_early=True)[0]


@pytest.fixture(scope='module', params=HEADS)
def name(request) -> str:
    return request.param


@pytest.fixture(scope='module')
def weight_file(name, tmp_path_factory):
    """A file as the reference writes it."""
    path = tmp_path_factory.mktemp('weights') / f'{name}.pth'
    torch.save({'model': to_reference_state_dict(network(name))}, path)
    return path


def pretrained(name: str, file, **kwargs) -> nn.Module:
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(file=str(file)), **kwargs).eval()


@torch.no_grad()
def test_classifier(name):
    model, x = network(name), images()
    classifier = model.get_classifier()
    kw = 'kw1d2x_mobilenetv2' in name
    assert type(classifier) is (KWLinear if kw else nn.Linear)
    assert classifier.out_features == 1000
    pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    torch.testing.assert_close(model(x), classifier(pooled))
    for classes in (10, 0, 7):
        model.reset_classifier(classes)
        assert model.num_classes == classes
        assert model(x).shape == (2, classes or model.head_hidden_size)
        assert ('classifier' in model.warehouses) == (kw and classes > 0)
    assert type(model.get_classifier()) is type(classifier)
    model.reset_classifier(0, '')
    assert model(x).shape == model.forward_features(x).shape
    model.reset_classifier(5, 'max')
    assert model(x).shape == (2, 5)


@torch.no_grad()
def test_fine_tuning_keeps_all_but_the_classifier(name, weight_file):
    source = network(name)
    for classes in (10, 0):
        model = pretrained(name, weight_file, num_classes=classes)
        x = images()
        assert torch.equal(model.forward_features(x), source.forward_features(x))
        assert model(x).shape == (2, classes or model.head_hidden_size)


def test_a_kw_classifier_starts_anew_as_a_whole(tmp_path):
    """Its attention has the same shape for other classes, but belongs to cells that are gone."""
    name = 'kw1d2x_mobilenetv2_050'
    torch.save(network(name).state_dict(), tmp_path / 'weights.pth')
    model = pretrained(name, tmp_path / 'weights.pth', num_classes=10)
    assert not torch.equal(model.classifier.attention.fc2.weight, network(name).classifier.attention.fc2.weight)
    assert not model.classifier.bias.any()


@torch.no_grad()
def test_features_only(name, weight_file):
    model = pretrained(name, weight_file, features_only=True)
    expected = network(name).forward_intermediates(images(), intermediates_only=True)
    for output, level in zip(model(images()), expected, strict=True):
        assert torch.equal(output, level)


@torch.no_grad()
def test_grey_images(name, weight_file):
    """A one-channel network sees in a grey image what the three-channel network sees in it three times."""
    grey = images(channels=1)
    model, source = pretrained(name, weight_file, in_chans=1), network(name)
    expected = first_level(source, grey.expand(-1, 3, -1, -1))
    torch.testing.assert_close(first_level(model, grey), expected, rtol=1e-3, atol=1e-4)
    own, other = model.state_dict(), source.state_dict()
    assert {key for key in own if not torch.equal(own[key], other[key])} == STEM[source.family]


@torch.no_grad()
def test_four_channels(name, weight_file):
    model = pretrained(name, weight_file, in_chans=4)
    # timm repeats the three channels' weights, scaled by 3/4.
    x = images()
    wide = torch.cat([x, x[:, :1]], 1) * torch.tensor([2 / 3, 4 / 3, 4 / 3, 2 / 3]).view(1, 4, 1, 1)
    expected = first_level(network(name), x)
    torch.testing.assert_close(first_level(model, wide), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('channels', [1, 4])
def test_new_networks_of_other_channels(name, channels):
    model = timm.create_model(name, in_chans=channels, features_only=True, out_indices=(0,))
    model(images(channels=channels))[0].sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize('name', ['kw1x_mobilenetv2_050', 'kw1x_convnext_tiny'])
def test_other_channels_than_the_model_has(name):
    with pytest.raises(ValueError, match=r'Expected a batched input \(B, 3, \*spatial\), got shape \(2, 4, 64, 64\)'):
        network(name)(images(channels=4))


@torch.no_grad()
@pytest.mark.parametrize('name', SMALLEST)
def test_odd_and_wide_images(name):
    x = torch.randn(1, 3, 37, 131)
    assert network(name)(x).shape == (1, 1000)


@torch.no_grad()
@pytest.mark.parametrize('name', ['kw1x_resnet18', 'kw1x_mobilenetv2_050'])
def test_one_pixel(name):
    assert network(name)(images(size=1)).isfinite().all()


@pytest.mark.parametrize('size', [1, 3, 16])
def test_images_smaller_than_the_strides_of_convnext(size):
    with pytest.raises(ValueError, match=r'is smaller than the kernel window \(\d, \d\). Feed a larger image'):
        network('kw1x_convnext_tiny')(images(size=size))


@pytest.mark.parametrize('name', SMALLEST)
def test_no_pixels(name):
    # The static stem of ResNet is torch's, and so is what it says.
    with pytest.raises((ValueError, RuntimeError), match=r'no pixels|input size'):
        network(name)(images(size=0))


@torch.no_grad()
@pytest.mark.parametrize('name', SMALLEST)
def test_empty_batch(name):
    assert network(name)(images(batch=0)).shape == (0, 1000)


@torch.no_grad()
@pytest.mark.parametrize('name', HEADS)
def test_samples_do_not_influence_each_other(name):
    model, x = network(name).double(), images(3).double()
    torch.testing.assert_close(model(x), torch.cat([model(sample[None]) for sample in x]))
