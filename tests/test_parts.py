"""Parts of networks: whatever way one is taken, it computes the same and its cells come along, each of them once."""

import copy
import pickle
from collections import OrderedDict
from collections.abc import Callable

import pytest
import timm
import torch
from networks import images, network
from torch import nn
from torch.func import functional_call
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.feature_extraction import create_feature_extractor

from kw_timm import WarehousePlan, kernelize
from kw_timm.layers import KWLayer, Warehouse

NAME = 'kw1d4x_resnet18'


def cells(module: nn.Module) -> dict[int, nn.Parameter]:
    """Cells among the parameters, which must be those that the layers use."""
    found = {id(p): p for p in module.parameters()}
    used = {id(m.__dict__['warehouse'].weight) for m in module.modules() if isinstance(m, KWLayer)}
    assert used <= set(found)
    assert len(list(module.parameters())) == len(found)
    return {key: found[key] for key in used}


@pytest.fixture(scope='module')
def net() -> nn.Module:
    return network(NAME)


@pytest.fixture(scope='module')
def stage(net) -> tuple[nn.Module, torch.Tensor]:
    """The last stage: it has the cells of two warehouses, those of the stage before too."""
    return net.layer4, torch.randn(2, 256, 4, 4, generator=torch.Generator().manual_seed(0))


def all_but(k: int) -> Callable[[nn.Module], nn.Module]:
    return lambda net: nn.Sequential(*list(net.children())[:-k])


WAYS = {
    'children': all_but(2),
    'named children': lambda net: nn.Sequential(OrderedDict(list(net.named_children())[:-2])),
    'getter': lambda net: IntermediateLayerGetter(net, {'layer4': 'out'}),
    'graph': lambda net: create_feature_extractor(net, {'layer4': 'out'}),
    'surgery': lambda net: nn.Sequential(
        nn.Sequential(net.conv1, net.bn1, net.act1, net.maxpool), net.layer1, net.layer2, net.layer3, net.layer4
    ),
}


@torch.no_grad()
@pytest.mark.parametrize('way', WAYS)
def test_ways_to_take_features(net, way):
    part = WAYS[way](net).eval()
    y = part(images())
    assert torch.equal(y['out'] if isinstance(y, dict) else y, net.forward_features(images()))
    assert {id(w.weight) for w in net.warehouses.values()} <= {id(p) for p in part.parameters()}
    trunk = [p for name, p in net.named_parameters() if not name.startswith('fc')]
    assert sum(p.numel() for p in part.parameters()) == sum(p.numel() for p in trunk)


@torch.no_grad()
@pytest.mark.parametrize('name', ['kw1x_mobilenetv2_050', 'kw1d2x_mobilenetv2_050'])
def test_children_without_the_head(name):
    model = network(name)
    part = all_but(2)(model)
    assert torch.equal(part(images(1)), model.forward_features(images(1)))
    with_cells = {id(w.weight) for name, w in model.warehouses.items() if name != 'classifier'}
    assert set(cells(part)) == with_cells


def test_the_whole_network_lists_everything_once(net):
    names = [name for name, _ in net.named_parameters()]
    assert names == [name for name, _ in net.named_parameters(remove_duplicate=False)]
    assert names[:4] == [f'warehouses.layer{i}.weight' for i in (1, 2, 3, 4)]
    assert list(net.state_dict())[:4] == names[:4]
    assert not any('.warehouse.' in name for name in net.state_dict())
    assert [type(child) for child in net.children()][1:] == [
        type(child) for child in timm.create_model('resnet18').children()
    ]


def test_state_dict_of_a_part(stage):
    part, x = copy.deepcopy(stage[0]), stage[1]
    state = part.state_dict()
    shared = ['0.conv1.warehouse.weight', '0.conv2.warehouse.weight']
    assert [name for name in state if 'warehouse' in name] == shared
    assert {name for name, _ in part.named_parameters()} <= set(state)
    twin = timm.create_model(NAME).layer4.eval()
    twin.load_state_dict(state)
    assert torch.equal(twin(x), part(x))
    with torch.device('meta'):
        twin = timm.create_model(NAME).layer4.eval()
    twin.load_state_dict(state, assign=True)
    assert torch.equal(twin(x), part(x))
    missing = {name: value for name, value in state.items() if name not in shared}
    assert timm.create_model(NAME).layer4.load_state_dict(missing, strict=False).missing_keys == shared
    with pytest.raises(RuntimeError, match=r'Unexpected key.*1.conv1.warehouse.weight'):
        twin.load_state_dict(state | {'1.conv1.warehouse.weight': state[shared[1]]})


@torch.no_grad()
@pytest.mark.parametrize('duplicate', [copy.deepcopy, lambda part: pickle.loads(pickle.dumps(part))])
def test_copies_of_a_part(net, stage, duplicate):
    part, x = stage
    before = part(x)
    other = duplicate(part)
    assert torch.equal(other(x), before)
    assert not set(cells(other)) & set(cells(part))
    for parameter in cells(other).values():
        parameter.zero_()
    assert not torch.equal(other(x), before)
    assert torch.equal(part(x), before)


@torch.no_grad()
def test_a_part_is_moved_and_cast(stage):
    part, x = copy.deepcopy(stage[0]), stage[1]
    expected = part(x)
    torch.testing.assert_close(part.double()(x.double()).float(), expected, rtol=1e-3, atol=1e-3)
    assert {p.dtype for p in part.parameters()} == {torch.double}
    assert all(p.is_meta for p in copy.deepcopy(part).to('meta').parameters())
    assert not any(p.is_meta for p in part.to('meta').to_empty(device='cpu').parameters())


def test_a_part_is_trained(stage):
    part, x = copy.deepcopy(stage[0]).train(), stage[1]
    optimizer = torch.optim.SGD(part.parameters(), lr=0.1)
    before = {name: p.detach().clone() for name, p in part.named_parameters()}
    part(x).square().sum().backward()
    optimizer.step()
    assert not any(torch.equal(p, before[name]) for name, p in part.named_parameters())
    part.requires_grad_(False)
    part.zero_grad()
    assert all(p.grad is None and not p.requires_grad for p in cells(part).values())


def test_a_part_as_a_function_and_as_a_graph(stage):
    part, x = stage[0][:1], stage[1]
    with torch.no_grad():
        expected = part(x)
        parameters = {name: p.clone() for name, p in part.named_parameters()}
        assert torch.equal(functional_call(part, parameters, (x,)), expected)
        parameters['0.conv1.warehouse.weight'].zero_()
        assert not torch.equal(functional_call(part, parameters, (x,)), expected)
        assert torch.equal(part(x), expected)
        features = create_feature_extractor(stage[0], ['0'])
        assert torch.equal(features(x)['0'], expected)
        exported = torch.export.export(part, (x,))
        torch.testing.assert_close(exported.module()(x), expected, rtol=1e-4, atol=1e-4)
    traced = torch.jit.trace(part, x)
    torch.testing.assert_close(traced(x), expected, rtol=1e-4, atol=1e-4)


class Late(nn.Module):
    """A network that registers its warehouse behind the layers; all goes by the registered name still."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
        made = kernelize(self.body, {'a': WarehousePlan(['0', '2'])})
        del self.body.warehouses
        self.late = made


@torch.no_grad()
@pytest.mark.parametrize('make', [Late, lambda: Late().body])
def test_the_order_of_registration_does_not_matter(make):
    module = make().eval()
    names = [name for name in module.state_dict() if 'ware' in name or 'late' in name]
    assert names == [name for name, _ in module.named_parameters() if 'ware' in name or 'late' in name]
    assert names == (['late.a.weight'] if isinstance(module, Late) else ['0.warehouse.weight'])
    state = module.state_dict()
    twin = make().eval()
    twin.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(twin.parameters(), module.parameters(), strict=True))
    missing = {name: value for name, value in state.items() if name not in names}
    assert twin.load_state_dict(missing, strict=False).missing_keys == names


def test_numbered_children_keep_their_numbers():
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    kernelize(model, {'a': WarehousePlan(['0', '2'])})
    assert [type(m).__name__ for m in model] == ['KWConv2d', 'ReLU', 'KWConv2d', '_Warehouses']
    assert [name for name, _ in model.named_parameters() if 'ware' in name] == ['warehouses.a.weight']
    assert [name for name in model.state_dict() if 'ware' in name] == ['warehouses.a.weight']
    assert len(cells(model[:2])) == 1
    assert sum(isinstance(m, Warehouse) for m in model.modules()) == 1
