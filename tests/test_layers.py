"""The layers, against a loop over samples that writes every kernel element by element, in float64."""

import copy
import itertools
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from timm.models._manipulate import reinit_non_persistent_buffers
from torch import nn
from torch.autograd import gradcheck
from torch.func import functional_call

from kw_timm.layers import KWAttention, KWConv1d, KWConv2d, KWConv3d, KWLayer, KWLinear, Warehouse, partition_kernels

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class Layer(nn.Module):
    """One KW layer, second of three in its warehouse, with the warehouse that it refers to."""

    def __init__(self, cls: type[KWLayer], args: tuple, kernel: tuple[int, ...], conv: dict, warehouse: dict, kw: dict):
        super().__init__()
        others = (kernel[0] * 2, *kernel[1:]), (kernel[0], kernel[1] * 3, *kernel[2:])
        self.warehouse = Warehouse([others[0], kernel, others[1]], **warehouse)
        self.layer = cls(*args, **conv, **kw, warehouse=self.warehouse, index=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def make(cls, args, kernel, conv=None, warehouse=None, temperature=0.0, **kw) -> Layer:
    torch.manual_seed(0)
    net = Layer(cls, args, kernel, conv or {}, warehouse or {}, kw).double()
    for parameter in net.parameters():
        nn.init.normal_(parameter)
    attention = net.layer.attention
    if isinstance(attention.norm1, nn.BatchNorm1d):
        nn.init.normal_(attention.norm1.running_mean)
        nn.init.uniform_(attention.norm1.running_var, 0.5, 1.5)
    attention.temperature = temperature
    return net


def hidden_by_hand(attention: KWAttention, pooled: torch.Tensor) -> torch.Tensor:
    norm = attention.norm1
    h = pooled @ attention.fc1.weight.T
    if isinstance(norm, nn.LayerNorm):
        h = h + attention.fc1.bias
        mean, var = h.mean(1, keepdim=True), h.var(1, correction=0, keepdim=True)
    elif norm.training:
        mean, var = h.mean(0), h.var(0, correction=0)
    else:
        mean, var = norm.running_mean, norm.running_var
    return ((h - mean) / (var + norm.eps).sqrt() * norm.weight + norm.bias).clamp(min=0)


def coefficients_by_hand(net: Layer, h: torch.Tensor) -> list[list[torch.Tensor]]:
    """Coefficients [mixture][cell] of one sample with hidden vector ``h``."""
    attention, partition = net.layer.attention, net.warehouse.partition
    share = partition.layers[1]
    m, n, b = math.prod(share.grid), partition.num_cells, partition.cell_num_ratio
    start = int(b * math.prod(partition.layers[0].grid))
    columns = attention.fc2.weight.shape[0] // m
    rows = []
    for i in range(m):
        weight = attention.fc2.weight[i * columns : (i + 1) * columns]
        if hasattr(attention, 'fc3'):
            z = weight @ h
            local = int(b * m)
            others = attention.fc3.weight @ z[local:-1]
            bias = attention.basis_bias[i * (n + 1) : (i + 1) * (n + 1)]
            logits = torch.cat([others[:start], z[:local], others[start:], z[-1:]]) + bias
        else:
            logits = weight @ h + attention.fc2.bias[i * columns : (i + 1) * columns]
        a = logits / (logits.abs().sum() + 1e-3)
        t = attention.temperature
        rows.append([(1 - t) * a[j] + t * (share.assigned[i] == j) for j in range(n)])
    return rows


def kernel_by_hand(net: Layer, h: torch.Tensor) -> torch.Tensor:
    layer, cells, partition = net.layer, net.warehouse.weight, net.warehouse.partition
    a = coefficients_by_hand(net, h)
    co, ci = partition.cell_shape[:2]
    positions, out_groups, in_groups = partition.layers[1].grid
    kernel = torch.zeros(layer.spec.kernel_shape, dtype=cells.dtype)
    mixtures = itertools.product(range(positions), range(out_groups), range(in_groups))
    for i, (s, og, ig) in enumerate(mixtures):
        cell = sum(a[i][j] * cells[j] for j in range(partition.num_cells))
        place = kernel[og * co : (og + 1) * co, ig * ci : (ig + 1) * ci]
        if positions == 1:
            place += cell.reshape(place.shape)
        else:
            at = torch.unravel_index(torch.tensor(s), layer.kernel_size)
            place[(..., *at)] = cell.reshape(co, ci)
    return kernel


def by_hand(net: Layer, x: torch.Tensor) -> torch.Tensor:
    layer = net.layer
    h = hidden_by_hand(layer.attention, x.flatten(2).mean(2))
    conv, outputs = CONV[layer.spatial_axes], []
    for sample, vector in zip(x, h, strict=True):
        kernel = kernel_by_hand(net, vector)
        outputs.append(
            conv(sample[None], kernel, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)
        )
    return torch.cat(outputs)


CASES = {
    '1d': (KWConv1d, (4, 6, 3), (6, 4, 3), dict(padding=1)),
    '1d stride dilation': (KWConv1d, (4, 6, 3), (6, 4, 3), dict(stride=2, dilation=2)),
    '2d': (KWConv2d, (4, 6, (3, 2)), (6, 4, 3, 2), dict()),
    '2d pointwise': (KWConv2d, (4, 6, 1), (6, 4, 1, 1), dict(bias=False)),
    '2d groups': (KWConv2d, (4, 6, 3), (6, 2, 3, 3), dict(groups=2, stride=(2, 1), padding=(0, 2))),
    '2d depthwise': (KWConv2d, (4, 4, 3), (4, 1, 3, 3), dict(groups=4, dilation=(1, 2), padding=2)),
    '2d same': (KWConv2d, (4, 6, (2, 3)), (6, 4, 2, 3), dict(padding='same', dilation=(3, 1))),
    '2d valid': (KWConv2d, (4, 6, 3), (6, 4, 3, 3), dict(padding='valid')),
    '3d': (KWConv3d, (4, 2, (1, 2, 2)), (2, 4, 1, 2, 2), dict(stride=(1, 2, 1), padding=(0, 1, 0))),
}


@pytest.mark.parametrize('temperature', [0.0, 0.3])
@pytest.mark.parametrize('case', CASES)
def test_convolutions(case, temperature):
    cls, args, kernel, conv = CASES[case]
    net = make(cls, args, kernel, conv, dict(cell_outplane_ratio=0.5, cell_inplane_ratio=0.5), temperature).eval()
    x = torch.randn(3, 4, *(5, 6, 7)[: cls.spatial_axes], dtype=torch.double)
    torch.testing.assert_close(net(x), by_hand(net, x))


@pytest.mark.parametrize('norm', [nn.BatchNorm1d, nn.LayerNorm])
@pytest.mark.parametrize('basis', [1.0, 0.25])
@pytest.mark.parametrize('budget', [0.25, 0.5, 1, 2, 4])
def test_attention(budget, basis, norm):
    net = make(
        KWConv2d,
        (4, 4, 2),
        (4, 4, 2, 2),
        warehouse=dict(cell_num_ratio=budget, cell_outplane_ratio=0.5),
        temperature=0.25,
        reduction=5.0,
        nonlocal_basis_ratio=basis,
        norm_layer=norm,
    )
    assert net.layer.attention.fc1.weight.shape == (20, 4)
    assert (net.layer.attention.fc1.bias is None) == (norm is nn.BatchNorm1d)
    x = torch.randn(3, 4, 3, 3, dtype=torch.double)
    for train in (True, False):
        expected = by_hand(net.train(train), x)
        torch.testing.assert_close(net(x), expected)


@pytest.mark.parametrize('conv', [dict(), dict(padding=1, stride=2)])
def test_without_spatial_partition(conv):
    net = make(KWConv2d, (4, 6, 3), (6, 4, 3, 3), conv, dict(spatial_partition=False, cell_num_ratio=2)).eval()
    assert net.warehouse.weight.shape[1:] == (6, 4, 3, 3)
    x = torch.randn(3, 4, 5, 5, dtype=torch.double)
    torch.testing.assert_close(net(x), by_hand(net, x))


@pytest.mark.parametrize('tokens', [(), (5,), (2, 3)])
def test_linear(tokens):
    net = make(KWLinear, (8, 6), (6, 8, 1), warehouse=dict(cell_inplane_ratio=0.5)).eval()
    x = torch.randn(3, *tokens, 8, dtype=torch.double)
    h = hidden_by_hand(net.layer.attention, x.reshape(3, -1, 8).mean(1))
    kernels = [kernel_by_hand(net, vector)[..., 0] for vector in h]
    expected = torch.stack([F.linear(s, w, net.layer.bias) for s, w in zip(x, kernels, strict=True)])
    torch.testing.assert_close(net(x), expected)
    assert (net.layer.in_features, net.layer.out_features) == (8, 6)


@pytest.mark.parametrize('budget', [0.5, 1, 2])
def test_at_temperature_one_it_is_a_plain_convolution(budget):
    net = make(KWConv2d, (4, 4, 2), (4, 4, 2, 2), warehouse=dict(cell_num_ratio=budget, cell_inplane_ratio=0.5))
    net.layer.attention.temperature = 1.0
    cells, share = net.warehouse.weight.detach(), net.warehouse.partition.layers[1]
    with_zero = torch.cat([cells, torch.zeros_like(cells[:1])])
    # Mixtures are (2 x 2 positions, 1 output group, 2 input groups) of cells of 4 x 2 channels.
    kernel = with_zero[list(share.assigned)].reshape(2, 2, 2, 4, 2).permute(3, 2, 4, 0, 1).reshape(4, 4, 2, 2)
    x = torch.randn(3, 4, 5, 5, dtype=torch.double)
    torch.testing.assert_close(net(x), F.conv2d(x, kernel, net.layer.bias))


@pytest.mark.parametrize('basis', [1.0, 0.5])
def test_gradients(basis):
    net = make(
        KWConv2d, (2, 2, 2), (2, 2, 2, 2), warehouse=dict(cell_num_ratio=0.5), reduction=1, nonlocal_basis_ratio=basis
    ).eval()
    # Positive biases keep the ReLU away from its corner.
    with torch.no_grad():
        net.layer.attention.norm1.bias.fill_(4)
    names, values = zip(*net.named_parameters(), strict=True)
    x = torch.randn(2, 2, 3, 2, dtype=torch.double, requires_grad=True)
    values = [value.detach().requires_grad_() for value in values]
    assert gradcheck(
        lambda x, *v: functional_call(net, dict(zip(names, v, strict=True)), (x,)), (x, *values), fast_mode=True
    )


def test_sizes_of_the_attention():
    partition = partition_kernels([(64, 64, 3, 3), (64, 64, 1, 1)])
    assert KWAttention(64, partition, 0).fc1.out_features == 16
    assert KWAttention(512, partition, 0).fc1.out_features == 32
    assert KWAttention(64, partition, 0).fc2.out_features == 9 * (10 + 1)
    basis = KWAttention(64, partition, 1, nonlocal_basis_ratio=0.5)
    assert (basis.fc2.out_features, basis.fc3.weight.shape) == (1 * (1 + 16 + 1), (9, 16))


def test_assignment_survives_meta_device():
    with torch.device('meta'):
        net = Layer(KWConv2d, (4, 4, 2), (4, 4, 2, 2), {}, dict(cell_num_ratio=0.5), {})
    expected = make(KWConv2d, (4, 4, 2), (4, 4, 2, 2), warehouse=dict(cell_num_ratio=0.5))
    assert net.layer.attention.assignment.is_meta
    net.to_empty(device='cpu')
    net.layer.attention.assignment.fill_(7)
    reinit_non_persistent_buffers(net)
    assert torch.equal(net.layer.attention.assignment.double(), expected.layer.attention.assignment)


def test_state_dict_lists_each_tensor_once_and_no_state_of_training():
    net = make(KWConv2d, (4, 4, 1), (4, 4, 1, 1))
    assert list(net.state_dict()) == [
        'warehouse.weight',
        'layer.bias',
        'layer.attention.fc1.weight',
        'layer.attention.norm1.weight',
        'layer.attention.norm1.bias',
        'layer.attention.norm1.running_mean',
        'layer.attention.norm1.running_var',
        'layer.attention.norm1.num_batches_tracked',
        'layer.attention.fc2.weight',
        'layer.attention.fc2.bias',
    ]


@pytest.mark.parametrize('duplicate', [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_copies_keep_layer_and_warehouse_together(duplicate):
    net = make(KWConv2d, (4, 4, 1), (4, 4, 1, 1)).eval()
    other = duplicate(net)
    x = torch.randn(2, 4, 3, 3, dtype=torch.double)
    before = net(x)
    assert torch.equal(other(x), before)
    with torch.no_grad():
        other.warehouse.weight.zero_()
        other.layer.bias.zero_()
    assert not other(x).any()
    assert torch.equal(net(x), before)


def test_an_empty_batch_gives_an_empty_output():
    net = make(KWConv2d, (4, 6, 3), (6, 4, 3, 3), dict(stride=2, padding=1)).eval()
    assert net(torch.empty(0, 4, 5, 5, dtype=torch.double)).shape == (0, 6, 3, 3)


def test_shows_its_arguments():
    text = repr(make(KWConv2d, (4, 6, 3), (6, 2, 3, 3), dict(groups=2)))
    assert 'KWConv2d(\n    4, 6, kernel_size=(3, 3), stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=2' in text
    assert 'cells=54, cell_shape=(6, 2, 1, 1), layers=3' in text
    assert 'mixtures=9' in text


@pytest.mark.parametrize(
    ('shape', 'message'),
    [
        ((4, 5, 5), r'batched input \(B, 4, \*spatial\), got shape \(4, 5, 5\).*unsqueeze\(0\)'),
        ((2, 3, 5, 5), r'batched input \(B, 4, \*spatial\), got shape \(2, 3, 5, 5\)'),
        ((4, 4, 5), r'batched input of 4 axes .*unsqueeze\(0\)'),
        ((2, 4, 0, 5), 'no pixels'),
        ((2, 4, 2, 5), r'smaller than the kernel window \(3, 3\)'),
    ],
)
def test_bad_inputs(shape, message):
    net = make(KWConv2d, (4, 6, 3), (6, 4, 3, 3)).eval()
    with pytest.raises(ValueError, match=message):
        net(torch.zeros(shape, dtype=torch.double))


def test_one_pixel():
    net = make(KWConv2d, (4, 6, 3), (6, 4, 3, 3), dict(padding=1)).eval()
    x = torch.randn(2, 4, 1, 1, dtype=torch.double)
    torch.testing.assert_close(net(x), by_hand(net, x))


@pytest.mark.parametrize(
    ('args', 'kw', 'message'),
    [
        ((4, 8, 3), dict(index=1), 'index 1 is out of range: the warehouse serves 1 layers'),
        ((4, 8, 3), dict(index=-1), 'index -1 is out of range'),
        ((4, 8, 2), {}, r'made for a kernel of 8 x 4 channels and 9 window positions'),
        ((4, 4, 3), {}, 'made for a kernel of 8 x 4 channels'),
        ((4, 8, 3), dict(groups=3), 'groups=3 must divide'),
        ((4, 8, (3, 3, 3)), {}, 'Expected one number or 2'),
        ((4, 8, 3), dict(nonlocal_basis_ratio=0), 'above 0 and at most 1'),
        ((4, 8, 3), dict(nonlocal_basis_ratio=0.5), 'belong to one layer'),
    ],
)
def test_bad_layers(args, kw, message):
    with pytest.raises(ValueError, match=message):
        KWConv2d(*args, **kw, warehouse=Warehouse([(8, 4, 3, 3)]))
