"""Ways to compute the same: each against the straightforward one, and the fastest taken where they are measured."""

import copy

import pytest
import timm
import torch
from networks import images

from kw_timm.layers import KWConv1d, KWConv2d, KWConv3d, KWLayer, Warehouse, measured, straightforward
from kw_timm.ops import ConvSpec, choice, conv_per_sample
from kw_timm.ops.convolution import WAYS, by_rule, convolve, convolve_backward

# Spatial size, window, stride, padding, dilation, groups.
SHAPES = {
    'pointwise': ((7, 6), (1, 1), (1, 1), (0, 0), (1, 1), 1),
    'pointwise with a stride': ((7, 6), (1, 1), (2, 2), (0, 0), (1, 1), 1),
    'window': ((7, 6), (3, 3), (1, 1), (1, 1), (1, 1), 1),
    'window with everything': ((9, 8), (3, 2), (2, 1), (1, 2), (2, 1), 1),
    'groups': ((7, 6), (3, 3), (2, 2), (1, 1), (1, 1), 2),
    'depthwise': ((7, 6), (3, 3), (1, 1), (1, 1), (1, 1), 8),
    '1d': ((9,), (3,), (2,), (1,), (1,), 1),
    '3d': ((4, 5, 6), (2, 3, 1), (1, 2, 1), (0, 1, 0), (1, 1, 1), 2),
}


@pytest.fixture(autouse=True)
def nothing_measured():
    choice.forget_ways()
    yield
    choice.forget_ways()


def case(shape: str, batch: int = 3) -> tuple[torch.Tensor, torch.Tensor, ConvSpec]:
    size, window, stride, padding, dilation, groups = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)
    kernel = (8, 8 // groups, *window)
    spec = ConvSpec.of((1, 1, 1), kernel, window, stride, padding, dilation, groups)
    x = torch.randn(batch, 8, *size, generator=generator, dtype=torch.float64)
    return x, torch.randn(batch, *kernel, generator=generator, dtype=torch.float64), spec


@pytest.mark.parametrize('batch', [1, 3])
@pytest.mark.parametrize(
    ('shape', 'name'),
    [(shape, name) for shape in SHAPES for name, way in WAYS.items() if way.takes(*case(shape)[::2])],
)
def test_every_way(shape, name, batch):
    x, kernels, spec = case(shape, batch)
    for t in (x, kernels):
        t.requires_grad_()
    expected = conv_per_sample(x, kernels, None, spec)
    grad = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, (x, kernels), grad)
    x, kernels = x.detach(), kernels.detach()
    torch.testing.assert_close(WAYS[name].forward(x, kernels, spec), expected.detach(), rtol=1e-9, atol=1e-12)
    for needs in ((True, True), (True, False), (False, True)):
        found = WAYS[name].backward(grad, x, kernels, spec, *needs)
        for ours, theirs, needed in zip(found, wanted, needs, strict=True):
            assert (ours is not None) == needed
            if needed:
                torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize('shape', SHAPES)
def test_the_fastest_is_taken(shape, monkeypatch):
    """Whichever it is, with and without a bias and a place for the output."""
    x, kernels, spec = case(shape)
    bias = torch.randn(8, dtype=torch.float64)
    expected = conv_per_sample(x, kernels, bias, spec)
    names = [name for name, way in WAYS.items() if way.takes(x, spec)]
    assert by_rule(x, spec) in names
    for fast in names:
        choice.forget_ways()
        order = iter(names)
        monkeypatch.setattr(choice, '_seconds', lambda way, device, order=order, fast=fast: (next(order) != fast) + 1.0)
        with measured():
            for out in (None, torch.full_like(expected, torch.nan)):
                found = convolve(x, kernels, spec, bias, out)
                torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
                assert out is None or found.data_ptr() == out.data_ptr()
        (times,) = choice.measured_ways().values()
        assert list(times) == names
        assert min(times, key=times.get) == fast


def test_measured_once_a_shape_type_and_direction():
    x, kernels, spec = case('window')
    with measured():
        for _ in range(2):
            y = convolve(x, kernels, spec)
        found = choice.measured_ways()
        assert len(found) == 1
        (times,) = found.values()
        assert set(times) == {'loop', 'grouped', 'channels_last', 'unfold'}
        assert all(0 < seconds < 10 for seconds in times.values())
        convolve(x.float(), kernels.float(), spec)
        convolve(x[:2], kernels[:2], spec)
        convolve_backward(y, x, kernels, spec)
        assert len(choice.measured_ways()) == 4
    convolve(x[:1], kernels[:1], spec)
    assert len(choice.measured_ways()) == 4


def test_a_way_without_memory():
    def greedy() -> None:
        raise torch.OutOfMemoryError('no memory')

    assert choice.fastest(('one',), {'greedy': greedy, 'modest': lambda: None}, torch.zeros(1)) == 'modest'


LAYERS = {1: (KWConv1d, (3,)), 2: (KWConv2d, (3, 3)), 3: (KWConv3d, (3, 1, 3))}


@pytest.mark.parametrize('fast', ['bases', 'cells', 'taps', 'kernels', 'grouped', 'unfold'])
@pytest.mark.parametrize('axes', LAYERS)
def test_layers(axes, fast, monkeypatch):
    """Equal outputs and gradients, whatever was the fastest."""
    kind, window = LAYERS[axes]
    torch.manual_seed(0)
    warehouse = Warehouse([(8, 8, *window), (8, 8, *window)], 2.0)
    layer = kind(8, 8, window, padding=tuple(k // 2 for k in window), bias=True, warehouse=warehouse, index=1)
    layer.warehouse_here = warehouse
    layer = layer.double().train()
    x = torch.randn(5, 8, *(5,) * axes, dtype=torch.float64, requires_grad=True)
    best = choice._best
    monkeypatch.setattr(choice, '_best', lambda times: fast if fast in times else best(times))

    def outcome() -> list[torch.Tensor]:
        y = copy.deepcopy(layer)  # Its norm keeps statistics.
        out = y(x)
        return [out.detach(), *torch.autograd.grad(out.sin().sum(), [x, *y.parameters()])]

    with measured():
        found = outcome()
    with straightforward():
        expected = outcome()
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).norm() <= 1e-9 * theirs.norm()
    assert any(fast in times for times in choice.measured_ways().values()) or axes != 2


@pytest.mark.parametrize('training', [True, False])
def test_a_network(training):
    """As with rules, and statistics of norms are kept once."""
    torch.manual_seed(0)
    net = timm.create_model('kw1x_mobilenetv2_050', num_classes=10, drop_rate=0.0).double().train(training)
    other, x = copy.deepcopy(net), images(4, 32).double()
    expected = other(x)
    with measured():
        found = net(x)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    if training:
        found.sum().backward()
        expected.sum().backward()
    for (key, ours), theirs in zip(net.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9, msg=key)
    for ours, theirs in zip(net.parameters(), other.parameters(), strict=True):
        if training:
            assert (ours.grad - theirs.grad).norm() <= 1e-9 * theirs.grad.norm() + 1e-12
    assert len(choice.measured_ways()) > sum(isinstance(m, KWLayer) for m in net.modules()) / 4


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')


@gpu
def test_the_switch_of_cudnn():
    x, kernels, spec = case('window')
    x, kernels = x.cuda(), kernels.cuda()
    for on in (False, True):
        with torch.backends.cudnn.flags(benchmark=on):
            convolve(x, kernels, spec)
        assert len(choice.measured_ways()) == on
    with torch.backends.cudnn.flags(benchmark=True, deterministic=True):
        convolve(x[:2], kernels[:2], spec)
    assert len(choice.measured_ways()) == 1
