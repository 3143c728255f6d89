"""What kernelize refuses: it says why in one sentence, allocates nothing and leaves the network as it was."""

import copy
import math

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import ScaledStdConv2d, StdConv2d
from timm.layers.linear import Linear as AutocastLinear
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import kw_timm
from kw_timm import WarehousePlan, kernelize, plan_sizes
from kw_timm.layers import KWConv2d, KWLayer, KWLinear
from kw_timm.models.kw_mobilenetv2 import mobilenetv2_plan
from kw_timm.models.kw_resnet import resnet_plan


def refused(net: nn.Module, plan: dict[str, WarehousePlan], message: str, **kwargs) -> None:
    modules, random = dict(net.named_modules(remove_duplicate=False)), torch.get_rng_state()
    before = {name: (id(p), p.detach().clone()) for name, p in net.named_parameters()}
    with pytest.raises(ValueError, match=message) as caught:
        kernelize(net, plan, **kwargs)
    assert '\n' not in str(caught.value)
    assert dict(net.named_modules(remove_duplicate=False)) == modules
    assert all(id(p) == before[name][0] for name, p in net.named_parameters())
    assert all(p.is_meta or torch.equal(p, before[name][1]) for name, p in net.named_parameters())
    assert torch.equal(torch.get_rng_state(), random)
    assert not hasattr(net, 'warehouses')


def convolutions(net: nn.Module) -> list[str]:
    return [name for name, module in net.named_modules() if isinstance(module, nn.Conv2d)]


@pytest.mark.parametrize(
    ('name', 'culprit'),
    [
        ('resnet18', "the layer 'conv1' with its kernel of 64 x 3 x 7 x 7 makes"),
        ('mobilenetv2_050', r"17 layers \('blocks.0.0.conv_dw' ... 'blocks.6.0.conv_dw'\) make"),
    ],
)
def test_a_plan_that_cannot_be_meant(name, culprit):
    net = timm.create_model(name)
    message = (
        f'The plan makes [0-9.]+ [GT] weights of .*, more than the limit of .* mixtures of .* cells of .*{culprit}'
    )
    layers = [layer for layer in convolutions(net) if layer != 'conv_stem']
    refused(net, {'all': WarehousePlan(layers)}, message)


def test_the_limit_is_an_argument():
    plan = {'a': WarehousePlan(['layer1.0.conv1', 'layer1.0.conv2'])}
    net = timm.create_model('resnet18')
    made = plan_sizes(net, plan).weights
    refused(net, plan, 'more than the limit of .*max_weights', max_weights=made - 1)
    kernelize(net, plan, max_weights=made)
    big = {'a': WarehousePlan(['layer1.0.conv1', 'layer1.0.conv2'], cell_inplane_ratio=1 / 64)}
    refused(timm.create_model('resnet18'), big, 'spread its layers')
    many = {'a': WarehousePlan(['layer1.0.conv1'], cell_num_ratio=1000)}
    refused(timm.create_model('resnet18'), many, 'or fewer')
    with torch.device('meta'):
        net = timm.create_model('resnet18')
    kernelize(net, many, max_weights=math.inf)


@pytest.mark.parametrize(
    ('name', 'plan', 'norm_layer'),
    [
        ('resnet18', lambda net: resnet_plan(net, cell_num_ratio=4.0), nn.BatchNorm1d),
        ('resnet18', lambda net: resnet_plan(net, nonlocal_basis_ratio=0.1), nn.LayerNorm),
        ('mobilenetv2_050', lambda net: mobilenetv2_plan(net, 'shared'), nn.BatchNorm1d),
        ('mobilenetv2_050', lambda net: {'head': WarehousePlan(['classifier'], 0.5, 0.025)}, nn.BatchNorm1d),
    ],
)
def test_sizes_are_those_of_what_is_made(name, plan, norm_layer):
    with torch.device('meta'):
        net = timm.create_model(name)
        sizes = plan_sizes(net, plan(net), norm_layer)
        kernelize(net, plan(net), norm_layer)
    layers = [module for module in net.modules() if isinstance(module, KWLayer)]
    assert sizes.attention_weights == sum(p.numel() for layer in layers for p in layer.attention.parameters())
    assert [w.cell_weights for w in sizes.warehouses] == [w.weight.numel() for w in net.warehouses.values()]
    assert [w.cells for w in sizes.warehouses] == [len(w.weight) for w in net.warehouses.values()]
    assert sum(w.mixtures for w in sizes.warehouses) == sum(layer.attention.num_mixtures for layer in layers)
    assert sizes.static_weights == sum(math.prod(layer.spec.kernel_shape) for layer in layers)
    lines = str(sizes).splitlines()
    assert len(lines) == len(sizes.warehouses) + 2
    assert len({len(line) for line in lines}) == 1
    assert f'{sizes.attention_weights:,}' in lines[-1]


def use(conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    return F.conv2d(x, conv.weight, conv.bias)


class Direct(nn.Module):
    layer = 'conv'

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, self.conv.weight)


class InAMethod(Direct):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.apply_conv(self.conv, x)

    def apply_conv(self, conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, conv.weight)


class InAFunction(Direct):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return use(self.conv, x)


class UnderAnotherName(Direct):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        conv = self.conv
        weight = conv.weight.flip(0)
        return F.conv2d(x, weight)


class ByGetattr(Direct):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return getattr(self, 'conv')._conv_forward(x, x, None)  # noqa: B009


class Inherited(InAFunction):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 1


class InALoop(nn.Module):
    layer = 'convs.0'

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(4, 4, 3)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i, conv in enumerate(self.convs):
            x = F.conv2d(x, conv.weight) + i
        return x


class Grandparent(nn.Module):
    layer = 'inner.conv'

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Module()
        self.inner.conv = nn.Conv2d(4, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(self.inner.conv.weight.dtype)


@pytest.mark.parametrize(
    'reader', [Direct, InAMethod, InAFunction, UnderAnotherName, ByGetattr, Inherited, InALoop, Grandparent]
)
def test_a_layer_that_is_read(reader):
    refused(reader(), {'a': WarehousePlan([reader.layer])}, f"'{reader.layer}', but .*{reader.__name__}.* reads its")


@pytest.mark.parametrize(
    ('net', 'layer'),
    [
        (nn.TransformerEncoderLayer(32, 4, 64), 'self_attn.out_proj'),
        (nn.TransformerEncoderLayer(32, 4, 64), 'linear1'),
        (nn.MultiheadAttention(32, 4), 'out_proj'),
    ],
)
def test_layers_of_torch_that_are_read(net, layer):
    refused(net, {'a': WarehousePlan([layer])}, 'reads its')


@pytest.mark.parametrize(
    ('name', 'layer', 'is_read'),
    [
        ('swinv2_tiny_window8_256', 'layers.0.blocks.0.attn.qkv', True),
        ('beit_base_patch16_224', 'blocks.0.attn.qkv', True),
        ('swinv2_tiny_window8_256', 'layers.0.blocks.0.mlp.fc1', False),
        ('vit_tiny_patch16_224', 'blocks.0.attn.qkv', False),
    ],
)
def test_layers_of_timm_that_are_read(name, layer, is_read):
    with torch.device('meta'):
        net = timm.create_model(name)
    if is_read:
        refused(net, {'a': WarehousePlan([layer])}, 'reads its')
    else:
        kernelize(net, {'a': WarehousePlan([layer])})
        assert isinstance(net.get_submodule(layer), KWLinear)


class Half(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / 2


def with_hook() -> nn.Module:
    conv = nn.Conv2d(4, 4, 3)
    conv.register_forward_hook(lambda module, args, output: output)
    return conv


def parametrized() -> nn.Module:
    conv = nn.Conv2d(4, 4, 3)
    nn.utils.parametrize.register_parametrization(conv, 'weight', Half())
    return conv


class OwnForward(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


class Renamed(nn.Conv2d):
    """Computes as its base does."""


LAYERS = {
    'parametrized': (parametrized, 'weight is parametrized.*remove_parametrizations'),
    'orthogonal': (lambda: parametrizations.orthogonal(nn.Linear(4, 4)), 'is parametrized'),
    'new weight_norm': (lambda: parametrizations.weight_norm(nn.Conv2d(4, 4, 3)), 'is parametrized'),
    'old weight_norm': (lambda: weight_norm(nn.Conv2d(4, 4, 3)), 'computed from other tensors.*remove_weight_norm'),
    'old spectral_norm': (lambda: spectral_norm(nn.Linear(4, 4)), 'computed from other tensors'),
    'pruned': (lambda: prune.l1_unstructured(nn.Conv2d(4, 4, 3), 'weight', 0.5), 'prune.remove'),
    'pruned bias': (lambda: prune.l1_unstructured(nn.Conv2d(4, 4, 3), 'bias', 0.5), 'prune.remove'),
    'standardized': (lambda: StdConv2d(4, 4, 3), 'StdConv2d has no KW counterpart: it uses its weight'),
    'scaled': (lambda: ScaledStdConv2d(4, 4, 3), 'ScaledStdConv2d has no KW counterpart'),
    'transposed': (lambda: nn.ConvTranspose2d(4, 4, 3), 'ConvTranspose2d has no KW counterpart'),
    'lazy': (lambda: nn.LazyConv2d(4, 3), 'no size yet; run the network once'),
    'lazy linear': (lambda: nn.LazyLinear(4), 'no size yet'),
    'own forward': (OwnForward, 'OwnForward has no KW counterpart: it uses its weight in a way of its own'),
    'quantization aware': (
        lambda: torch.ao.nn.qat.Conv2d(4, 4, 3, qconfig=torch.ao.quantization.get_default_qat_qconfig()),
        'has no KW counterpart: .*quantized',
    ),
    'quantized': (lambda: torch.ao.nn.quantized.Linear(4, 4), 'has no KW counterpart'),
    'hooks': (with_hook, 'has hooks'),
}


@pytest.mark.parametrize('case', LAYERS)
def test_layers(case):
    make, message = LAYERS[case]
    net = nn.Sequential(make() if case != 'own forward' else OwnForward(4, 4, 3))
    layer = net[0]
    with pytest.raises(ValueError, match=f"'a' plans the layer '0', but .*{message}"):
        kernelize(net, {'a': WarehousePlan(['0'])})
    assert net[0] is layer
    assert not hasattr(net, 'warehouses')


def test_classes_that_compute_as_plain_ones_are_taken():
    net = nn.Sequential(Renamed(4, 4, 3), nn.Flatten(), AutocastLinear(4, 4))
    kernelize(net, {'a': WarehousePlan(['0']), 'b': WarehousePlan(['2'])})
    assert [type(net[0]), type(net[2])] == [KWConv2d, KWLinear]


def test_tied_weights():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    net[2].weight = net[0].weight
    refused(net, {'a': WarehousePlan(['0'])}, 'its weight is tied to 2.weight')
    refused(net, {'a': WarehousePlan(['1', '2'])}, "'2', but its weight is tied to 0.weight")
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].bias.data = net[0].bias.data
    refused(net, {'a': WarehousePlan(['1'])}, 'its bias is tied to 0.bias')
    layer = nn.Linear(4, 4)
    refused(nn.Sequential(layer, nn.ReLU(), layer), {'a': WarehousePlan(['0'])}, 'the same layer is also 2')


def test_what_is_not_a_plan():
    net = nn.Sequential(nn.Linear(4, 4))
    refused(net, {'a': ['0']}, 'needs a WarehousePlan')
    refused(net, {'a': WarehousePlan('0')}, "needs a list of layers, got the string '0'")


def test_the_first_use_of_a_weight_that_nobody_could_see_coming():
    """Where no source shows who reads a layer, the layer says so itself."""
    net = nn.Sequential(nn.Conv2d(4, 4, 3))
    kernelize(net, {'a': WarehousePlan(['0'])})
    assert not hasattr(net[0], 'weight')
    with pytest.raises(AttributeError, match=r'KWConv2d\(4, 4, .* has no weight, .*: call the layer .*warehouse'):
        getattr(copy.deepcopy(net)[0], 'weight')  # noqa: B009


def test_exported_names():
    assert kw_timm.plan_sizes is plan_sizes
    assert isinstance(kw_timm.plan_sizes(nn.Sequential(nn.Linear(4, 4)), {}), kw_timm.PlanSizes)
