"""What timm asks of each of its own models, asked of the networks whose plans are derived."""

import copy
import math
import pickle

import pytest
import timm
import torch
from networks import check_backward, check_forward, check_head, check_intermediates, images, lively
from torch import nn

import kw_timm
from kw_timm.cli import main
from kw_timm.layers import KWLayer
from kw_timm.models import KWNetwork
from kw_timm.models.derived import DERIVED
from kw_timm.pyramid import PyramidFeatures
from kw_timm.weights.store import WeightsNotFoundError

SIZE = 64
QUICK = ('kw1x_mobilenetv4_conv_small',)
NAMES = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in DERIVED]
CONVNETS = [name for name in NAMES if 'deit' not in name.values[0]]


def arguments(name: str) -> dict[str, int]:
    return {'img_size': SIZE} if 'deit' in name else {}


@pytest.fixture(scope='module', params=NAMES)
def name(request) -> str:
    return request.param


@pytest.fixture(scope='module')
def made(name) -> nn.Module:
    torch.manual_seed(0)
    return lively(timm.create_model(name, **arguments(name)))


def test_is_the_static_network_with_a_derived_plan(made, name):
    static = timm.create_model(DERIVED[name], **arguments(name))
    assert isinstance(made, (KWNetwork, type(static)))
    kw = {key for key, module in made.named_modules() if isinstance(module, KWLayer)}
    own = {key for key in made.state_dict() if not key.startswith('warehouses.') and '.attention.' not in key}
    assert own == set(static.state_dict()) - {f'{layer}.weight' for layer in kw}
    with torch.device('meta'):
        whole = timm.create_model(name)  # Of the size that its plan was made for: transformers have more parameters.
    attention = sum(p.numel() for key, p in whole.named_parameters() if '.attention.' in key)
    assert attention <= 0.1 * (sum(p.numel() for p in whole.parameters()) - attention)
    kernels = sum(static.get_submodule(layer).weight.numel() for layer in kw)
    budget = int(name[2])
    assert sum(p.numel() for p in made.warehouses.parameters()) == budget * kernels
    cfg = made.pretrained_cfg
    assert (cfg['architecture'], cfg.get('url'), cfg.get('hf_hub_id')) == (name, None, None)
    assert {f'{cfg[key]}.weight' for key in ('first_conv',)} <= own
    config = timm.data.resolve_model_data_config(made)
    assert config['mean'] == timm.data.resolve_model_data_config(static)['mean']


@torch.no_grad()
def test_forward(made):
    x, outputs = check_forward(made, SIZE, rtol=1e-5, atol=1e-5)
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert type(other) is type(made)
        torch.testing.assert_close(other(x), outputs, rtol=0, atol=0)


def test_head_and_pooling(made):
    features, unpooled = check_head(made, SIZE)
    assert features.shape[-1 if features.ndim == 3 else 1] == made.num_features
    assert unpooled.shape[0] == 1


@torch.no_grad()
def test_as_its_cfg_announces(name):
    cfg = timm.get_pretrained_cfg(name).to_dict()
    model, x = timm.create_model(name).eval(), torch.randn(1, *cfg['input_size'])
    classifiers = [cfg['classifier']] if isinstance(cfg['classifier'], str) else cfg['classifier']
    assert all(model.get_submodule(layer).weight.shape[0] == cfg['num_classes'] for layer in classifiers)
    features = model.forward_features(x)
    assert features.isfinite().all()
    assert model.forward_head(features).shape == (1, cfg['num_classes'])
    if features.ndim == 4:
        assert features.shape == (1, model.num_features, *cfg['pool_size'])
        model = timm.create_model(name, num_classes=0, global_pool='').eval()
        assert model(x).shape == (1, model.head_hidden_size, *cfg['pool_size'])


def test_forward_intermediates(made):
    check_intermediates(made, SIZE)


def test_backward(made):
    check_backward(made, SIZE)


def test_features(name):
    model = timm.create_model(name, features_only=True, **arguments(name))
    channels, reduction = model.feature_info.channels(), model.feature_info.reduction()
    outputs = model.train()(images(2, SIZE))
    assert [o.shape[1] for o in outputs] == channels
    assert [SIZE // o.shape[-1] for o in outputs] == reduction
    sum(o.square().mean() for o in outputs).backward()
    # What is behind the last feature is gone, its warehouses, too; timm itself keeps some norms and heads.
    assert not [key for key, p in model.named_parameters() if p.grad is None and 'warehouses' in key]
    if 'deit' not in name:
        # 75: a size that no stride divides.
        for output, stride in zip(model.eval()(images(1, 75)), reduction, strict=True):
            assert output.isfinite().all()
            assert 75 // stride <= output.shape[-1] <= math.ceil(75 / stride)


@torch.no_grad()
def test_pruning(made):
    model, x = copy.deepcopy(made), images(1, SIZE)
    kept = model.prune_intermediate_layers([1])
    expected = made.forward_intermediates(x, indices=[1], intermediates_only=True)
    torch.testing.assert_close(
        model.forward_intermediates(x, indices=kept, intermediates_only=True), expected, rtol=0, atol=0
    )
    used = {id(layer.__dict__['warehouse']) for layer in model.modules() if isinstance(layer, KWLayer)}
    assert {id(warehouse) for warehouse in model.warehouses.values()} == used


@torch.no_grad()
def test_saved_and_loaded(made, name, tmp_path):
    timm.models.save_for_hf(made, tmp_path, safe_serialization=True)
    x = images(2, SIZE)
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    torch.testing.assert_close(loaded(x), made(x), rtol=0, atol=0)
    new = timm.create_model(name, **arguments(name)).eval()
    kw_timm.load_checkpoint(new, tmp_path / 'model.safetensors')
    torch.testing.assert_close(new(x), made(x), rtol=0, atol=0)


@torch.no_grad()
def test_loaded_for_another_purpose(made, tmp_path):
    timm.models.save_for_hf(made, tmp_path, safe_serialization=True)
    saved, x = f'local-dir:{tmp_path}', images(1, SIZE)
    features = timm.create_model(saved, pretrained=True, features_only=True).eval()(x)
    expected = made.forward_intermediates(x, intermediates_only=True)[-len(features) :]
    torch.testing.assert_close(features, expected, rtol=0, atol=0)
    pooled = made.forward_head(made.forward_features(x), pre_logits=True)
    bare = timm.create_model(saved, pretrained=True, num_classes=0).eval()
    torch.testing.assert_close(bare(x), pooled, rtol=0, atol=0)
    grey = timm.create_model(saved, pretrained=True, num_classes=5, in_chans=1).eval()
    assert grey(images(1, SIZE, 1)).shape == (1, 5)
    before, after = made.state_dict(), grey.state_dict()
    stem = f'{made.pretrained_cfg["first_conv"]}.weight'
    torch.testing.assert_close(after[stem], before[stem].sum(1, keepdim=True))
    heads = made.pretrained_cfg['classifier']
    heads = (heads,) if isinstance(heads, str) else heads
    assert {key for key in before.keys() | after.keys() if not torch.equal(before[key], after[key])} == {
        stem,
        *(f'{head}.{kind}' for head in heads for kind in ('weight', 'bias')),
    }


def test_other_classes_and_channels_have_the_same_plan(name):
    with torch.device('meta'):
        model = timm.create_model(name, num_classes=10, in_chans=4)
        whole = timm.create_model(name)
    assert {key: w.weight.shape for key, w in model.warehouses.items()} == {
        key: w.weight.shape for key, w in whole.warehouses.items()
    }


@pytest.mark.parametrize('convnet', CONVNETS)
def test_pyramid(convnet):
    pyramid = PyramidFeatures(convnet, frozen_stages=1, norm_eval=True)
    outputs = pyramid(images(1, SIZE))
    assert [o.shape[1] for o in outputs] == list(pyramid.out_channels)
    assert [SIZE // o.shape[-1] for o in outputs] == list(pyramid.strides)
    sum(o.square().mean() for o in outputs).backward()
    assert not [key for key, p in pyramid.named_parameters() if p.requires_grad and p.grad is None]


@torch.no_grad()
@pytest.mark.parametrize('network', [name for name in NAMES if name.values[0].startswith('kw1x')])
def test_trace(network):
    torch.manual_seed(0)
    model = lively(timm.create_model(network, **arguments(network))).double()
    x = images(1, SIZE).double()
    traced = torch.jit.trace(model, x, check_trace=False)
    torch.testing.assert_close(traced(x), model(x), rtol=1e-8, atol=1e-8)


def test_list(capsys):
    assert main(['list']) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert len(lines) == 15 + len(DERIVED) == 57
    assert lines['kw1x_resnet18'] == 'released weights'
    assert lines['kw2x_deit_small_patch16_224'] == "no released weights; pretrained_static='deit_small_patch16_224'"


def test_there_are_no_weights():
    with pytest.raises(WeightsNotFoundError, match=r"no released weights of kw1x_resnet34: .*pretrained_static='resne"):
        timm.create_model('kw1x_resnet34', pretrained=True)
    assert not set(timm.list_models('kw*', pretrained=True, include_tags=False)) & set(DERIVED)
