"""What training and deployment put around a network: groups, averages, copies, types, processes."""

import copy
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
from networks import SMALLEST, SPECIAL, images, network
from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay
from timm.utils import ModelEmaV3, freeze, unfreeze
from torch import nn

from kw_timm.layers import KWLayer

# 16-bit convolutions are slow where the processor has none.
QUICK_IN_16_BITS = ('kw1x_mobilenetv2_050', 'kw1d2x_mobilenetv2_050')


@pytest.fixture(params=SPECIAL)
def model(request) -> nn.Module:
    return network(request.param)


def gradients(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(x).square().mean().backward()
    return {key: p.grad.clone() for key, p in model.named_parameters()}


def test_weight_decay_groups(model):
    groups = param_groups_weight_decay(model, 0.05)
    every = {id(p) for p in model.parameters()}
    grouped = [id(p) for group in groups for p in group['params']]
    assert len(grouped) == len(every)
    assert set(grouped) == every
    decayed = {id(p) for group in groups if group['weight_decay'] for p in group['params']}
    names = {key for key, p in model.named_parameters() if id(p) in decayed}
    assert {f'warehouses.{name}.weight' for name in model.warehouses} <= names
    assert not [key for key in names if key.endswith(('bias', 'basis_bias', 'gamma', 'norm1.weight', 'bn1.weight'))]


def test_layer_decay_groups(model):
    groups = param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.5)
    every = {id(p) for p in model.parameters()}
    grouped = [id(p) for group in groups for p in group['params']]
    assert len(grouped) == len(every)
    assert set(grouped) == every
    scale = {id(p): group['lr_scale'] for group in groups for p in group['params']}
    scales = {key: scale[id(p)] for key, p in model.named_parameters()}
    # What several depths share learns as fast as the last.
    assert {value for key, value in scales.items() if key.startswith('warehouses.')} == {1.0}
    stem = {'resnet': 'conv1', 'mobilenetv2': 'conv_stem', 'convnext': 'stem.0'}[model.family]
    assert {value for key, value in scales.items() if key.startswith(f'{stem}.')} == {min(scales.values())}
    # A layer's attention is as deep as the layer.
    key = next(key for key in scales if key.endswith('conv2.attention.fc1.weight') or 'conv_dw.attention.fc1' in key)
    assert min(scales.values()) < scales[key] < 1


def test_optimizer_trains_the_cells():
    model = network('kw1x_mobilenetv2_050').train()
    optimizer = create_optimizer_v2(model, 'adamw', lr=1e-3, weight_decay=0.05, layer_decay=0.75)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    F.cross_entropy(model(images()), torch.tensor([1, 2])).backward()
    optimizer.step()
    assert [key for key, p in model.named_parameters() if torch.equal(p, before[key])] == []


def test_freeze_and_unfreeze(model):
    freeze(model)
    assert not any(p.requires_grad for p in model.parameters())
    unfreeze(model)
    assert all(p.requires_grad for p in model.parameters())
    name, layer = next((n, m) for n, m in model.named_modules() if isinstance(m, KWLayer))
    freeze(model, [name])
    frozen = {id(p) for p in model.parameters() if not p.requires_grad}
    # Its cells included: a frozen layer's function does not change.
    assert frozen == {id(p) for p in layer.parameters()}
    assert not layer.__dict__['warehouse'].weight.requires_grad
    freeze(model, ['warehouses'])
    assert not any(w.weight.requires_grad for w in model.warehouses.values())


def test_exponential_moving_average():
    model = network('kw1x_mobilenetv2_050')
    average = ModelEmaV3(model, decay=0.5)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    average.update(model)
    for key, value in average.module.state_dict().items():
        expected = before[key] + 0.5 if key in dict(model.named_parameters()) else before[key]
        torch.testing.assert_close(value, expected)
    with torch.no_grad():
        twin = network('kw1x_mobilenetv2_050')
        twin.load_state_dict(average.module.state_dict())
        assert torch.equal(average(images()), twin(images()))


@torch.no_grad()
@pytest.mark.parametrize('duplicate', [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_whole_and_apart(model, duplicate):
    x = images(1)
    other = duplicate(model)
    before = model(x)
    assert torch.equal(other(x), before)
    own = {id(w) for w in other.warehouses.values()}
    assert {id(m.__dict__['warehouse']) for m in other.modules() if isinstance(m, KWLayer)} == own
    for p in other.parameters():
        p.mul_(0.5)
    assert torch.equal(model(x), before)
    assert not torch.equal(other(x), before)


def test_whole_networks_are_saved(tmp_path):
    model = network('kw1x_mobilenetv2_050')
    torch.save(model, tmp_path / 'network.pt')
    loaded = torch.load(tmp_path / 'network.pt', weights_only=False)
    assert torch.equal(loaded(images()), model(images()))


@torch.no_grad()
def test_state_dict(model):
    twin = timm.create_model(model.pretrained_cfg['architecture']).eval()
    x = images(1)
    assert not torch.equal(twin(x), model(x))
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(x), model(x))
    addresses = [value.data_ptr() for value in model.state_dict().values() if value.numel()]
    assert len(addresses) == len(set(addresses))


@torch.no_grad()
@pytest.mark.parametrize(
    ('model', 'dtype'),
    [
        *((name, torch.float64) for name in SPECIAL),
        *((name, torch.bfloat16) for name in QUICK_IN_16_BITS),
        *(
            pytest.param(name, torch.bfloat16, marks=pytest.mark.slow)
            for name in SPECIAL
            if name not in QUICK_IN_16_BITS
        ),
    ],
    indirect=['model'],
)
def test_types(model, dtype):
    def levels(x: torch.Tensor) -> list[torch.Tensor]:
        return model.forward_intermediates(x, intermediates_only=True)

    x = images(1, size=32)
    expected = levels(x)
    model.to(dtype)
    outputs = levels(x.to(dtype))
    assert {output.dtype for output in outputs} == {dtype}
    assert {value.dtype for value in model.state_dict().values() if value.is_floating_point()} == {dtype}
    assert all(output.isfinite().all() for output in outputs)
    error = (outputs[0].double() - expected[0].double()).norm() / expected[0].norm()
    assert error < (1e-5 if dtype == torch.float64 else 0.05)


@pytest.mark.parametrize('name', [SMALLEST[1], *(pytest.param(SMALLEST[i], marks=pytest.mark.slow) for i in (0, 2))])
def test_autocast(name):
    model, x = network(name).train(), images(size=32)
    with torch.autocast('cpu', torch.bfloat16):
        output = model(x)
    assert output.dtype == torch.bfloat16
    output.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
    assert all(p.grad.isfinite().all() for p in model.parameters())


@torch.no_grad()
def test_channels_last(model):
    expected, x = model.double()(images().double()), images().double()
    model = model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(x.to(memory_format=torch.channels_last)), expected)


@pytest.mark.parametrize('name', [*SMALLEST[:2], pytest.param(SMALLEST[2], marks=pytest.mark.slow)])
def test_gradient_checkpointing(name):
    # Dropout draws in another order; batch statistics are those of the same batch.
    model, x = timm.create_model(name, drop_rate=0).train(), images(2)
    expected = gradients(model, x)
    model.set_grad_checkpointing()
    torch.testing.assert_close(gradients(model, x), expected)


def test_one_sample_trains_where_norms_allow_it():
    # The pooled vector of one sample has no batch statistics; ConvNeXt's norms need none.
    found = gradients(network('kw1x_convnext_tiny').train(), images(1))
    assert all(gradient.isfinite().all() for gradient in found.values())
    with pytest.raises(ValueError, match='Expected more than 1 value per channel'):
        network('kw1x_resnet18').train()(images(1))
    with torch.no_grad():
        assert network('kw1x_resnet18')(images(1)).shape == (1, 1000)
