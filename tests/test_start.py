"""How KW layers begin: alive, as published, or as the static layers were."""

import copy
import math

import pytest
import timm
import torch
from networks import images
from torch import nn

import kw_timm
from kw_timm import WarehousePlan, kernelize, load_static, set_temperature
from kw_timm.layers import KWAttention, KWConv2d, KWLayer, Warehouse
from kw_timm.layers.partition import partition_kernels
from kw_timm.layers.start import ALIVE
from kw_timm.models.kw_convnext import convnext_plan
from kw_timm.models.kw_mobilenetv2 import mobilenetv2_plan
from kw_timm.models.kw_resnet import resnet_plan
from kw_timm.ops.straightforward import assemble_kernels
from kw_timm.random_weights import fit_norms
from kw_timm.takeover import FREE
from kw_timm.weights import WeightsMismatchError


def kernels(layer: KWLayer, x: torch.Tensor) -> torch.Tensor:
    """The kernels that a layer makes for its inputs."""
    with torch.no_grad():
        return assemble_kernels(layer.attention(x), layer.__dict__['warehouse'].weight, layer.spec)


def trained(name: str, **kwargs) -> nn.Module:
    """A static network of whose weights none is as it was initialized, in float64 and eval mode."""
    torch.manual_seed(0)
    network = timm.create_model(name, **kwargs)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter) + 0.3 * (not parameter.any()))
    return fit_norms(network, images(4)).double().eval()


@pytest.mark.parametrize('budget', [0.25, 0.5, 1, 4])
@pytest.mark.parametrize('temperature', [0, 1])
def test_kernels_vary_as_static_ones(budget, temperature):
    torch.manual_seed(0)
    statics = nn.ModuleList([nn.Conv2d(64, 64, 3), nn.Conv2d(64, 128, 1)])
    stds = (0.05, 0.2)
    for static, std in zip(statics, stds, strict=True):
        nn.init.normal_(static.weight, std=std)
    net = copy.deepcopy(statics)
    kernelize(net, {'all': WarehousePlan(['0', '1'], budget, 0.25, 0.25)})
    set_temperature(net, temperature)
    x = torch.rand(8, 64, 4, 4)
    for layer, std in zip(net, stds, strict=False):
        made = kernels(layer, x)
        if budget >= 1 or temperature == 0:
            # The temperature leaves out what varies with the input, which is a tenth.
            assert made.std().item() == pytest.approx(std, rel=1.5 * ALIVE)
        if temperature == 0:
            between = made.std(0).mean().item()
            assert 1e-5 * std < between < 0.1 * std


def test_kernels_begin_as_the_static_layers():
    torch.manual_seed(0)
    static = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Conv2d(16, 8, 3))
    net = kernelize_copy(static, {'all': WarehousePlan(['0', '1'], 2)})
    for before, layer in zip(static, net, strict=False):  # Behind the layers come the warehouses.
        made = kernels(layer, torch.rand(2, layer.in_channels, 4, 4))[0]
        assert torch.nn.functional.cosine_similarity(made.flatten(), before.weight.flatten(), dim=0) > 0.99
        assert torch.equal(layer.bias, before.bias)


@pytest.mark.parametrize('name', ['kw1x_mobilenetv2_050', 'kw4x_mobilenetv2_050', 'kw1d2x_mobilenetv2_050'])
def test_signals_survive_without_statistics(name):
    """Levels of a new network in eval mode, at temperature 0: of the size of a static network's."""
    torch.manual_seed(0)
    static = timm.create_model('mobilenetv2_050', features_only=True).eval()
    torch.manual_seed(0)
    network = timm.create_model(name, features_only=True).eval()
    for theirs, ours in zip(static(images(2, 96)), network(images(2, 96)), strict=True):
        assert 0.3 < ours.std() / theirs.std() < 3.5


def test_same_network_however_often_it_is_drawn():
    drawn = []
    for _ in range(2):
        torch.manual_seed(3)
        drawn.append(timm.create_model('kw1d2x_mobilenetv2_050').state_dict())
    assert all(torch.equal(drawn[0][key], drawn[1][key]) for key in drawn[0])


@pytest.mark.parametrize('budget', [0.5, 1, 4])
def test_published_cells(budget):
    """Kaiming normal (fan out) over each layer's own slice."""
    torch.manual_seed(0)
    warehouse = Warehouse([(64, 32, 2, 2), (128, 64, 2, 2)], budget, 0.25, 0.25, init='published')
    for layer in warehouse.partition.layers:
        own = warehouse.weight[layer.start : layer.stop].detach()
        expected = math.sqrt(2 / (len(own) * own.shape[1]))
        assert own.std().item() == pytest.approx(expected, rel=4 / math.sqrt(2 * own.numel()))
        assert abs(own.mean().item()) < 4 * expected / math.sqrt(own.numel())


def test_published_attention():
    torch.manual_seed(0)
    partition = partition_kernels([(64, 64, 3, 3), (64, 64, 3, 3)])
    attention = KWAttention(256, partition, 0, reduction=0.25, norm_layer=nn.LayerNorm, init='published')
    for linear in (attention.fc1, attention.fc2):
        assert linear.weight.std().item() == pytest.approx(math.sqrt(2 / linear.out_features), rel=0.05)
        assert not linear.bias.any()
    assert (attention.norm1.weight == 1).all()
    assert not attention.norm1.bias.any()
    basis = KWAttention(256, partition, 0, reduction=0.25, nonlocal_basis_ratio=0.5, init='published')
    assert basis.fc3.weight.std().item() == pytest.approx(math.sqrt(2 / basis.fc3.out_features), rel=0.15)
    assert not basis.basis_bias.any()
    assert basis.fc2.bias is None


def test_published_by_name():
    torch.manual_seed(0)
    published = timm.create_model('kw1d2x_mobilenetv2_050', init='published')
    attentions = [m for m in published.modules() if isinstance(m, KWAttention)]
    assert attentions
    assert all(not a.fc2.bias.any() for a in attentions)
    published.reset_classifier(5)
    assert not published.classifier.attention.fc2.bias.any()
    with pytest.raises(ValueError, match=r"init must be 'live' .* got 'kaiming'"):
        timm.create_model('kw1x_resnet18', init='kaiming')


@pytest.mark.parametrize('init', ['live', 'published'])
def test_reset_after_the_meta_device(init):
    with torch.device('meta'):
        layer = KWConv2d(16, 32, 2, warehouse=Warehouse([(32, 16, 2, 2)], 0.5, 0.25, 0.25, init=init))
        warehouse = layer.warehouse
    layer.to_empty(device='cpu')
    warehouse.to_empty(device='cpu')
    layer.attention.init_non_persistent_buffers()
    layer.attention.reset_parameters()
    warehouse.reset_parameters()
    made = kernels(layer.eval(), torch.rand(2, 16, 4, 4))
    assert made.isfinite().all()
    if init == 'live':
        assert made.std().item() == pytest.approx(math.sqrt(2 / (32 * 4)), rel=0.2)


def kernelize_copy(network: nn.Module, plan, **kwargs) -> nn.Module:
    network = copy.deepcopy(network)
    kernelize(network, plan, **kwargs)
    return network


STATICS = {
    'resnet18': (resnet_plan, {}),
    'mobilenetv2_050': (mobilenetv2_plan, {'pointwise': 'apart'}),
    'convnext_atto': (convnext_plan, {}),
}


@pytest.mark.parametrize('budget', [1, 2])
@pytest.mark.parametrize('name', STATICS)
def test_a_trained_network_is_kept_exactly(name, budget):
    static = trained(name, **({'conv_mlp': True} if 'convnext' in name else {}))
    make_plan, options = STATICS[name]
    norm = nn.LayerNorm if 'convnext' in name else nn.BatchNorm1d
    network = kernelize_copy(
        static, make_plan(static, cell_num_ratio=budget, **options), norm_layer=norm, weights='keep'
    )
    assert set(network.warehouses.errors.values()) == {0.0}
    x = images(3).double()
    torch.testing.assert_close(network(x), static(x), rtol=1e-12, atol=1e-12)
    static.train(), network.train()
    torch.manual_seed(1)
    expected = static(x)
    torch.manual_seed(1)
    given = network(x)
    torch.testing.assert_close(given, expected, rtol=1e-11, atol=1e-11)
    given.square().mean().backward()
    learning = [m.fc2.weight.grad.abs().max() > 0 for m in network.modules() if isinstance(m, KWAttention)]
    assert all(learning)
    assert all(w.weight.grad.abs().max() > 0 for w in network.warehouses.values())
    static.eval(), network.eval()
    torch.testing.assert_close(network.float()(x.float()), static.float()(x.float()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('free', FREE)
def test_free_cells_change_nothing_and_learn(free):
    """Three of four cells are needed by no mixture: whatever they begin as, outputs stay and gradients reach them."""
    torch.manual_seed(0)
    static = nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3)).double()
    network = kernelize_copy(static, {'all': WarehousePlan(['0', '2'], 4)}, weights='keep', free=free)
    x = torch.rand(4, 8, 7, 7).double()
    torch.testing.assert_close(network(x), static(x), rtol=1e-12, atol=1e-12)
    optimizer = torch.optim.SGD(network.parameters(), 1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        network(x).square().mean().backward()
        optimizer.step()
    assert (network.warehouses['all'].weight.grad.flatten(1).abs().amax(1) > 0).all()


def test_unknown_free_cells():
    with pytest.raises(ValueError, match=r"free must be one of 'random', .*, got 'ones'"):
        kernelize(nn.Sequential(nn.Conv2d(8, 8, 3)), {'a': WarehousePlan(['0'])}, weights='keep', free='ones')


def test_everything_static_is_untouched():
    static = trained('resnet18')
    before = copy.deepcopy(static.state_dict())
    network = kernelize_copy(static, {'one': WarehousePlan(['layer1.0.conv1', 'layer1.0.conv2'])}, weights='keep')
    after = network.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items() if key in after)
    assert all(torch.equal(value, before[key]) for key, value in static.state_dict().items())


@pytest.mark.parametrize('ratio', [1.0, 0.5])
def test_fewer_cells_make_the_nearest_kernels(ratio):
    """No other cells of that number, combined in whatever way, come nearer: compared with the singular values."""
    torch.manual_seed(0)
    static = nn.Sequential(nn.Conv2d(16, 16, 3, bias=False), nn.Conv2d(16, 32, 3, bias=False)).double()
    plan = {'all': WarehousePlan(['0', '1'], 0.5, 0.5, 0.5, nonlocal_basis_ratio=ratio)}
    network = kernelize_copy(static, plan, weights='keep').eval()
    pieces, made = [], []
    for name, before in static.named_children():
        layer = getattr(network, name)
        kernel = kernels(layer, torch.rand(2, layer.in_channels, 4, 4).double())
        torch.testing.assert_close(kernel[0], kernel[1], rtol=1e-12, atol=1e-12)
        error = (kernel[0] - before.weight).norm() / before.weight.norm()
        assert network.warehouses.errors[name] == pytest.approx(error.item(), rel=1e-6)
        scale = before.weight.square().mean().sqrt()
        made.append((kernel[0] - before.weight).square().sum() / scale**2)
        cut = before.weight.reshape(-1, 8, layer.in_channels // 8, 8, 9).permute(0, 2, 4, 1, 3).reshape(-1, 64)
        pieces.append(cut / scale)
    values = torch.linalg.svdvals(torch.cat(pieces).detach())
    least = values[len(network.warehouses['all'].weight) :].square().sum()
    assert sum(made).item() == pytest.approx(least.item(), rel=1e-6)


def test_kernels_of_low_rank_are_kept_by_few_cells():
    torch.manual_seed(0)
    static = nn.Sequential(nn.Conv2d(8, 64, 1), nn.Conv2d(64, 64, 1)).double()
    with torch.no_grad():
        basis = torch.randn(3, 8, 8, dtype=torch.double)
        for layer in static:
            groups = layer.in_channels // 8
            mixed = torch.einsum('oij,jab->oaib', torch.randn(8, groups, 3, dtype=torch.double), basis)
            layer.weight.copy_(mixed.reshape(layer.weight.shape))
    plan = {'all': WarehousePlan(['0', '1'], 0.5, cell_outplane_ratio=0.125)}
    network = kernelize_copy(static, plan, weights='keep')
    x = torch.rand(2, 8, 5, 5).double()
    torch.testing.assert_close(network(x), static(x), rtol=1e-9, atol=1e-9)


def test_keep_and_published_exclude_each_other():
    static = nn.Sequential(nn.Conv2d(8, 8, 3))
    with pytest.raises(ValueError, match="weights='keep' starts from the layers' weights"):
        kernelize(static, {'a': WarehousePlan(['0'])}, weights='keep', init='published')
    with pytest.raises(ValueError, match=r"weights must be 'new' .* or 'keep'"):
        kernelize(static, {'a': WarehousePlan(['0'])}, weights='old')
    assert isinstance(static[0], nn.Conv2d)


WRAPPINGS = {
    'bare': lambda weights: weights,
    'checkpoint': lambda weights: {'epoch': 3, 'state_dict': {f'module.{key}': v for key, v in weights.items()}},
    'detector': lambda weights: {
        'state_dict': {f'backbone.model.{key}': v for key, v in weights.items() if not key.startswith('classifier.')}
        | {'rpn_head.rpn_conv.weight': torch.zeros(3, 3, 1, 1)}
    },
}


@pytest.mark.parametrize('wrapping', WRAPPINGS)
def test_registered_variants_start_from_static_weights(wrapping, tmp_path):
    static = trained('mobilenetv2_050').float()
    file = tmp_path / 'static.pth'
    torch.save(WRAPPINGS[wrapping](static.state_dict()), file)
    # A detector has no classifier.
    classes = {'num_classes': 0} if wrapping == 'detector' else {}
    network = timm.create_model('kw1x_mobilenetv2_050', pretrained_static=file, **classes).double().eval()
    if classes:
        static.reset_classifier(0)
    x = images(2).double()
    torch.testing.assert_close(network(x), static.double()(x), rtol=1e-4, atol=1e-4)
    features = timm.create_model('kw1x_mobilenetv2_050', pretrained_static=str(file), features_only=True).eval()
    expected = static.float().forward_intermediates(x.float(), intermediates_only=True)
    torch.testing.assert_close(features(x.float())[-1], expected[-1], rtol=1e-3, atol=1e-3)


def test_convnext_starts_from_linear_layers():
    static = trained('convnext_tiny')
    network = timm.create_model('kw1x_convnext_tiny').double().eval()
    assert set(load_static(network, static.state_dict()).values()) == {0.0}
    x = images(1).double()
    torch.testing.assert_close(network(x), static(x), rtol=1e-11, atol=1e-11)


def test_static_weights_of_other_classes_leave_the_classifier(caplog):
    static = trained('resnet18').float()
    network = timm.create_model('kw1x_resnet18', num_classes=7).eval()
    classifier = network.fc.weight.clone()
    load_static(network, static.state_dict())
    assert 'The classifier stays new' in caplog.text
    assert torch.equal(network.fc.weight, classifier)
    x = images(2)
    torch.testing.assert_close(network.forward_features(x), static.forward_features(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ('weights', 'message'),
    [
        (
            lambda: timm.create_model('resnet50').state_dict(),
            r"not those of the static network .* 'layer2.0.downsample",
        ),
        (lambda: timm.create_model('kw1x_resnet18').state_dict(), r"KW network's, not a static one's; load them by"),
        (lambda: {'a': torch.ones(3)}, r"'bn1.weight' is missing|'conv1.weight' is missing"),
        (
            lambda: {k: v * math.nan for k, v in timm.create_model('resnet18').state_dict().items()},
            'NaN|not finite|nan',
        ),
    ],
)
def test_static_weights_that_do_not_fit_change_nothing(weights, message):
    network = timm.create_model('kw1x_resnet18')
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(WeightsMismatchError, match=message):
        load_static(network, weights())
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_static_weights_need_a_kw_network():
    with pytest.raises(ValueError, match='has no KW layer'):
        load_static(timm.create_model('resnet18'), 'resnet18')
    with pytest.raises(ValueError, match='not both'):
        timm.create_model('kw1x_resnet18', pretrained=True, pretrained_static='resnet18')
    with pytest.raises(FileNotFoundError):
        kw_timm.load_static(timm.create_model('kw1x_resnet18'), 'nowhere.pth')
