"""Kernelizing networks that are not ours."""

import pytest
import timm
import torch
from networks import images, lively
from timm.layers import Conv2dSame
from torch import nn

import kw_timm
from kw_timm import WarehousePlan, kernelize
from kw_timm.kernelize import drop_unused_warehouses
from kw_timm.layers import KWConv1d, KWConv2d, KWConv3d, KWLayer, KWLinear

SETTINGS = ('in_channels', 'out_channels', 'kernel_size', 'stride', 'padding', 'dilation', 'groups')


def sequential() -> nn.Sequential:
    """A network over sequences, volumes and vectors: every kind of layer."""
    return nn.Sequential(
        nn.Conv1d(4, 8, 3, padding=1, stride=2),
        nn.Conv1d(8, 8, 3, padding='same', bias=False),
        nn.Unflatten(2, (2, 2, 2)),
        nn.Conv3d(8, 8, (1, 2, 2), groups=2),
        nn.Flatten(),
        nn.Linear(16, 12),
        nn.Linear(12, 6),
    )


def test_sequential():
    torch.manual_seed(0)
    net = sequential()
    returned = kernelize(
        net,
        {
            'sequence': WarehousePlan(['0', '1']),
            'volume': WarehousePlan(['3'], cell_num_ratio=0.5),
            'vector': WarehousePlan(['5', '6'], reduction=2.0),
        },
    )
    assert returned is net.warehouses
    assert [type(net[i]) for i in (0, 1, 3, 5, 6)] == [KWConv1d, KWConv1d, KWConv3d, KWLinear, KWLinear]
    # Cells of 8 x 4 channels: 3 positions of 1 and of 2 cells; and so on.
    assert {name: tuple(w.weight.shape) for name, w in net.warehouses.items()} == {
        'sequence': (9, 8, 4, 1),
        'volume': (2, 8, 4, 1, 1, 1),
        'vector': (11, 6, 4, 1),
    }
    assert net[5].attention.fc1.out_features == 32
    x = torch.randn(3, 4, 16)
    y = net(x)
    assert y.shape == (3, 6)
    y.sum().backward()
    assert all(p.grad is not None for p in net.parameters())
    # Kernels depend on the sample, so the network is not affine in its input.
    net.eval()
    a, b = net(x), net(-x)
    assert not torch.allclose((a + b) / 2, net(torch.zeros_like(x)), atol=1e-4)


@pytest.mark.parametrize(
    ('name', 'layers'),
    [
        ('resnet18', ['layer1.0.conv1', 'layer1.0.conv2', 'layer2.0.conv1', 'layer2.0.downsample.0']),
        ('regnetx_002', ['s1.b1.conv1.conv', 's1.b1.conv2.conv', 's2.b1.conv2.conv', 's2.b1.conv3.conv']),
        ('mobilenetv2_050', ['conv_stem', 'blocks.1.0.conv_dw']),
    ],
)
def test_timm_networks(name, layers):
    static = timm.create_model(name)
    model = timm.create_model(name)
    # The order in a plan does not matter.
    kernelize(model, {'some': WarehousePlan(layers[::-1])})
    for layer in layers:
        before, after = static.get_submodule(layer), model.get_submodule(layer)
        assert isinstance(after, KWConv2d)
        assert [getattr(after, s) for s in SETTINGS] == [getattr(before, s) for s in SETTINGS]
        assert (after.bias is None) == (before.bias is None)
        assert after.spec.kernel_shape == before.weight.shape
    shares = model.warehouses['some'].partition.layers
    assert [model.get_submodule(layer).spec.grid for layer in layers] == [share.grid for share in shares]
    x = images()
    assert lively(model)(x).shape == (2, 1000)
    model.train()(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    kept = {key for key in static.state_dict() if not key.startswith(tuple(f'{layer}.' for layer in layers))}
    assert kept <= set(model.state_dict())


def test_at_temperature_one_the_network_is_a_static_one():
    """Putting the rearranged cells into the static network gives the same function."""
    torch.manual_seed(0)
    names = ['layer1.0.conv1', 'layer1.0.conv2']
    static = lively(timm.create_model('resnet18'))
    model = timm.create_model('resnet18')
    model.load_state_dict(static.state_dict())
    kernelize(model.eval(), {'some': WarehousePlan(names)})
    kw_timm.set_temperature(model, 1)
    cells = model.warehouses['some'].weight.detach()
    for i, name in enumerate(names):
        # One 64 x 64 cell per position of the 3x3 window.
        kernel = cells[9 * i : 9 * (i + 1), :, :, 0, 0].permute(1, 2, 0).reshape(64, 64, 3, 3)
        static.get_submodule(name).weight = nn.Parameter(kernel)
    with torch.no_grad():
        torch.testing.assert_close(model(images()), static(images()), rtol=1e-4, atol=1e-5)


def test_layers_take_type_mode_and_place_of_what_they_replace():
    model = nn.Sequential(nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 3)).double().eval()
    kernelize(model, {'a': WarehousePlan(['0'])})
    assert {p.dtype for p in model.parameters()} == {torch.double}
    assert not any(module.training for module in model[0].modules())
    with torch.device('meta'):
        model = nn.Sequential(nn.Conv2d(2, 2, 3))
    kernelize(model, {'a': WarehousePlan(['0'])})
    assert all(p.is_meta for p in model.parameters())


def test_options_reach_the_layers():
    model = nn.Sequential(nn.Conv2d(64, 64, 3), nn.Conv2d(64, 64, 3))
    plan = WarehousePlan(['0', '1'], 2.0, 0.5, 0.25, 0.5, 0.125, spatial_partition=False)
    kernelize(model, {'a': plan}, norm_layer=nn.LayerNorm)
    assert model.warehouses['a'].weight.shape == (32, 16, 32, 3, 3)
    attention = model[0].attention
    assert isinstance(attention.norm1, nn.LayerNorm)
    assert attention.fc1.out_features == 32
    assert attention.fc3.in_features == 16
    assert model(torch.randn(1, 64, 5, 5)).shape == (1, 64, 1, 1)


def test_a_network_can_be_kernelized_twice():
    model = sequential()
    kernelize(model, {'a': WarehousePlan(['0'])})
    kernelize(model, {'b': WarehousePlan(['1'])})
    assert list(model.warehouses) == ['a', 'b']
    assert model(torch.randn(2, 4, 16)).shape == (2, 6)


def test_same_padding_by_input_size():
    model = nn.Sequential(Conv2dSame(2, 2, 3, 1, dilation=2))
    static = nn.Conv2d(2, 2, 3, padding='same', dilation=2)
    kernelize(model, {'a': WarehousePlan(['0'])})
    x = torch.randn(2, 2, 5, 5)
    assert model(x).shape == static(x).shape


def test_unused_warehouses_are_dropped():
    model = sequential()
    kernelize(model, {'a': WarehousePlan(['0', '1']), 'b': WarehousePlan(['5'])})
    assert drop_unused_warehouses(model) == []
    model[0], model[5] = nn.Identity(), nn.Identity()
    assert drop_unused_warehouses(model) == ['b']
    assert list(model.warehouses) == ['a']


BAD_PLANS = {
    'missing layer': ({'a': WarehousePlan(['0', 'no.such'])}, "the layer 'no.such', which the network does not have"),
    'the network itself': ({'a': WarehousePlan([''])}, "the layer '', which the network does not have"),
    'no layer': ({'a': WarehousePlan([])}, "'a' has no layers"),
    'planned twice': ({'a': WarehousePlan(['0']), 'b': WarehousePlan(['1', '0'])}, "planned twice: in 'a' and in 'b'"),
    'twice in one': ({'a': WarehousePlan(['0', '0'])}, "planned twice: in 'a' and in 'a'"),
    'another type': ({'a': WarehousePlan(['4'])}, "'4', but Flatten has no KW counterpart"),
    'mixed ranks': (
        {'a': WarehousePlan(['0', '3'])},
        "'a' of layers 0, 3: Kernels of one warehouse must have one rank",
    ),
    'does not divide': ({'a': WarehousePlan(['0'], cell_outplane_ratio=0.75)}, 'do not divide a kernel of shape'),
    'does not add up': ({'a': WarehousePlan(['0', '1'], cell_num_ratio=0.4)}, "'a' of layers 0, 1: .* not add up"),
    'windows differ': ({'a': WarehousePlan(['5', '1'], spatial_partition=False)}, 'need one kernel size'),
    'basis alone': ({'a': WarehousePlan(['0'], nonlocal_basis_ratio=0.5)}, "'a' of layers 0: .* belong to one layer"),
    'good and bad': (
        {'a': WarehousePlan(['0']), 'b': WarehousePlan(['2'])},
        "'2', but Unflatten has no KW counterpart",
    ),
    'dotted name': ({'a': WarehousePlan(['0']), 'b.c': WarehousePlan(['1'])}, 'unusable warehouse name'),
    'name of a method': ({'keys': WarehousePlan(['0'])}, 'unusable warehouse name'),
}


@pytest.mark.parametrize('case', BAD_PLANS)
def test_bad_plans_leave_the_network_unchanged(case):
    plan, message = BAD_PLANS[case]
    net = sequential()
    before = dict(net.named_modules())
    with pytest.raises(ValueError, match=message):
        kernelize(net, plan)
    assert dict(net.named_modules()) == before
    assert not hasattr(net, 'warehouses')


@pytest.mark.parametrize(
    ('layer', 'message'),
    [
        (nn.Conv2d(2, 2, 3, padding=1, padding_mode='reflect'), "padding_mode='reflect' is not supported"),
        (Conv2dSame(2, 2, 3, 2), 'stride 1 only'),
        (nn.ConvTranspose2d(2, 2, 3), 'ConvTranspose2d has no KW counterpart'),
    ],
)
def test_layers_that_cannot_be_replaced(layer, message):
    net = nn.Sequential(layer)
    with pytest.raises(ValueError, match=message):
        kernelize(net, {'a': WarehousePlan(['0'])})
    assert net[0] is layer


def test_taken_warehouse_name():
    net = sequential()
    kernelize(net, {'a': WarehousePlan(['0'])})
    with pytest.raises(ValueError, match="already has a warehouse 'a'"):
        kernelize(net, {'a': WarehousePlan(['1'])})
    assert not isinstance(net[1], KWLayer)
