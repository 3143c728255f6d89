"""Feature extraction: levels, wrappers, output strides, pruning."""

import pytest
import timm
import torch
from networks import SMALLEST, images, network
from timm.models._features import FeatureGetterNet, FeatureHookNet, FeatureListNet
from torch import nn

from kw_timm.layers import KWLayer


def extractor(name: str, **kwargs) -> nn.Module:
    """A feature extractor with the weights of ``network(name)``."""
    source = network(name).state_dict()
    return timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay=dict(state_dict=source), features_only=True, **kwargs
    ).eval()


@pytest.fixture(scope='module', params=(*SMALLEST, 'kw1d2x_mobilenetv2_050'))
def name(request) -> str:
    return request.param


@pytest.fixture(scope='module')
def levels(name) -> list[torch.Tensor]:
    with torch.no_grad():
        return network(name).forward_intermediates(images(), intermediates_only=True)


@torch.no_grad()
@pytest.mark.parametrize('indices', [(0,), (1, 3), (-3, -1), 2, None])
def test_any_levels(name, levels, indices):
    model = extractor(name, **({} if indices is None else {'out_indices': indices}))
    count = len(levels)
    wanted = list(range(count)) if indices is None else indices
    wanted = list(range(count - wanted, count)) if isinstance(wanted, int) else [i % count for i in wanted]
    outputs = model(images())
    assert model.feature_info.channels() == [levels[i].shape[1] for i in wanted]
    for output, i in zip(outputs, wanted, strict=True):
        torch.testing.assert_close(output, levels[i], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('indices', [(5,), (0, 9), (-6,), 7])
def test_levels_out_of_range(name, indices):
    with pytest.raises(AssertionError, match='is out of range'), torch.device('meta'):
        timm.create_model(name, features_only=True, out_indices=indices)


@torch.no_grad()
@pytest.mark.parametrize('feature_cls', ['getter', 'fx', 'hook', FeatureGetterNet, FeatureHookNet])
def test_wrappers_that_keep_the_network_whole(name, levels, feature_cls):
    outputs = extractor(name, feature_cls=feature_cls)(images())
    for output, level in zip(outputs, levels, strict=True):
        torch.testing.assert_close(output, level, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('feature_cls', ['list', 'dict', 'other', FeatureListNet, nn.Module, 7])
@pytest.mark.parametrize('name', SMALLEST)
def test_wrappers_that_take_it_apart(name, feature_cls):
    message = "is not supported: .* leave its shared warehouses behind. Use 'getter'"
    with pytest.raises(ValueError, match=message), torch.device('meta'):
        timm.create_model(name, features_only=True, feature_cls=feature_cls)


@torch.no_grad()
@pytest.mark.parametrize('stride', [8, 16])
def test_output_stride(name, levels, stride):
    model = extractor(name, output_stride=stride)
    reduction = [r for r in (2, 4, 8, 16, 32) if r >= 32 // 2 ** (len(levels) - 1)]
    assert model.feature_info.reduction() == [min(r, stride) for r in reduction]
    outputs = model(images())
    assert [64 // o.shape[-1] for o in outputs] == model.feature_info.reduction()
    # The same weights, and the same function up to where the stride would have been taken.
    for output, level, r in zip(outputs, levels, reduction, strict=True):
        if r <= stride:
            torch.testing.assert_close(output, level, rtol=1e-4, atol=1e-5)
    whole = timm.create_model(name, output_stride=stride).eval()
    assert whole.forward_features(images()).shape[-1] == 64 // stride


@pytest.mark.parametrize('name', ['kw1x_resnet18', 'kw1x_convnext_tiny'])
def test_impossible_output_stride(name):
    with pytest.raises(AssertionError), torch.device('meta'):
        timm.create_model(name, output_stride=3)


def used(model: nn.Module) -> set[int]:
    return {id(layer.__dict__['warehouse']) for layer in model.modules() if isinstance(layer, KWLayer)}


@torch.no_grad()
@pytest.mark.parametrize('indices', [[0], [1, 2], [-1], 1])
def test_pruning_keeps_what_is_used_and_no_more(name, levels, indices):
    model = network(name)
    kept = model.prune_intermediate_layers(indices)
    count = len(levels)
    assert kept == ([count - 1] if indices == 1 else [i % count for i in indices])
    outputs = model.forward_intermediates(images(), indices=kept, intermediates_only=True)
    for output, i in zip(outputs, kept, strict=True):
        torch.testing.assert_close(output, levels[i], rtol=1e-4, atol=1e-5)
    assert {id(warehouse) for warehouse in model.warehouses.values()} == used(model)


def test_features_train_every_parameter(name):
    model = timm.create_model(name, features_only=True, out_indices=(1, 2)).train()
    sum(o.mean() for o in model(images())).backward()
    assert [key for key, p in model.named_parameters() if p.grad is None] == []


def test_pruning_drops_warehouses_of_later_stages():
    # Layers 2.0.conv1 and 2.0.downsample of stage 2 take their cells from the warehouse of stage 1.
    model = timm.create_model('kw1x_resnet18', features_only=True, out_indices=(1,))
    assert list(model.model.warehouses) == ['layer1']
    assert not timm.create_model('kw1x_resnet50', features_only=True, out_indices=(0,)).model.warehouses


@torch.no_grad()
def test_same_sizes_as_the_static_network():
    for name, static in zip(SMALLEST, ('resnet18', 'mobilenetv2_050', 'convnext_tiny'), strict=True):
        x = images(1, 75)
        ours = timm.create_model(name, features_only=True).eval()(x)
        theirs = timm.create_model(static, features_only=True).eval()(x)
        assert [o.shape for o in ours] == [t.shape for t in theirs]
