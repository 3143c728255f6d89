"""Modes, default devices and types, transforms: the compiled module gets memory that is there, or is not asked."""

import pytest
import timm
import torch
from networks import images, network
from torch._subclasses import FakeTensorMode
from torch.func import functional_call, grad, vmap
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.flop_counter import FlopCounterMode

from kw_timm import optimize_for_inference
from kw_timm.layers import KWConv2d, Warehouse, straightforward
from kw_timm.ops import ConvSpec, mix_cells, native

NAME = 'kw1x_mobilenetv2_050'


class SomeTensor(torch.Tensor):
    """A subclass that does nothing."""


@pytest.fixture(params=['as it is', 'optimized'])
def net(request):
    return network(NAME) if request.param == 'as it is' else optimize_for_inference(network(NAME))


@pytest.mark.parametrize('device', ['meta', 'cpu'])
@torch.no_grad()
def test_default_devices(net, device):
    x = images()
    expected = net(x)
    with torch.device(device):
        assert torch.equal(net(x), expected)


@torch.no_grad()
def test_default_types(net):
    x = images()
    expected = net(x)
    torch.set_default_dtype(torch.float64)
    try:
        ours = net(x)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(ours, expected)


@torch.no_grad()
def test_fake_tensors(net):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert net(mode.from_tensor(images())).shape == (2, 1000)


@pytest.mark.parametrize('batch', [2, 40], ids=['cells', 'bases'])
@pytest.mark.parametrize('name', [NAME, 'kw4x_resnet18'])
def test_nothing_asks_what_is_in_a_tensor(name, batch):
    """Made, trained and used without values: on a GPU, to ask for one would wait for the device."""
    with FakeTensorMode():
        net = timm.create_model(name, temperature_steps=10)
        x = torch.randn(batch, 3, 32, 32)
        net(x).sum().backward()
        assert all(p.grad is not None and p.grad.shape == p.shape for p in net.parameters())
        assert net.eval()(x).shape == (batch, 1000)


@torch.no_grad()
def test_real_tensors_under_a_fake_mode():
    """Whatever torch says of it, the compiled module is not handed memory that does not exist."""
    net, x = optimize_for_inference(network('kw1x_convnext_tiny')), images(1, 32)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert net(x).shape == (1, 1000)


@torch.no_grad()
def test_dispatch_modes_see_the_operations(net):
    x = images()
    expected = net(x)
    with FlopCounterMode(display=False) as counter:
        assert torch.allclose(net(x), expected, rtol=1e-5, atol=1e-5)
    assert counter.get_total_flops() > 0


@torch.no_grad()
def test_inference_mode_and_subclasses(net):
    x = images()
    expected = net(x)
    with torch.inference_mode():
        assert torch.equal(net(x), expected)
    assert torch.allclose(net(x.as_subclass(SomeTensor)), expected, rtol=1e-5, atol=1e-5)


@pytest.fixture
def layer():
    torch.manual_seed(0)
    warehouse = Warehouse([(6, 4, 3, 3)] * 2, cell_outplane_ratio=0.5)
    layer = KWConv2d(4, 6, 3, warehouse=warehouse, norm_layer=torch.nn.LayerNorm).double()
    warehouse.double()
    return layer


def test_torch_func(layer):
    x = torch.randn(3, 2, 4, 5, 5, dtype=torch.double)
    values = dict(layer.named_parameters())

    def loss(values, x):
        return functional_call(layer, values, (x,)).square().sum()

    ours = grad(loss)(values, x[0])
    with straightforward():
        value = loss(values, x[0])
    theirs = torch.autograd.grad(value, list(values.values()))
    for mine, other in zip(ours.values(), theirs, strict=True):
        assert (mine - other).norm() <= 1e-9 * other.norm()
    with torch.no_grad():
        one_by_one = torch.stack([layer(batch) for batch in x])
    for learns in (True, False):
        with torch.set_grad_enabled(learns):
            assert torch.allclose(vmap(layer)(x), one_by_one, rtol=1e-9)


@pytest.mark.skipif(native.module is None, reason='no compiled module')
@pytest.mark.parametrize(
    'wrong',
    [
        lambda t: t.double(),
        lambda t: t.to('meta'),
        lambda t: t.to_sparse(),
        lambda t: TwoTensor(t, t),
        lambda t: torch.complex(t, t).conj().imag,
    ],
    ids=['type', 'device', 'layout', 'subclass', 'negated'],
)
def test_the_door_refuses_what_is_not_plain_memory(wrong):
    left, right, out = torch.randn(2, 3), torch.randn(4, 3), torch.zeros(2, 4)
    native.add_dots(out, left, right)
    assert torch.allclose(out, left @ right.t())
    with pytest.raises(TypeError, match=r'left: the compiled module takes plain torch\.float32 tensors'):
        native.add_dots(out, wrong(left), right)


def test_cached_places_of_kernels_are_made_in_no_mode():
    spec = ConvSpec.of((9, 2, 1), (3, 5, 1, 1), (3, 3))
    a, cells = torch.randn(2, 18, 7), torch.randn(7, 3, 5, 1, 1)
    with torch.device('meta'):
        first = mix_cells(a, cells, spec)
    assert torch.equal(mix_cells(a, cells, spec), first)


def test_networks_are_made_on_any_default_device():
    with torch.device('meta'):
        assert timm.create_model(NAME)(torch.empty(2, 3, 32, 32)).device.type == 'meta'
