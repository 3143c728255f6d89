"""Activations that change a KW layer's output in place, as networks without a norm behind a layer have them."""

import pytest
import torch
from torch import nn

from kw_timm import WarehousePlan, kernelize

LAYERS = {
    'pointwise': (lambda: nn.Conv2d(8, 8, 1), (8, 5, 5)),
    'strided': (lambda: nn.Conv2d(8, 8, 1, stride=2, bias=False), (8, 5, 5)),
    'spatial': (lambda: nn.Conv2d(8, 8, 3), (8, 5, 5)),
    'depthwise': (lambda: nn.Conv2d(8, 8, 3, groups=8, bias=False), (8, 5, 5)),
    'grouped': (lambda: nn.Conv2d(8, 8, 3, groups=2), (8, 5, 5)),
    'sequence': (lambda: nn.Conv1d(8, 8, 3), (8, 5)),
    'volume': (lambda: nn.Conv3d(8, 8, 1, bias=False), (8, 2, 3, 3)),
    'tokens': (lambda: nn.Linear(8, 8), (5, 8)),
    'vectors': (lambda: nn.Linear(8, 8, bias=False), (8,)),
}


@pytest.mark.parametrize('batch', [2, 3])
@pytest.mark.parametrize('norm', [nn.BatchNorm1d, nn.LayerNorm])
@pytest.mark.parametrize('kind', LAYERS)
def test_gradients_are_the_same(kind, norm, batch):
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    net = nn.Sequential(make(), nn.Hardswish()).double()
    kernelize(net, {'w': WarehousePlan(['0'])}, norm)
    x = torch.randn(batch, *shape, dtype=torch.float64)
    found = []
    for inplace in (False, True):
        net[1].inplace = inplace
        net.zero_grad()
        y = net(x)
        y.square().sum().backward()
        found.append([y.detach(), *(p.grad for p in net.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('kind', LAYERS)
def test_one_sample(kind):
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    net = nn.Sequential(make(), nn.ReLU(inplace=True))
    kernelize(net, {'w': WarehousePlan(['0'])}, nn.LayerNorm)
    net(torch.randn(1, *shape)).square().sum().backward()
    assert all(p.grad is not None for p in net.parameters())
