"""The default path of KW layers against the straightforward one: outputs and gradients, however batches are split."""

import copy
import itertools
import math

import pytest
import torch
from networks import SMALLEST, images, network
from torch import nn
from torch.autograd import grad, gradcheck

from kw_timm.layers import KWConv1d, KWConv2d, KWConv3d, KWLinear, Warehouse, kw_layers, straightforward
from kw_timm.ops import ConvSpec, bases, dynamic_conv, taps

FROM_BASES = [(kw_layers, 'bases_from_batch', lambda terms, cells: 0)]
# How parts of batches are taken, and which way.
SPLITS = {
    'as set': [],
    'one by one': [(dynamic_conv, name, 1) for name in ('_CHUNK_BYTES', '_BACKWARD_CHUNK_BYTES')],
    'at once': [(dynamic_conv, name, 2**40) for name in ('_CHUNK_BYTES', '_BACKWARD_CHUNK_BYTES')],
    'by kernels': [(taps, '_MOST_PIXELS', dict(forward=0, backward=0))],
    'by mixtures': [(taps, '_MOST_PIXELS', dict(forward=2**40, backward=2**40))],
    'from bases': FROM_BASES,
    'from bases, one by one': [
        *FROM_BASES,
        *((bases, name, 1) for name in ('_BASES_BYTES', '_KERNEL_BYTES', '_BACKWARD_KERNEL_BYTES')),
    ],
}
# Layer, its arguments, size of the input; the warehouse cuts channels in halves unless it says otherwise.
LAYERS = {
    'pointwise': (KWConv2d, (4, 6, 1), {}, (5, 4)),
    'pointwise strided': (KWConv2d, (4, 6, 1), dict(stride=(2, 3), bias=False), (5, 7)),
    'pointwise padded': (KWConv2d, (4, 6, 1), dict(padding=1), (3, 3)),
    '3x3': (KWConv2d, (4, 6, 3), dict(padding=1), (5, 4)),
    'square': (KWConv2d, (4, 4, 3), dict(padding=1), (5, 4)),
    '3x3 strided': (KWConv2d, (4, 6, 3), dict(stride=(2, 1), padding=(1, 0), bias=False), (5, 6)),
    '3x3 dilated': (KWConv2d, (4, 6, 3), dict(dilation=2, padding=(2, 1)), (5, 6)),
    'same': (KWConv2d, (4, 6, 3), dict(padding='same', dilation=2), (5, 4)),
    'same, even': (KWConv2d, (4, 6, (2, 3)), dict(padding='same'), (5, 4)),
    'valid': (KWConv2d, (4, 6, (3, 2)), dict(padding='valid'), (5, 4)),
    'groups': (KWConv2d, (8, 4, 3), dict(groups=2, stride=2, padding=1), (5, 4)),
    'depthwise': (KWConv2d, (4, 4, 3), dict(groups=4, padding=1, warehouse=dict(cell_outplane_ratio=0.5)), (5, 4)),
    'whole windows': (KWConv2d, (4, 6, 3), dict(padding=1, warehouse=dict(spatial_partition=False)), (5, 4)),
    'many cells': (KWConv2d, (4, 6, 3), dict(warehouse=dict(cell_num_ratio=12, cell_outplane_ratio=0.5)), (5, 4)),
    'of a pixel': (KWConv2d, (4, 6, 3), dict(padding=1), (1, 1)),
    'of few pixels': (KWConv2d, (4, 6, 3), dict(stride=2, padding=1), (2, 3)),
    'far apart': (KWConv2d, (4, 6, 3), dict(padding=6, dilation=6), (5, 4)),
    '1d': (KWConv1d, (4, 6, 3), dict(stride=2, padding=2), (7,)),
    '3d': (KWConv3d, (4, 2, (1, 2, 2)), dict(stride=(1, 2, 1), padding=(0, 1, 0)), (2, 3, 4)),
    'linear': (KWLinear, (4, 6), {}, (5,)),
}
HALVES = dict(cell_outplane_ratio=0.5, cell_inplane_ratio=0.5)


class Net(nn.Module):
    """KW layers of one warehouse, which serves yet another, one behind the other."""

    def __init__(self, cls, args, options, norm_layer, layers):
        super().__init__()
        options = dict(options)
        cells = options.pop('warehouse', HALVES)
        window = (1,) if cls is KWLinear else (args[2],) * cls.spatial_axes if isinstance(args[2], int) else args[2]
        shape = (args[1], args[0] // options.get('groups', 1), *window)
        self.warehouse = Warehouse([shape] * (layers + 1), **cells)
        options |= dict(warehouse=self.warehouse, norm_layer=norm_layer)
        self.layers = nn.Sequential(*(cls(*args, **options, index=i) for i in range(layers)))

    def forward(self, x):
        return self.layers(x)


def make(case, norm_layer=nn.BatchNorm1d, temperature=0.0, layers=1):
    cls, args, options, _ = LAYERS[case]
    torch.manual_seed(0)
    net = Net(cls, args, options, norm_layer, layers).double()
    for parameter in net.parameters():
        nn.init.normal_(parameter)
    for layer in net.layers:
        layer.attention.temperature = temperature
        if norm_layer is nn.BatchNorm1d:
            nn.init.normal_(layer.attention.norm1.running_mean)
            nn.init.uniform_(layer.attention.norm1.running_var, 0.5, 1.5)
    return net


def inputs(case, batch, seed=1):
    cls, args, _, size = LAYERS[case]
    shape = (batch, *size, args[0]) if cls is KWLinear else (batch, args[0], *size)
    return torch.randn(shape, dtype=torch.double, generator=torch.Generator().manual_seed(seed))


def results(net, x):
    """Output, and the gradients of a curved function of it: of the input and of every parameter."""
    x = x.detach().requires_grad_()
    torch.manual_seed(0)  # one network has dropout
    y = net(x)
    return [y.detach(), *grad(y.sin().sum(), [x, *net.parameters()], allow_unused=True)]


def assert_same(ours, theirs, rtol=1e-9):
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine is None) == (other is None)
        if other is None:
            continue
        assert (mine.shape, mine.dtype) == (other.shape, other.dtype)
        assert (mine - other).norm() <= rtol * other.norm()  # also where both are 0


def assert_paths_agree(net, x, rtol=1e-9):
    ours = results(net, x)
    with straightforward():
        theirs = results(net, x)
    assert ours[0].isfinite().all()
    assert_same(ours, theirs, rtol)
    with torch.no_grad():  # The way without gradients is another.
        assert_same([net(x)], theirs[:1], rtol)


@pytest.fixture
def split(request, monkeypatch):
    for where, name, value in SPLITS[request.param]:
        monkeypatch.setattr(where, name, value)


@pytest.mark.parametrize('split', SPLITS, indirect=True)
@pytest.mark.parametrize('case', LAYERS)
def test_layers(case, split):
    for temperature, batch in [(0.0, 1), (0.0, 5), (0.3, 2), (1.0, 2)]:
        net = make(case, temperature=temperature)
        assert_paths_agree(net.eval(), inputs(case, batch))
    assert_paths_agree(make(case, temperature=0.3).train(), inputs(case, 5))
    assert_paths_agree(make(case, nn.LayerNorm).train(), inputs(case, 1))
    assert_paths_agree(make(case).eval().float(), inputs(case, 3).float(), 2e-5)


FUNCTIONS = {
    'pointwise': ((1, 2, 1), (2, 2, 1, 1), ((1, 1), (2, 1), (0, 0), (1, 1), 1)),
    'strided': ((9, 1, 2), (2, 1, 1, 1), ((3, 3), (2, 1), (1, 0), (1, 1), 1)),
    'dilated': ((1, 2, 1), (1, 2, 2, 2), ((2, 2), (1, 1), 'valid', (2, 1), 1)),
}


def function(case):
    """The function of a layer with the rest of its arguments, and inputs, coefficients, cells, bias."""
    grid, cell, rest = FUNCTIONS[case]
    generator = torch.Generator().manual_seed(0)
    shapes = (3, grid[2] * cell[1], 4, 4), (3, math.prod(grid), 5), (5, *cell), (grid[1] * cell[0],)
    tensors = [torch.randn(shape, dtype=torch.double, generator=generator) for shape in shapes]
    spec = ConvSpec.of(grid, cell, *rest)
    return lambda x, a, cells, bias=None: dynamic_conv.kernel_warehouse_conv(x, a, cells, bias, spec), tensors


@pytest.mark.parametrize('split', SPLITS, indirect=True)
@pytest.mark.parametrize('case', FUNCTIONS)
def test_derivatives_are_those_of_the_function(case, split):
    run, tensors = function(case)
    assert gradcheck(run, [t.requires_grad_() for t in tensors])


@pytest.mark.parametrize('split', ['one by one', 'at once'], indirect=True)
@pytest.mark.parametrize('case', FUNCTIONS)
def test_only_some_gradients(case, split):
    run, tensors = function(case)
    for chosen in itertools.product((False, True), repeat=4):
        for some in (tensors, tensors[:3]):  # without a bias too
            given = [t.detach().requires_grad_(c) for t, c in zip(some, chosen, strict=False)]
            wanted = [t for t in given if t.requires_grad]
            y = run(*given)
            assert y.requires_grad == bool(wanted)
            if wanted:
                with straightforward():
                    expected = grad(run(*given).sin().sum(), wanted)
                assert_same(grad(y.sin().sum(), wanted), expected)


LAYOUTS = {
    'sliced': lambda t: torch.cat([t, t[..., :1]], -1)[..., :-1],
    'cells first': lambda t: t.permute(2, 1, 0).contiguous().permute(2, 1, 0),
    'mixtures first': lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    'every other sample': lambda t: t.repeat_interleave(2, 0)[::2],
    'one for all samples': lambda t: t[:1].expand_as(t),
}


@pytest.mark.parametrize('layout', LAYOUTS)
def test_gradients_of_coefficients_in_any_layout(layout):
    run, (x, coefficients, cells, bias) = function('strided')
    leaf = LAYOUTS[layout](coefficients).detach().requires_grad_()
    with straightforward():
        expected = grad(run(x, leaf, cells, bias).sin().sum(), leaf)
    assert_same(grad(run(x, leaf, cells, bias).sin().sum(), leaf), expected)


@pytest.mark.parametrize('case', ['pointwise', '3x3'])
@pytest.mark.parametrize('which', ['input', 'gradient'])
def test_inputs_and_gradients_in_any_layout(case, which):
    net, x = make(case).eval(), inputs(case, 3)
    layouts = {
        'channels last': lambda t: t.to(memory_format=torch.channels_last),
        'transposed': lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
        'every other': lambda t: t.repeat_interleave(2, 3)[..., ::2],
        'expanded': lambda t: t[:1].expand_as(t),
    }
    for layout in layouts.values():
        if which == 'input':
            assert_paths_agree(net, layout(x))
            continue
        y = net(x)
        upstream = layout(torch.randn(y.shape, dtype=torch.double))
        with straightforward():
            expected = grad(net(x), list(net.parameters()), upstream)
        assert_same(grad(y, list(net.parameters()), upstream), expected)
    assert_paths_agree(net.to(memory_format=torch.channels_last), layouts['channels last'](x))


@pytest.mark.parametrize('split', SPLITS, indirect=True)
def test_two_layers_add_to_the_gradient_of_their_cells(split):
    net, x = make('square', layers=2).eval(), inputs('square', 3)
    assert_paths_agree(net, x)
    singly = [results(net, inputs('square', 3, seed)) for seed in (1, 2)]
    for seed in (1, 2):
        net(inputs('square', 3, seed)).sin().sum().backward()
    summed = [a + b for a, b in zip(*(r[2:] for r in singly), strict=True)]
    assert_same([p.grad for p in net.parameters()], summed)


@pytest.mark.parametrize('split', ['one by one', 'at once'], indirect=True)
def test_a_graph_is_used_twice(split):
    net, x = make('square', layers=2).eval(), inputs('square', 3).requires_grad_()
    y = net(x).sin().sum()
    (first,) = grad(y, x, retain_graph=True)
    y.backward(retain_graph=True)
    y.backward()
    with straightforward():
        expected = results(net, x)[1:]
    assert_same([first, x.grad / 2, *(p.grad / 2 for p in net.parameters())], [expected[0], *expected])


def test_second_derivatives_are_straightforward_only():
    net, x = make('square').eval(), inputs('square', 2).requires_grad_()
    (first,) = grad(net(x).sin().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match='once_differentiable'):
        first.square().sum().backward()
    with straightforward():
        (first,) = grad(net(x).sin().sum(), x, create_graph=True)
        first.square().sum().backward()
    assert 0 < x.grad.norm() < torch.inf


@pytest.mark.parametrize('case', ['pointwise', '3x3', 'same, even', 'depthwise', 'linear'])
@pytest.mark.parametrize('kind', ['autocast', 'bfloat16'])
def test_bfloat16(case, kind):
    """Both ways round, at other places: they differ by a few of bfloat16's steps of 0.4 %."""
    net, x = make(case, nn.LayerNorm).train().float(), inputs(case, 3).float()
    if kind == 'bfloat16':
        net, x = net.bfloat16(), x.bfloat16()
    with torch.autocast('cpu', torch.bfloat16, enabled=kind == 'autocast'):
        ours = results(net, x)
        with straightforward():
            theirs = results(net, x)
    assert ours[0].dtype == torch.bfloat16
    assert_same(ours, theirs, 0.03)
    exact = make(case, nn.LayerNorm)(inputs(case, 3))
    assert (ours[0] - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize('case', ['pointwise', '3x3 strided', 'same, even', 'depthwise'])
def test_empty_batches_and_the_meta_device(case):
    net, x = make(case).eval(), inputs(case, 2)
    shape = net(x).shape
    assert copy.deepcopy(net).to('meta')(x.to('meta')).shape == shape
    empty = x[:0].requires_grad_()
    y = net(empty)
    assert y.shape == (0, *shape[1:])
    assert grad(y.sum(), empty)[0].shape == empty.shape


@pytest.mark.parametrize('case', ['3x3', 'pointwise', 'linear'])
def test_backward_under_autocast_of_what_was_made_without(case):
    net, x = make(case, nn.LayerNorm).float(), inputs(case, 3).float()
    y = net(x)
    expected = grad(y.sin().sum(), list(net.parameters()), retain_graph=True)
    with torch.autocast('cpu', torch.bfloat16):
        assert_same(grad(y.sin().sum(), list(net.parameters())), expected, 0.03)


def test_the_same_again():
    torch.manual_seed(0)  # layers of a size that more threads share
    net, x = Net(KWConv2d, (64, 64, 3), dict(padding=1), nn.LayerNorm, 2), torch.randn(3, 64, 8, 8)
    once, again = results(net, x), results(net, x)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    torch.set_num_threads(2)
    try:
        assert_same(results(net, x), once, 1e-4)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize('name', SMALLEST)
def test_training_networks(name):
    """With BatchNorms as in training, but for those that would see two values only."""
    net = network(name).double().train()
    for module in net.modules():
        module.train(not isinstance(module, nn.BatchNorm1d))
    ours = results(net, images().double())
    with straightforward():
        assert_same(ours, results(net, images().double()))


def test_gradient_checkpointing():
    net, x = network(SMALLEST[0]).double().train(), images().double()
    expected = results(net, x)
    net.set_grad_checkpointing()
    assert_same(results(net, x), expected)
