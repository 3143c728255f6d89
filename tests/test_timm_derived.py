"""What timm asks of each of its own models, asked of the networks whose plans are derived."""

import copy
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
    attention = sum(p.numel() for key, p in made.named_parameters() if '.attention.' in key)
    assert attention <= 0.1 * (sum(p.numel() for p in made.parameters()) - attention)
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
    _, unpooled = check_head(made, SIZE)
    assert unpooled.shape[0] == 1


def test_forward_intermediates(made):
    check_intermediates(made, SIZE)


def test_backward(made):
    check_backward(made, SIZE)


def test_features(made, name):
    model = timm.create_model(name, features_only=True, **arguments(name))
    channels, reduction = model.feature_info.channels(), model.feature_info.reduction()
    outputs = model.train()(images(2, SIZE))
    assert [o.shape[1] for o in outputs] == channels
    assert [SIZE // o.shape[-1] for o in outputs] == reduction
    sum(o.square().mean() for o in outputs).backward()
    # What is behind the last feature is gone, its warehouses, too; timm itself keeps some norms and heads.
    assert not [key for key, p in model.named_parameters() if p.grad is None and 'warehouses' in key]


@torch.no_grad()
def test_saved_and_loaded(made, name, tmp_path):
    timm.models.save_for_hf(made, tmp_path, safe_serialization=True)
    x = images(2, SIZE)
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    torch.testing.assert_close(loaded(x), made(x), rtol=0, atol=0)
    new = timm.create_model(name, **arguments(name)).eval()
    kw_timm.load_checkpoint(new, tmp_path / 'model.safetensors')
    torch.testing.assert_close(new(x), made(x), rtol=0, atol=0)


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
