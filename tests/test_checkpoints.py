"""Weight files: the reference's and ours, the good and the bad."""

import argparse
import os
import pickle

import pytest
import timm
import torch
from networks import VARIANTS, images, network
from reference_data import CLASSIFICATION, manifest, reference_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

import kw_timm
from kw_timm.weights import (
    identify_variant,
    read_weight_file,
    reference_keys,
    to_reference_state_dict,
    to_timm_state_dict,
)

# One of each family, and one with a KW classifier.
FILES = ('kw1x_resnet18', 'kw1x_mobilenetv2_050', 'kw1x_convnext_tiny', 'kw1d2x_mobilenetv2_100')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp('weights')


@pytest.fixture(scope='module', params=FILES)
def name(request) -> str:
    return request.param


@pytest.fixture(scope='module')
def weights(name) -> dict[str, torch.Tensor]:
    return {
        key: value.float() if value.is_floating_point() else value for key, value in reference_state_dict(name).items()
    }


@pytest.fixture(scope='module')
def reference_file(name, weights, folder):
    """A file as the reference's training program writes it."""
    path = folder / f'{name}.pth'
    content = {
        'model': weights,
        'optimizer': {'state': {0: {'step': torch.tensor(3.0)}}, 'param_groups': [{'lr': 1e-3, 'params': [0]}]},
        'epoch': 299,
        'scaler': {'scale': 65536.0, '_growth_tracker': 7},
        'args': argparse.Namespace(model=name, lr=4e-3, drop=None),
    }
    torch.save(content, path)
    return path


def by_checkpoint_path(name, path, **kwargs):
    return timm.create_model(name, checkpoint_path=str(path), **kwargs)


def by_pretrained_cfg(name, path, **kwargs):
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(file=str(path)), **kwargs)


def by_us(name, path, **kwargs):
    model = timm.create_model(name, **kwargs)
    kw_timm.load_checkpoint(model, path)
    return model


LOADERS = (by_checkpoint_path, by_pretrained_cfg, by_us)


@pytest.mark.parametrize('load', LOADERS)
def test_reference_file(name, weights, reference_file, load):
    model = load(name, reference_file)
    keys = reference_keys(model)
    assert set(keys.values()) == set(weights)
    for key, value in model.state_dict().items():
        assert torch.equal(value.flatten(), weights[keys[key]].flatten()), key


@pytest.mark.parametrize('load', LOADERS)
@pytest.mark.parametrize('extension', ['.pth', '.safetensors'])
def test_our_own_file(folder, load, extension):
    name = 'kw1x_mobilenetv2_050'
    model, path = network(name), folder / f'own{extension}'
    save_file(model.state_dict(), path) if extension == '.safetensors' else torch.save(model.state_dict(), path)
    loaded = load(name, path).eval()
    assert torch.equal(loaded(images()), model(images()))


@pytest.mark.parametrize('name', ['kw1x_resnet18'])
def test_averaged_weights_are_preferred(name, folder):
    model, path = network(name), folder / 'ema.pth'
    averaged = to_reference_state_dict(model)
    other = {key: torch.zeros_like(value) for key, value in averaged.items()}
    torch.save({'model': other, 'model_ema': averaged}, path)
    assert torch.equal(by_checkpoint_path(name, path).conv1.weight, model.conv1.weight)
    assert torch.equal(by_us(name, path).conv1.weight, model.conv1.weight)
    kw_timm.load_checkpoint(model, path, use_ema=False)
    assert not model.conv1.weight.any()


def test_prefixes_of_wrappers_are_removed(folder):
    model, path = network('kw1x_resnet18'), folder / 'wrapped.pth'
    torch.save({'state_dict': {f'module._orig_mod.{k}': v for k, v in to_reference_state_dict(model).items()}}, path)
    assert torch.equal(by_us('kw1x_resnet18', path).fc.weight, model.fc.weight)


@pytest.mark.parametrize('variant', VARIANTS)
def test_round_trip(variant):
    """Ours -> the reference's -> ours, bit by bit."""
    with torch.device('meta'):
        model, other = timm.create_model(variant), timm.create_model(variant)
    own = {
        key: torch.randint(100, value.shape) if value.dtype == torch.long else torch.rand(value.shape)
        for key, value in model.state_dict().items()
    }
    model.load_state_dict(own, assign=True)
    reference = to_reference_state_dict(model)
    if variant in CLASSIFICATION:
        assert {key: tuple(value.shape) for key, value in reference.items()} == manifest(variant)
        assert list(reference)[: len(model.warehouses)] == list(manifest(variant))[: len(model.warehouses)]
    assert identify_variant(reference) == identify_variant(own) == variant
    other.load_state_dict(reference, assign=True)
    back = other.state_dict()
    assert back.keys() == own.keys()
    assert all(torch.equal(back[key], own[key]) for key in own)


def test_converted_weights_are_not_copied_or_changed(weights, name):
    with torch.device('meta'):
        model = timm.create_model(name)
    before = dict(weights)
    converted = to_timm_state_dict(weights, model)
    assert weights.keys() == before.keys()
    assert {v.data_ptr() for v in converted.values()} == {v.data_ptr() for v in weights.values()}


@pytest.mark.parametrize('load', LOADERS)
@pytest.mark.parametrize(
    ('theirs', 'ours'),
    [
        ('kw1x_resnet18', 'kw4x_resnet50'),
        ('kw1x_mobilenetv2_050', 'kw4x_mobilenetv2_050'),
        ('kw1x_convnext_tiny', 'kw1x_resnet18'),
    ],
)
def test_another_variants_file(theirs, ours, load, folder):
    path = folder / f'{theirs}_again.pth'
    torch.save({'model': to_reference_state_dict(network(theirs))}, path)
    with pytest.raises(ValueError, match=f'weights are of {theirs} .* the model is .*{ours}') as caught:
        load(ours, path)
    assert f"timm.create_model('{theirs}')" in str(caught.value)
    assert len(str(caught.value)) < 500


def test_every_variant_is_told_from_every_other():
    with torch.device('meta'):
        models = {name: timm.create_model(name) for name in VARIANTS}
    for theirs, source in models.items():
        for ours, model in models.items():
            if theirs == ours:
                continue
            with pytest.raises(ValueError, match=f'weights are of {theirs} .* the model is {ours}'):
                model.load_state_dict(source.state_dict(), assign=True)


def test_variants_are_known_with_other_channels_and_classes():
    for name in ('kw1d2x_mobilenetv2_050', 'kw1x_convnext_tiny', 'kw1x_resnet18'):
        with torch.device('meta'):
            model = timm.create_model(name, in_chans=1, num_classes=7)
        assert identify_variant(model.state_dict()) == name
    with torch.device('meta'):
        unknown = timm.create_model('kw1x_resnet18', cell_num_ratio=8)
    assert identify_variant(unknown.state_dict()) is None
    assert identify_variant({'fc.weight': torch.zeros(2, 2)}) is None


@pytest.mark.parametrize('load', LOADERS)
@pytest.mark.parametrize('classes', [1000, 10])
def test_a_static_networks_file(load, classes, folder):
    path = folder / 'static.pth'
    torch.save(timm.create_model('resnet18').state_dict(), path)
    with pytest.raises(ValueError, match=r'hold no warehouse: they are those of a static network.* kw1x_resnet18'):
        load('kw1x_resnet18', path, num_classes=classes)


def test_missing_keys_are_named():
    model = network('kw1x_resnet18')
    weights = to_reference_state_dict(model)
    del weights['layer1.0.conv2.attention.fc1.weight']
    weights['layer9.weight'] = torch.zeros(1)
    with pytest.raises(RuntimeError, match=r'(?s)Missing.*layer1.0.conv2.attention.fc1.weight.*Unexpected.*layer9'):
        model.load_state_dict(weights)
    result = model.load_state_dict(weights, strict=False)
    assert (result.missing_keys, result.unexpected_keys) == (['layer1.0.conv2.attention.fc1.weight'], ['layer9.weight'])


class Payload:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize('load', LOADERS)
@pytest.mark.parametrize('zipped', [True, False])
def test_a_live_payload_is_refused_and_named(load, zipped, folder, tmp_path):
    path, trace = folder / f'evil_{zipped}.pth', tmp_path / 'ran'
    content = {'model': to_reference_state_dict(network('kw1x_resnet18')), 'args': Payload(f'touch {trace}')}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    # Of a file that is no zip archive timm's own loader does not name it.
    name = 'non-allowlisted pickle globals' if load is by_checkpoint_path and not zipped else r'posix\.system'
    with pytest.raises(RuntimeError if load is by_checkpoint_path else ValueError, match=name):
        load('kw1x_resnet18', path)
    assert not trace.exists()
    # The payload is a live one.
    pickle.loads(pickle.dumps(Payload(f'touch {trace}')))
    assert trace.exists()


def truncated(path) -> None:
    torch.save({'model': {'a': torch.zeros(10000)}}, path)
    path.write_bytes(path.read_bytes()[:5000])


BROKEN = {
    'missing': (lambda path: None, FileNotFoundError, 'There is no weight file'),
    'empty': (lambda path: path.touch(), ValueError, 'is empty'),
    'truncated': (truncated, ValueError, r'\(5000 bytes\) cannot be read: it is cut off'),
    'a folder': (lambda path: path.mkdir(), ValueError, 'is a folder'),
    'a web page': (
        lambda path: path.write_text('<!DOCTYPE html>' * 50),
        ValueError,
        'cannot be read: .* not a weight file',
    ),
    'no tensors': (lambda path: torch.save({'epoch': 3}, path), ValueError, 'holds no tensors'),
    'a tensor': (lambda path: torch.save(torch.zeros(3), path), ValueError, 'holds no tensors|cannot be read'),
}


@pytest.mark.parametrize('load', [by_pretrained_cfg, by_us])
@pytest.mark.parametrize('extension', ['.pth', '.safetensors'])
@pytest.mark.parametrize('case', BROKEN)
def test_broken_files(case, extension, load, tmp_path):
    write, error, message = BROKEN[case]
    path = tmp_path / f'weights{extension}'
    write(path)
    if extension == '.safetensors' and case in ('no tensors', 'a tensor'):
        message = 'cannot be read'
    with pytest.raises(error, match=message) as caught:
        load('kw1x_mobilenetv2_050', path)
    assert str(path) in str(caught.value)


def test_broken_files_leave_the_model_alone(tmp_path):
    model, path = network('kw1x_resnet18'), tmp_path / 'weights.pth'
    truncated(path)
    before = model(images())
    with pytest.raises(ValueError, match='cannot be read'):
        kw_timm.load_checkpoint(model, path)
    assert torch.equal(model(images()), before)


@pytest.mark.parametrize('case', ['missing', 'empty', 'truncated', 'a folder'])
def test_broken_files_by_checkpoint_path(case, tmp_path):
    """timm's own loader stops too; what it says is timm's."""
    path = tmp_path / 'weights.pth'
    BROKEN[case][0](path)
    with pytest.raises((OSError, RuntimeError, EOFError)):
        by_checkpoint_path('kw1x_mobilenetv2_050', path)


def test_reading_gives_plain_tensors(name, reference_file, weights):
    state_dict = read_weight_file(reference_file)
    assert list(state_dict) == list(weights)
    assert all(value.device.type == 'cpu' for value in state_dict.values())


def test_safetensors_hold_every_tensor_once(tmp_path):
    model = network('kw1d2x_mobilenetv2_050')
    save_file(model.state_dict(), tmp_path / 'a.safetensors')
    assert load_file(tmp_path / 'a.safetensors').keys() == model.state_dict().keys()
    wrapped = nn.ModuleDict({'backbone': model})
    save_file(wrapped.state_dict(), tmp_path / 'b.safetensors')
