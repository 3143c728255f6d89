"""Networks that were kernelized by any plan are saved by timm's functions, and built again without the script."""

import json
from pathlib import Path

import pytest
import timm
import torch
from hub_server import TOKEN
from networks import images
from torch import nn

import kw_timm
from kw_timm import WarehousePlan, derive_plan, kernelize, plan_from_json
from kw_timm.layers import KWLayer, KWLinear
from kw_timm.models import KernelizedNetwork

STATIC = 'test_resnet'


def kernelized(budget: float = 1, **arguments) -> nn.Module:
    """A small network as a user makes it."""
    torch.manual_seed(0)
    model = timm.create_model(STATIC, **arguments)
    kernelize(model, derive_plan(model, budget, attention_limit=0.3, exclude='layer1.*'))
    return model.eval()


def saved(model: nn.Module, folder: Path, **options) -> str:
    timm.models.save_for_hf(model, folder, **{'safe_serialization': True, **options})
    return f'local-dir:{folder}'


@torch.no_grad()
@pytest.mark.parametrize('budget', [0.5, 2])
def test_folder(budget, tmp_path):
    model, x = kernelized(budget, num_classes=5, in_chans=1), images(2, 64, 1)
    name = saved(model, tmp_path, safe_serialization=budget == 2)
    config = json.loads((tmp_path / 'config.json').read_text())
    assert (config['architecture'], config['model_args']['static']) == ('kernelized', STATIC)
    assert all(entry['cell_num_ratio'] == budget for entry in config['model_args']['plan'].values())
    loaded = timm.create_model(name, pretrained=True).eval()
    assert isinstance(loaded, KernelizedNetwork)
    assert isinstance(loaded, timm.models.ResNet)
    assert torch.equal(loaded(x), model(x))
    # Saved again, the same.
    (tmp_path / 'again').mkdir()
    saved(loaded, tmp_path / 'again')
    assert json.loads((tmp_path / 'again/config.json').read_text())['model_args'] == config['model_args']


@torch.no_grad()
def test_a_folder_serves_other_purposes(tmp_path):
    model, x = kernelized(), images(2, 64)
    name = saved(model, tmp_path)
    features = timm.create_model(name, pretrained=True, features_only=True, out_indices=(1, 2)).eval()
    expected = model.forward_intermediates(x, indices=[1, 2], intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(features(x), expected, strict=True))
    kept = {id(module.__dict__['warehouse']) for module in features.modules() if isinstance(module, KWLayer)}
    assert {id(warehouse) for warehouse in features.model.warehouses.values()} == kept
    tuned = timm.create_model(name, pretrained=True, num_classes=3, in_chans=1).eval()
    assert tuned(images(1, 64, 1)).shape == (1, 3)
    assert torch.equal(tuned.layer4[0].bn1.weight, model.layer4[0].bn1.weight)
    assert {k: w.weight.shape for k, w in tuned.warehouses.items()} == {
        k: w.weight.shape for k, w in model.warehouses.items()
    }
    bare = timm.create_model(name, pretrained=True, num_classes=0).eval()
    torch.testing.assert_close(bare(x), model.forward_head(model.forward_features(x), pre_logits=True))
    random = timm.create_model(name)
    assert not torch.equal(random.fc.weight, model.fc.weight)
    result = kw_timm.load_checkpoint(random, tmp_path / 'model.safetensors')
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert torch.equal(random.eval()(x), model(x))


@torch.no_grad()
def test_hub(hub, tmp_path):
    model, x = kernelized(), images(2, 64)
    saved(model, tmp_path)
    hub.add('someone/theirs', {file.name: file.read_bytes() for file in tmp_path.iterdir()})
    for repository in ('hf-hub:someone/theirs', 'hf-hub:someone/theirs@main'):
        assert torch.equal(timm.create_model(repository, pretrained=True).eval()(x), model(x))


@torch.no_grad()
def test_pushed_to_the_hub(hub):
    model, x = kernelized(2), images(2, 64)
    timm.models.push_to_hf_hub(model, 'someone/mine', token=TOKEN, safe_serialization=True)
    assert {'config.json', 'model.safetensors', 'README.md'} <= set(hub.repositories['someone/mine'].commits[-1][1])
    assert torch.equal(timm.create_model('hf-hub:someone/mine', pretrained=True).eval()(x), model(x))


@torch.no_grad()
def test_kernelized_in_two_steps(tmp_path):
    torch.manual_seed(0)
    model, x = timm.create_model(STATIC), images(2, 64)
    kernelize(model, {'last': WarehousePlan(['layer4.0.conv1', 'layer4.0.conv2'])})
    kernelize(model, {'before': WarehousePlan(['layer3.0.conv2'], cell_num_ratio=4)})
    loaded = timm.create_model(saved(model.eval(), tmp_path), pretrained=True).eval()
    assert list(loaded.warehouses) == ['last', 'before']
    assert torch.equal(loaded(x), model(x))


@torch.no_grad()
def test_layer_norms_and_classifiers(tmp_path):
    torch.manual_seed(0)
    model, x = timm.create_model(STATIC, num_classes=6), images(2, 64)
    kernelize(model, {'head': WarehousePlan(['fc'])}, nn.LayerNorm)
    loaded = timm.create_model(saved(model.eval(), tmp_path), pretrained=True).eval()
    assert isinstance(loaded.fc.attention.norm1, nn.LayerNorm)
    assert torch.equal(loaded(x), model(x))
    loaded.reset_classifier(3)
    assert not isinstance(loaded.fc, KWLinear)
    assert 'head' not in loaded.warehouses


def test_released_networks_are_saved_by_their_own_names(tmp_path):
    model = timm.create_model('kw1d2x_mobilenetv2_050', num_classes=7)
    model.reset_classifier(9)
    saved(model, tmp_path)
    config = json.loads((tmp_path / 'config.json').read_text())
    assert config['architecture'] == 'kw1d2x_mobilenetv2_050'
    assert 'plan' not in config['model_args']


def test_networks_that_are_not_timms_are_left_alone():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
    kernelize(model, {'w': WarehousePlan(['1'])})
    assert not hasattr(model, 'pretrained_cfg')


def test_by_arguments():
    plan = {'last': {'layers': ['layer4.0.conv1', 'layer4.0.conv2'], 'cell_num_ratio': 2}}
    model = timm.create_model('kernelized', static=STATIC, plan=plan, num_classes=3)
    assert {key for key, module in model.named_modules() if isinstance(module, KWLayer)} == set(plan['last']['layers'])
    assert model.pretrained_cfg['input_size'] == timm.create_model(STATIC).pretrained_cfg['input_size']
    expected = timm.create_model(STATIC, num_classes=3)
    kernelize(expected, plan_from_json(plan))
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in expected.state_dict().items()}
    assert 'kernelized' not in timm.list_models('kw*')
    assert 'kernelized' not in timm.list_models(pretrained=True, include_tags=False)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({}, 'kernelized needs static and plan'),
        ({'static': STATIC}, 'kernelized needs plan'),
        ({'static': 'resnet3', 'plan': {}}, "timm has no network 'resnet3' to kernelize"),
        ({'static': 7, 'plan': {}}, 'timm has no network 7'),
        ({'static': STATIC, 'plan': ['conv1']}, 'A plan must be a dict'),
        (
            {'static': STATIC, 'plan': {'w': {'layers': ['conv9']}}},
            "layer 'conv9', which the network does not have",
        ),
        ({'static': STATIC, 'plan': {'w': {'layer': ['fc']}}}, "'w' has unknown entries layer"),
        (
            {'static': STATIC, 'plan': {'w': {'layers': ['fc']}}, 'attention_norm': 'GroupNorm'},
            'one of BatchNorm1d',
        ),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model('kernelized', **arguments)


def test_no_weights():
    plan = {'w': {'layers': ['layer4.0.conv1']}}
    with pytest.raises(RuntimeError, match='There are no released weights of kernelized'):
        timm.create_model('kernelized', pretrained=True, static=STATIC, plan=plan)


@pytest.mark.slow  # compares the weights with all released networks'
def test_folder_with_another_plan(tmp_path):
    name = saved(kernelized(), tmp_path)
    config = json.loads((tmp_path / 'config.json').read_text())
    first = next(iter(config['model_args']['plan'].values()))
    first['cell_num_ratio'] = 4
    (tmp_path / 'config.json').write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r'weights are of no released variant .* the model is kernelized'):
        timm.create_model(name, pretrained=True)


def test_folder_without_a_plan(tmp_path):
    name = saved(kernelized(), tmp_path)
    config = json.loads((tmp_path / 'config.json').read_text())
    del config['model_args']['plan']
    (tmp_path / 'config.json').write_text(json.dumps(config))
    with pytest.raises(ValueError, match='kernelized needs plan'):
        timm.create_model(name, pretrained=True)


@torch.no_grad()
def test_starts_from_the_static_network():
    torch.manual_seed(0)
    static, x = timm.create_model(STATIC).eval(), images(2, 64)
    plan = kw_timm.plan_to_json(derive_plan(static, 2, attention_limit=0.3))
    file = {key: value.clone() for key, value in static.state_dict().items()}
    model = timm.create_model('kernelized', static=STATIC, plan=plan, pretrained_static=file).eval()
    torch.testing.assert_close(model(x), static(x), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize('given', [Path, torch.load])
def test_any_source_of_static_weights_can_be_saved(given, tmp_path):
    file = tmp_path / 'static.pth'
    torch.save(timm.create_model(STATIC).state_dict(), file)
    plan = {'last': WarehousePlan(['layer4.0.conv1', 'layer4.0.conv2'])}
    model = timm.create_model('kernelized', static=STATIC, plan=plan, pretrained_static=given(file)).eval()
    name, x = saved(model, tmp_path), images(2, 64)
    assert set(json.loads((tmp_path / 'config.json').read_text())['model_args']) >= {'static', 'plan'}
    assert torch.equal(timm.create_model(name, pretrained=True).eval()(x), model(x))


@torch.no_grad()
def test_how_a_network_began_is_not_asked_for_again(tmp_path):
    torch.save(timm.create_model(STATIC).state_dict(), tmp_path / 'static.pth')
    plan = {'last': {'layers': ['layer4.0.conv1', 'layer4.0.conv2']}}
    arguments = {'static': STATIC, 'plan': plan, 'pretrained_static': str(tmp_path / 'static.pth')}
    model, x = timm.create_model('kernelized', **arguments).eval(), images(2, 64)
    name = saved(model, tmp_path)
    (tmp_path / 'static.pth').unlink()
    assert torch.equal(timm.create_model(name, pretrained=True).eval()(x), model(x))
