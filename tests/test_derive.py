"""Plans that are derived: the released ones, their rules on other networks, what they cost, and as plain data."""

import json
import math
from collections.abc import Mapping
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import kw_timm
from kw_timm import WarehousePlan, derive_plan, kernelize, plan_from_json, plan_sizes, plan_table, plan_to_json
from kw_timm.layers import KWLayer
from kw_timm.models.kw_convnext import convnext_plan
from kw_timm.models.kw_mobilenetv2 import mobilenetv2_plan
from kw_timm.models.kw_resnet import resnet_plan
from kw_timm.stages import candidates
from kw_timm.weights.skeletons import create_skeleton

HALF = dict(cell_inplane_ratio=0.5, cell_outplane_ratio=0.5)


def sharing(plan: Mapping[str, WarehousePlan]) -> set[Any]:
    """Which layers share, and at which ratios, whatever warehouses are called."""
    return {
        (
            *(frozenset(p.layers), p.ratios),
            *(p.reduction, p.nonlocal_basis_ratio),
        )
        for p in plan.values()
    }


def attention_share(model: nn.Module, plan: Mapping[str, WarehousePlan]) -> float:
    """Attention parameters relative to all others of the network that a plan makes."""
    sizes = plan_sizes(model, plan, kw_timm.derive.fitting_norm(model))
    others = sum(p.numel() for p in model.parameters()) - sizes.static_weights + sizes.cell_weights
    return sizes.attention_weights / others


@pytest.mark.parametrize('limit', [0.1, math.inf])
@pytest.mark.parametrize('budget', [1, 2, 4])
@pytest.mark.parametrize('name', ['resnet18', 'resnet50'])
def test_released_plans_of_resnets(name, budget, limit):
    model = create_skeleton(name)
    assert sharing(derive_plan(model, budget, attention_limit=limit)) == sharing(
        resnet_plan(model, cell_num_ratio=budget)
    )


@pytest.mark.parametrize(
    ('name', 'budget', 'more'),
    [('resnet18', 0.25, {}), ('resnet18', 0.5, {}), ('resnet50', 0.5, {'nonlocal_basis_ratio': 0.0625})],
)
def test_released_plans_of_fewer_cells(name, budget, more):
    model = create_skeleton(name)
    derived = derive_plan(model, budget, attention_limit=math.inf, **more)
    assert sharing(derived) == sharing(resnet_plan(model, cell_num_ratio=budget, **HALF, **more))


@pytest.mark.parametrize('name', ['mobilenetv2_050', 'mobilenetv2_100'])
@pytest.mark.parametrize(('budget', 'pointwise'), [(1, 'shared'), (4, 'apart')])
def test_released_plans_of_mobilenetv2(name, budget, pointwise):
    model = create_skeleton(name)
    derived = derive_plan(model, budget, attention_limit=math.inf, include=['*', 'conv_stem'])
    assert sharing(derived) == sharing(mobilenetv2_plan(model, pointwise, budget))
    assert 'conv_stem' in derive_plan(model, budget).static


def test_released_plan_of_convnext():
    model = create_skeleton('convnext_tiny', conv_mlp=True)
    derived = derive_plan(model, attention_limit=math.inf, include=['*', 'stem.0'])
    assert sharing(derived) == sharing(convnext_plan(model))


QUICK = ('test_resnet', 'test_efficientnet', 'test_convnext3', 'test_vit3', 'test_coatnet')
OTHERS = (
    *('resnet18', 'mobilenetv2_050', 'convnext_atto', 'vit_tiny_patch16_224', 'test_maxvit', 'test_mambaout'),
    *('efficientnet_b0', 'regnety_002', 'vgg11', 'densenet121', 'swin_tiny_patch4_window7_224', 'mobilevit_xxs'),
    *('mixer_s16_224', 'levit_128s', 'selecsls42b', 'repvit_m1', 'hrnet_w18_small', 'fastvit_t8', 'resnext50_32x4d'),
)


@pytest.mark.parametrize(
    'budget', [0.25, pytest.param(0.5, marks=pytest.mark.slow), pytest.param(1, marks=pytest.mark.slow), 4]
)
@pytest.mark.parametrize('name', [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_any_timm_network(name, budget):
    model = create_skeleton(name)
    plan = derive_plan(model, budget)
    planned = [layer for entry in plan.values() for layer in entry.layers]
    assert len(planned) == len(set(planned))
    assert sorted([*planned, *plan.static]) == sorted(candidates(model))
    assert all(reason.endswith('.') for reason in plan.static.values())
    assert attention_share(model, plan) <= 0.1
    kernels = sum(model.get_submodule(layer).weight.numel() for layer in planned)
    could = [layer for layer in candidates(model) if 'over the limit' in plan.static.get(layer, 'over the limit')]
    assert kernels > (0.8 if budget >= 1 else 0.1) * sum(model.get_submodule(layer).weight.numel() for layer in could)
    kernelize(model, plan, kw_timm.derive.fitting_norm(model))
    assert {key for key, module in model.named_modules() if isinstance(module, KWLayer)} == set(planned)
    assert sum(p.numel() for p in model.warehouses.parameters()) == budget * kernels


def test_groups():
    model = create_skeleton('mobilenetv2_100')
    modules = dict(model.named_modules())
    for entry in derive_plan(model, attention_limit=math.inf).values():
        depthwise = {modules[layer].groups > 1 for layer in entry.layers}
        assert len(depthwise) == 1
    # Half of what the limit allows is held to, too, with more warehouses.
    assert attention_share(model, derive_plan(model, attention_limit=0.05)) <= 0.05


@pytest.mark.parametrize(
    ('name', 'layer', 'reason'),
    [
        ('resnet50', 'conv1', 'part of the stem'),
        ('resnet50', 'layer1.0.conv1', 'belongs to the stem'),
        ('resnet50', 'fc', 'the classifier'),
        ('efficientnet_b0', 'blocks.1.0.se.conv_reduce', 'one pooled vector'),
        ('tf_efficientnet_b0', 'blocks.1.0.conv_dw', 'Conv2dSame'),
        ('resnetv2_50x1_bit', 'stages.0.blocks.0.conv1', 'standardized'),
        ('beit_base_patch16_224', 'blocks.0.attn.qkv', "reads its 'weight'"),
    ],
)
def test_reasons(name, layer, reason):
    if name == 'resnetv2_50x1_bit':
        with pytest.raises(ValueError, match=r'There is no layer to plan in ResNetV2. .*standardized'):
            derive_plan(create_skeleton(name))
        return
    assert reason in derive_plan(create_skeleton(name)).static[layer]


def test_patterns():
    model = create_skeleton('resnet18')
    plan = derive_plan(model, include='layer4.*', exclude=['*.downsample.*', 'layer4.1.conv2'])
    planned = {layer for entry in plan.values() for layer in entry.layers}
    assert planned == {'layer4.0.conv1', 'layer4.0.conv2', 'layer4.1.conv1'}
    assert plan.static['layer4.1.conv2'] == plan.static['layer1.0.conv1'] == 'it is excluded.'
    # A name in full takes what a rule would leave, and nothing takes what cannot be.
    written = derive_plan(model, include=['layer4.*', 'fc'])
    assert ['fc'] in [list(entry.layers) for entry in written.values()]


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'budget': 1.5}, 'budget must be a whole number'),
        ({'budget': 0}, 'budget must be a whole number'),
        ({'budget': '1'}, 'budget must be a whole number'),
        ({'budget': 0.3}, 'budget must be a whole number'),
        ({'budget': math.nan}, 'budget must be a whole number'),
        ({'attention_limit': 0}, 'attention_limit must be a positive number'),
        ({'include': 'layer9.*'}, "include: no convolution or linear layer of the network is named like 'layer9"),
        ({'exclude': ['fc', 'head']}, "exclude: no convolution or linear layer of the network is named like 'head'"),
        ({'include': 'fc', 'exclude': 'fc'}, 'There is no layer to plan in ResNet'),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        derive_plan(create_skeleton('resnet18'), **arguments)


def test_networks_with_nothing_to_plan():
    with pytest.raises(ValueError, match='It has no layers'):
        derive_plan(nn.Sequential(nn.ReLU()))
    with pytest.raises(ValueError, match="'0' has no size yet"):
        derive_plan(nn.Sequential(nn.LazyConv2d(8, 3), nn.Linear(8, 2)))


def block(i: int, o: int, stride: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU())


class MadeUp(nn.Module):
    """30 layers that no one planned for: convolutions of many kinds, a transposed one, gates, linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.entry = nn.Conv2d(3, 16, 5, 2, 2)
        self.first = nn.ModuleList(block(16, 16, 1) for _ in range(4))
        self.reduce = block(16, 32, 2)
        self.second = nn.ModuleList(block(32, 32, 1) for _ in range(6))
        self.apart = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.together = nn.Conv2d(32, 64, 1)
        self.pool = nn.MaxPool2d(2)
        self.third = nn.ModuleList(nn.Conv2d(64, 64, 3, padding=1, groups=4) for _ in range(5))
        self.dilated = nn.ModuleList(nn.Conv2d(64, 64, (1, 3), padding=(0, 2), dilation=(1, 2)) for _ in range(4))
        self.up = nn.ConvTranspose2d(64, 32, 2, 2)
        self.mixed = nn.ModuleList(nn.Linear(32, 32) for _ in range(4))
        self.norm = nn.Conv2d(32, 24, 3, padding='same', padding_mode='reflect')
        self.out = nn.Linear(24, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.entry(x).relu()
        for layer in self.first:
            x = x + layer(x)
        x = self.reduce(x)
        for layer in self.second:
            x = x + layer(x)
        x = self.pool(self.together(self.apart(x)))
        for layer in (*self.third, *self.dilated):
            x = x + layer(x).relu()
        x = self.up(x).permute(0, 2, 3, 1)
        for layer in self.mixed:
            x = x + layer(x).relu()
        return self.out(self.norm(x.permute(0, 3, 1, 2)).mean((2, 3)))


def audio() -> nn.Module:
    parts = [nn.Conv1d(1, 16, 9, 4, 4), nn.BatchNorm1d(16), nn.ReLU()]
    for i, o in ((16, 16), (16, 32), (32, 32), (32, 64), (64, 64)):
        parts += [nn.Conv1d(i, o, 3, 2 if i != o else 1, 1), nn.BatchNorm1d(o), nn.ReLU()]
    return nn.Sequential(*parts, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(64, 5))


def video() -> nn.Module:
    parts = [nn.Conv3d(3, 16, (3, 5, 5), (1, 2, 2), (1, 2, 2)), nn.BatchNorm3d(16), nn.ReLU()]
    for i, o in ((16, 16), (16, 32), (32, 32), (32, 32)):
        parts += [nn.Conv3d(i, o, 3, 2 if i != o else 1, 1), nn.BatchNorm3d(o), nn.ReLU()]
    return nn.Sequential(*parts, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(32, 5))


@pytest.mark.parametrize(
    ('network', 'shape', 'count'),
    [(MadeUp, (4, 3, 32, 32), 26), (audio, (4, 1, 256), 5), (video, (4, 3, 4, 16, 16), 4)],
)
@pytest.mark.parametrize(('budget', 'weights'), [(0.5, 'new'), (2, 'new'), (1, 'keep')])
def test_networks_no_one_planned_for(network, shape, count, budget, weights):
    torch.manual_seed(0)
    model = network()
    plan = derive_plan(model, budget, attention_limit=math.inf)
    assert sum(len(entry.layers) for entry in plan.values()) == count
    assert len(plan) > 1
    kernelize(model, plan, weights=weights)
    x, y = torch.randn(shape), torch.arange(4)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    losses = []
    for _ in range(4):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        assert not [key for key, p in model.named_parameters() if p.grad is None]
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_stages_without_notes():
    """Stages begin where the resolution is lowered; the first layers belong to the stage before."""
    plan = derive_plan(audio(), attention_limit=math.inf)
    assert [list(entry.layers) for entry in plan.values()] == [['3', '6'], ['9', '12'], ['15']]
    static = derive_plan(MadeUp(), attention_limit=math.inf).static
    assert {key: reason.split()[0] for key, reason in static.items()} == {
        'entry': 'it',
        'out': 'it',
        'up': 'ConvTranspose2d',
        'norm': "padding_mode='reflect'",
    }


def test_plain_data():
    plan = derive_plan(create_skeleton('resnet18'), 0.5)
    data = plan_to_json(plan)
    again = plan_from_json(json.loads(json.dumps(data)))
    assert again == {key: WarehousePlan(**{**vars(entry), 'layers': list(entry.layers)}) for key, entry in plan.items()}
    assert plan_to_json({'a': WarehousePlan(('b',), spatial_partition=False)}) == {
        'a': {'layers': ['b'], 'spatial_partition': False}
    }
    assert plan_from_json({'a': WarehousePlan(['b'])}) == {'a': WarehousePlan(['b'])}


@pytest.mark.parametrize(
    ('data', 'message'),
    [
        ([], r'A plan must be a dict \{warehouse: .*\}, got list'),
        ('plan', 'got str'),
        ({1: {'layers': ['a']}}, 'named by strings that are not empty, got 1'),
        ({'w': ['a']}, "warehouse 'w' must be a dict with 'layers', got list"),
        ({'w': {}}, "'w' needs 'layers', a list"),
        ({'w': {'layers': 'conv1'}}, "needs 'layers', a list of one or more names of layers, got 'conv1'"),
        ({'w': {'layers': []}}, "needs 'layers'"),
        ({'w': {'layers': [1]}}, "needs 'layers'"),
        ({'w': {'layers': ['a'], 'budget': 2}}, "'w' has unknown entries budget; known are layers, cell_num_ratio"),
        ({'w': {'layers': ['a'], 'reduction': '1/16'}}, "needs a positive number as 'reduction', got '1/16'"),
        ({'w': {'layers': ['a'], 'cell_num_ratio': True}}, "needs a positive number as 'cell_num_ratio', got True"),
        ({'w': {'layers': ['a'], 'cell_num_ratio': math.nan}}, "needs a positive number as 'cell_num_ratio', got nan"),
        ({'w': {'layers': ['a'], 'cell_num_ratio': -1}}, "needs a positive number as 'cell_num_ratio', got -1"),
        ({'w': {'layers': ['a'], 'spatial_partition': 1}}, "needs true or false as 'spatial_partition', got 1"),
    ],
)
def test_broken_data(data, message):
    with pytest.raises(ValueError, match=message):
        plan_from_json(data)


@pytest.mark.parametrize(
    ('name', 'budget', 'more'),
    [
        ('test_resnet', 1, {}),
        ('test_resnet', 0.5, {'nonlocal_basis_ratio': 0.25}),
        ('test_efficientnet', 4, {}),
        ('resmlp_12_224', 1, {'include': 'blocks.0.*'}),
    ],
)
def test_table_is_what_the_network_costs(name, budget, more):
    model = timm.create_model(name).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    plan = derive_plan(model, budget, attention_limit=1.0, **more)
    size = model.pretrained_cfg['input_size']
    table = plan_table(model, plan)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert {row.layer for row in table.rows} == {layer for entry in plan.values() for layer in entry.layers}

    def flops(network: nn.Module) -> int:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            network(torch.zeros(1, *size))
        return counter.get_total_flops()

    static = flops(model)
    kernelize(model, plan, kw_timm.derive.fitting_norm(model))
    if 'nonlocal_basis_ratio' not in more:
        added = sum(row.flops_after - row.flops_before for row in table.rows)
        assert flops(model.eval()) - static == added
    assert sum(row.cell_weights for row in table.rows) == sum(p.numel() for p in model.warehouses.parameters())
    for row in table.rows:
        layer = model.get_submodule(row.layer)
        assert row.attention_weights == sum(p.numel() for p in layer.attention.parameters())
        assert (row.mixtures, row.all_cells) == (layer.attention.num_mixtures, layer.attention.num_cells)
        assert row.bytes_after > row.bytes_before > 4 * math.prod(layer.spec.kernel_shape)


def test_table_as_text():
    model = create_skeleton('resnet18')
    plan = derive_plan(model)
    lines = str(plan_table(model, plan)).splitlines()
    assert lines[0].split()[:4] == ['layer', 'warehouse', 'mixtures', 'cells']
    assert lines[1].split()[:5] == ['layer1.0.conv1', 'stage0_conv', '9', '9', '56']
    assert lines[-3:] == ['static:', 'conv1: it is part of the stem.', 'fc: it is the classifier.']
    sizes = plan_sizes(model, plan)
    total = next(line for line in lines if line.startswith('all')).split()
    assert total[3:5] == [f'{sizes.attention_weights:,}', f'{sizes.cell_weights:,}']
    half = plan_table(model, plan, torch.empty(2, 3, 112, 112, device='meta'))
    assert half.rows[0].flops_before * 4 == plan_table(model, plan).rows[0].flops_before


def test_table_of_networks_that_are_not_timms():
    plan = derive_plan(video(), attention_limit=1.0)
    with pytest.raises(ValueError, match='Give inputs, a batch of what the network takes'):
        plan_table(video(), plan)
    table = plan_table(video(), plan, torch.zeros(2, 3, 4, 16, 16))
    assert table.rows[0].flops_before == 2 * 16 * 16 * 27 * 4 * 8 * 8
    model = video()
    kernelize(model, plan)
    with pytest.raises(ValueError, match="The layer '3' is a KW layer already"):
        plan_table(model, plan)
    with pytest.raises(ValueError, match="plans the layer 'none', which the network does not have"):
        plan_table(video(), {'w': WarehousePlan(['none'])}, torch.zeros(1, 3, 4, 16, 16))
