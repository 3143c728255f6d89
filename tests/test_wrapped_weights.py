"""Weights in the wrappings and parts in which training programs leave them."""

import json
from functools import lru_cache
from typing import Any

import pytest
import timm
import torch
import torch.distributed.checkpoint
from kw_hub.source import read_source, recognise
from kw_hub.verify import verify_file
from networks import images
from safetensors.torch import save_file
from timm.models import load_checkpoint, resume_checkpoint
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel

import kw_timm
from kw_timm.weights import WeightsMismatchError, to_reference_state_dict, unwrap_weights
from kw_timm.weights.skeletons import create_skeleton

SMALL = dict(layers=(1, 1, 1, 1), channels=(8, 16, 16, 16), num_classes=10)
NETWORKS = {
    'small': lambda: timm.create_model('kw1x_resnet18', **SMALL),
    'with a KW classifier': lambda: timm.create_model('kw1d2x_mobilenetv2_050'),
}
CLASSIFIERS = ('fc.', 'classifier.', 'warehouses.classifier.')


@pytest.fixture(scope='module')
def kind(request) -> str:
    return getattr(request, 'param', 'small')


both = pytest.mark.parametrize('kind', NETWORKS, indirect=True, scope='module')
released = pytest.mark.parametrize('kind', ['with a KW classifier'], indirect=True, scope='module')


@pytest.fixture(scope='module')
def network(kind) -> nn.Module:
    """A network with weights that no other one has."""
    model = NETWORKS[kind]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-1, 1)
    return model.eval()


@pytest.fixture(scope='module')
def blank(kind) -> nn.Module:
    """Another network of the same variant, to load into."""
    return NETWORKS[kind]()


@pytest.fixture
def empty(blank) -> nn.Module:
    """The same with all weights zero."""
    with torch.no_grad():
        for value in blank.state_dict().values():
            value.zero_()
    return blank


def same(model: nn.Module, other: nn.Module) -> bool:
    weights = other.state_dict()
    return all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def prefixed(prefix: str, weights: dict[str, Any]) -> dict[str, Any]:
    return {prefix + key: value for key, value in weights.items()}


PREFIXES = (
    *('module.', 'model.', 'net.', 'backbone.', 'encoder.', '_orig_mod.', 'student.', 'ema.', 'encoder_q.0.'),
    *('module.model.', 'model._orig_mod.', '_orig_mod.module.', 'module.module.', 'a.b.c.d.'),
)


@pytest.mark.parametrize('prefix', PREFIXES)
def test_a_prefix_is_taken_off_or_named(prefix, network, empty, tmp_path):
    for weights in (network.state_dict(), to_reference_state_dict(network)):
        weights = prefixed(prefix, weights)
        torch.save({'state_dict': weights, 'epoch': 3}, tmp_path / 'file.ckpt')
        kw_timm.load_checkpoint(empty, tmp_path / 'file.ckpt')
        assert same(empty, network)
        for strict in (True, False):
            with pytest.raises(WeightsMismatchError, match=f"begin with '{prefix}'.*unwrap_weights"):
                empty.load_state_dict(weights, strict)
        empty.load_state_dict(unwrap_weights(weights, empty))


def lightning(model: nn.Module) -> Any:
    more = {'criterion.weight': torch.zeros(3), 'accuracy.total': torch.tensor(3)}
    return {'epoch': 3, 'callbacks': {}, 'state_dict': {**prefixed('model.', model.state_dict()), **more}}


def beside(model: nn.Module, head: str) -> Any:
    """As MMPretrain keeps a classifier."""
    weights = model.state_dict()
    classifier = {key: value for key, value in weights.items() if key.startswith(CLASSIFIERS)}
    trunk = {key: value for key, value in weights.items() if key not in classifier}
    return {'meta': {}, 'state_dict': {**prefixed('backbone.model.', trunk), **prefixed(head, classifier)}}


def within(model: nn.Module, part: str) -> Any:
    """Modules of a network wrapped one by one."""
    return {key.replace('.attention.', f'.attention.{part}.'): value for key, value in model.state_dict().items()}


WRAPPINGS = {
    'Lightning': lightning,
    'DDP': lambda m: nn.DataParallel(m).state_dict(),
    'DDP in a checkpoint': lambda m: {'model': nn.DataParallel(m).state_dict(), 'optimizer': {'state': {}}},
    'averaged': lambda m: AveragedModel(m).state_dict(),
    'averaged in a checkpoint': lambda m: {'model_state_dict': AveragedModel(nn.DataParallel(m)).state_dict()},
    'EMA of timm': lambda m: {
        'state_dict': {key: torch.zeros_like(value) for key, value in m.state_dict().items()},
        'state_dict_ema': ModelEmaV3(m).state_dict(),
    },
    'EMA of mmengine': lambda m: {'state_dict': {}, 'ema_state_dict': prefixed('module.', m.state_dict())},
    'compiled': lambda m: prefixed('_orig_mod.', m.state_dict()),
    'compiled, distributed': lambda m: prefixed('_orig_mod.', nn.DataParallel(m).state_dict()),
    'compiled by parts': lambda m: within(m, '_orig_mod'),
    'checkpointed by parts': lambda m: within(m, '_checkpoint_wrapped_module'),
    'a detector': lambda m: {'state_dict': prefixed('backbone.', m.state_dict()) | {'rpn_head.x': torch.zeros(1)}},
    'a classifier beside': lambda m: beside(m, ''),
    'a classifier as head': lambda m: beside(m, 'head.'),
    'an entry of another name': lambda m: {'weights': {'encoder': m.state_dict()}, 'step': torch.tensor(3)},
}


@pytest.mark.parametrize('wrapping', WRAPPINGS)
def test_wrapped_checkpoints(wrapping, network, empty, tmp_path):
    torch.save(WRAPPINGS[wrapping](network), tmp_path / 'file.pth')
    result = kw_timm.load_checkpoint(empty, tmp_path / 'file.pth')
    assert same(empty, network)
    assert not result.missing_keys
    assert not result.unexpected_keys


def test_wrapped_networks_are_looked_through(network, empty, tmp_path):
    torch.save(network.state_dict(), tmp_path / 'file.pth')
    average = AveragedModel(nn.DataParallel(empty))
    kw_timm.load_checkpoint(average, tmp_path / 'file.pth')
    assert same(average.module.module, network)
    kw_timm.load_checkpoint(nn.DataParallel(empty), tmp_path / 'file.pth')
    assert same(empty, network)


@pytest.mark.slow
def test_compiled_networks(network, empty, tmp_path):
    torch.save(torch.compile(nn.DataParallel(network)).state_dict(), tmp_path / 'file.pth')
    kw_timm.load_checkpoint(torch.compile(nn.DataParallel(empty)), tmp_path / 'file.pth')
    assert same(empty, network)


def test_two_networks_in_one_file(network, empty, tmp_path):
    other = {key: torch.ones_like(value) for key, value in network.state_dict().items()}
    file = tmp_path / 'file.pth'
    torch.save(
        {'student': prefixed('module.backbone.', other), 'teacher': prefixed('backbone.', network.state_dict())}, file
    )
    with pytest.raises(WeightsMismatchError, match=r'2 times, under student.module.backbone., teacher.backbone. each'):
        kw_timm.load_checkpoint(empty, file)
    with pytest.raises(WeightsMismatchError, match=r"prefix='x\.'; they begin with student, teacher"):
        kw_timm.load_checkpoint(empty, file, prefix='x')
    kw_timm.load_checkpoint(empty, file, prefix='teacher')
    assert same(empty, network)


def test_a_checkpoint_is_no_state_dict(network, empty):
    with pytest.raises(WeightsMismatchError, match=r"load_state_dict\(checkpoint\['state_dict'\]\)"):
        empty.load_state_dict({'state_dict': network.state_dict(), 'epoch': 3})
    with pytest.raises(WeightsMismatchError, match=r"begin with '_orig_mod\.' or have it within"):
        empty.load_state_dict(within(network, '_orig_mod'))


PARTS = {
    'backbone': lambda key: not key.startswith(CLASSIFIERS),
    'classifier': lambda key: key.startswith(CLASSIFIERS),
    'a stage': lambda key: key.startswith(('layer3.', 'blocks.4.')),
    'a layer': lambda key: key.startswith(('layer2.0.conv1.', 'blocks.2.1.conv_dw.')),
    'a tensor': lambda key: key in ('layer2.0.conv1.attention.fc1.weight', 'blocks.2.1.conv_dw.attention.fc1.weight'),
    'a warehouse': lambda key: key in ('warehouses.layer3.weight', 'warehouses.stage5_dw.weight'),
    'no warehouse': lambda key: 'warehouse' not in key,
    'norms': lambda key: '.bn' in key,
}


@both
@pytest.mark.parametrize('part', PARTS)
@pytest.mark.parametrize('reference', [False, True])
def test_parts(part, reference, network, empty, tmp_path):
    whole = network.state_dict()
    kept = {key for key in whole if PARTS[part](key)}
    weights = {key: whole[key] for key in kept}
    if reference:
        names = kw_timm.weights.reference_keys(network)
        weights = {names[key]: value for key, value in weights.items()}
    missing, unexpected = empty.load_state_dict(weights, strict=False)
    assert not unexpected
    assert not set(missing) & kept
    for key, value in empty.state_dict().items():
        assert torch.equal(value, whole[key]) if key in kept else not value.any()
    with pytest.raises(RuntimeError, match='Missing key') as caught:
        empty.load_state_dict(weights)
    assert 'static' not in str(caught.value)
    torch.save(prefixed('module.model.', weights), tmp_path / 'file.pth')
    assert kw_timm.load_checkpoint(empty, tmp_path / 'file.pth', strict=False).missing_keys
    with pytest.raises(WeightsMismatchError, match=r'file\.pth.*missing: .* or with strict=False what is there\.$'):
        kw_timm.load_checkpoint(empty, tmp_path / 'file.pth')


@both
@pytest.mark.parametrize('reference', [False, True])
@pytest.mark.parametrize('device', ['cpu', 'meta'])
def test_shards(reference, device, network, kind):
    weights = to_reference_state_dict(network) if reference else network.state_dict()
    with torch.device(device):
        model = NETWORKS[kind]()
    for i in range(4):
        shard = {key: weights[key] for key in list(weights)[i::4]}
        model.load_state_dict(shard, strict=False, assign=device == 'meta')
    assert same(model, network)


@pytest.mark.parametrize('way', ['assign', 'to_empty'])
def test_from_the_meta_device(way, network, kind):
    """Temperature brings out what no weight file holds."""
    with torch.device('meta'):
        model = NETWORKS[kind]().eval()
    if way == 'to_empty':
        model.to_empty(device='cpu')
    model.load_state_dict(network.state_dict(), assign=way == 'assign')
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), network.buffers(), strict=True))
    for each in (model, network):
        kw_timm.set_temperature(each, 0.5)
    assert torch.equal(model(images()), network(images()))
    kw_timm.set_temperature(network, 0.0)


@released
def test_a_network_without_its_last_layers(network):
    name = network.pretrained_cfg['architecture']
    pruned = timm.create_model(name, features_only=True, out_indices=(1, 2)).model
    for weights in (network.state_dict(), to_reference_state_dict(network)):
        with torch.no_grad():
            pruned.bn1.weight.zero_()
        missing, unexpected = pruned.load_state_dict(weights, strict=False)
        assert not missing
        assert unexpected
        assert same(pruned, network)
    with pytest.raises(RuntimeError, match='Unexpected key'):
        pruned.load_state_dict(weights)


def test_files_by_an_index(network, empty, tmp_path):
    weights = network.state_dict()
    names = {key: f'model-{i % 3}.safetensors' for i, key in enumerate(weights)}
    for file in set(names.values()):
        save_file({key: value for key, value in weights.items() if names[key] == file}, tmp_path / file)
    index = tmp_path / 'model.safetensors.index.json'
    index.write_text(json.dumps({'weight_map': names}))
    for path in (index, tmp_path):
        kw_timm.load_checkpoint(empty, path)
        assert same(empty, network)
    kw_timm.load_checkpoint(empty, tmp_path / 'model-0.safetensors', strict=False)
    (tmp_path / 'model-1.safetensors').unlink()
    with pytest.raises(FileNotFoundError, match=r'names 3 files; not there: model-1\.safetensors'):
        kw_timm.load_checkpoint(empty, index)
    index.write_text(json.dumps({'weight_map': {'a': '../model-0.safetensors'}}))
    with pytest.raises(ValueError, match='names no files beside it'):
        kw_timm.load_checkpoint(empty, index)


@pytest.mark.parametrize('file', ['model.safetensors', 'pytorch_model.bin'])
def test_a_folder_as_accelerate_and_transformers_write_it(file, network, empty, tmp_path):
    save = save_file if file.endswith('safetensors') else torch.save
    save(network.state_dict(), tmp_path / file)
    kw_timm.load_checkpoint(empty, tmp_path)
    assert same(empty, network)
    (tmp_path / file).rename(tmp_path / 'renamed.ckpt')  # What a file is, its beginning tells.
    kw_timm.load_checkpoint(empty, tmp_path / 'renamed.ckpt')


def test_a_folder_of_distributed_checkpoints(network, empty, tmp_path):
    torch.distributed.checkpoint.save({'model': network.state_dict()}, checkpoint_id=tmp_path / 'dcp', no_dist=True)
    with pytest.raises(ValueError, match='dcp_to_torch_save'):
        kw_timm.load_checkpoint(empty, tmp_path / 'dcp')


skeleton = lru_cache(create_skeleton)


@pytest.mark.parametrize('part', ['all', 'a stage', 'a warehouse', 'no warehouse'])
@pytest.mark.parametrize(
    ('theirs', 'ours'), [('kw4x_resnet18', 'kw1d4x_resnet18'), ('kw1x_mobilenetv2_050', 'kw1d2x_mobilenetv2_100')]
)
def test_another_variants_part_is_refused_and_named(part, theirs, ours):
    source, model = skeleton(theirs), skeleton(ours)
    chosen = PARTS.get(part, lambda key: True)
    weights = {key: value for key, value in source.state_dict().items() if chosen(key)}
    for strict in (True, False):
        with pytest.raises(WeightsMismatchError, match=f'weights are of .*{theirs}.* the model is {ours}'):
            model.load_state_dict(weights, strict, assign=True)


@released
def test_timms_own_functions(network, empty, tmp_path):
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    weights = network.state_dict()
    torch.save(
        {'state_dict': prefixed('module.', weights), 'epoch': 3, 'version': 2, 'optimizer': optimizer.state_dict()},
        tmp_path / 'last.pth.tar',
    )
    file, name = str(tmp_path / 'last.pth.tar'), network.pretrained_cfg['architecture']
    load_checkpoint(empty, file)
    assert same(empty, network)
    assert resume_checkpoint(empty, file, torch.optim.SGD(empty.parameters(), lr=1.0)) == 4
    assert same(timm.create_model(name, checkpoint_path=file), network)
    overlay = dict(pretrained=True, pretrained_cfg_overlay=dict(file=file))
    assert same(timm.create_model(name, **overlay), network)
    changed = timm.create_model(name, **overlay, num_classes=7, in_chans=1)
    stem = ('conv1.', 'conv_stem.attention.fc1.', 'warehouses.stem.')
    for key, value in changed.state_dict().items():
        assert torch.equal(value, weights[key]) or key.startswith((*CLASSIFIERS, *stem)), key
    torch.save({'state_dict': prefixed('net.', weights)}, file)
    assert same(timm.create_model(name, **overlay), network)  # This package's own filter.
    with pytest.raises(WeightsMismatchError, match=r"begin with 'net\.'"):
        timm.create_model(name, checkpoint_path=file)


@released
def test_wrapped_files_are_recognised(network, tmp_path):
    content = lightning(network)
    torch.save(content, tmp_path / 'more.ckpt')
    with pytest.raises(ValueError, match=r"more.ckpt' .* names begin with 'model\.', there is more: criterion"):
        verify_file(tmp_path / 'more.ckpt')
    content['state_dict'] = {key: value for key, value in content['state_dict'].items() if key.startswith('model.')}
    torch.save(content, tmp_path / 'file.ckpt')
    found = recognise(read_source(tmp_path / 'file.ckpt'))
    assert found.name == 'kw1d2x_mobilenetv2_050.osvai_in1k'
    weights = network.state_dict()
    assert found.state_dict.keys() == weights.keys()
    assert all(torch.equal(value, weights[key]) for key, value in found.state_dict.items())


@released
@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_numbers_that_are_none(value, network, empty, tmp_path):
    weights = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    weights['bn1.weight'][3] = value
    torch.save(weights, tmp_path / 'file.pth')
    for use in (
        lambda: verify_file(tmp_path / 'file.pth'),
        lambda: kw_timm.load_checkpoint(empty, tmp_path / 'file.pth'),
    ):
        with pytest.raises(ValueError, match=r'file\.pth.* NaN or infinite numbers, in bn1\.weight: .*earlier'):
            use()
    assert not any(tensor.any() for tensor in empty.state_dict().values())


def test_floating_types_are_converted_as_torch_does(network, empty):
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        weights = {k: v.to(dtype) if v.is_floating_point() else v for k, v in network.state_dict().items()}
        empty.load_state_dict(weights)
        assert all(torch.equal(value, weights[key].to(value.dtype)) for key, value in empty.state_dict().items())
