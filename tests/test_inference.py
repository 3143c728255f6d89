"""Networks optimized for inference: the same outputs, their memory, their cost, and the network they were made from."""

import copy
import io
import logging
import pickle
from collections import OrderedDict
from pathlib import Path

import pytest
import timm
import torch
from networks import SMALLEST, SPECIAL, images, lively, network
from torch import nn
from torch.export import Dim

import kw_timm
from kw_timm import WarehousePlan, kernelize, optimization_report, optimize_for_inference
from kw_timm.layers import KWConv2d, KWLayer, Warehouse
from kw_timm.ops import dynamic_conv

CONFIG = Path(__file__).parents[1] / 'configs/shapes/mask_rcnn_kw1x_mobilenetv2_050_fpn_shapes.py'
# Layers of all kinds; the plan below makes some from bases, some from cells.
KINDS = dict(
    stem=nn.Conv2d(3, 16, 3, stride=2, padding=1),
    same=nn.Conv2d(16, 16, (2, 4), padding='same'),
    depthwise=nn.Conv2d(16, 16, 3, groups=16),
    norm=nn.BatchNorm2d(16),
    first=nn.Conv2d(16, 16, 3, padding=1, bias=False),
    norm2=nn.BatchNorm2d(16),
    relu=nn.ReLU(),
    second=nn.Conv2d(16, 16, 3, dilation=2),
    pointwise=nn.Conv2d(16, 32, 1),
    pool=nn.AdaptiveAvgPool2d(1),
    flatten=nn.Flatten(),
    head=nn.Linear(32, 4),
)
DOUBLED = dict(cell_num_ratio=2, cell_inplane_ratio=0.5, cell_outplane_ratio=0.5)
PLAN = {
    'narrow': WarehousePlan(['stem'], cell_outplane_ratio=0.5),
    'even': WarehousePlan(['same'], **DOUBLED),
    'thin': WarehousePlan(['depthwise'], 4),
    'shared': WarehousePlan(['first', 'second'], **DOUBLED),
    'last': WarehousePlan(['pointwise'], 1, 0.5, 0.5),
    'head': WarehousePlan(['head'], 2),
}


@torch.no_grad()
def with_lively_norms(net):
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_(std=0.1)
    return net


def small(norm_layer=nn.BatchNorm1d, temperature=0.0):
    torch.manual_seed(0)
    net = nn.Sequential(OrderedDict(copy.deepcopy(KINDS)))
    kernelize(net, PLAN, norm_layer)
    kw_timm.set_temperature(net, temperature)
    return with_lively_norms(lively(net))


@torch.no_grad()
def difference(ours, theirs, x):
    """Relative difference of outputs, the largest of them."""
    ours, theirs = ours(x), theirs(x)
    ours, theirs = ([t] if isinstance(t, torch.Tensor) else t for t in (ours, theirs))
    return max(float((a - b).norm() / b.norm()) for a, b in zip(ours, theirs, strict=True))


def assert_equal(fast, net, size=64, rtol=1e-9):
    for batch in (1, 3):
        assert difference(fast, net, images(batch, size).to(next(net.buffers()).dtype)) < rtol


@pytest.mark.parametrize('name', SPECIAL)
def test_networks(name):
    """Float64 takes torch's way through the attention, float32 the compiled one."""
    net = with_lively_norms(network(name)).double()
    # The two whose bases take long to make stay below the default budget.
    budgets = [(0, 1), ('50MB', 8), *([] if name in (SMALLEST[2], 'kw1d2x_resnet50') else [(None, 1), (None, 8)])]
    for budget, batch_size in budgets:
        fast = optimize_for_inference(net, batch_size=batch_size, memory_budget=budget)
        assert_equal(fast, net)
        assert bool(optimization_report(fast).from_bases) >= (batch_size == 8)
        assert_equal(copy.deepcopy(fast).float(), copy.deepcopy(net).float(), rtol=2e-3)


@pytest.mark.parametrize('norm_layer', [nn.BatchNorm1d, nn.LayerNorm])
@pytest.mark.parametrize('temperature', [0.0, 0.4])
@pytest.mark.parametrize('chunk', [1, 2**40])
def test_layers_of_all_kinds(norm_layer, temperature, chunk, monkeypatch):
    monkeypatch.setattr(dynamic_conv, '_CHUNK_BYTES', chunk)
    net = small(norm_layer, temperature).double()
    for batch_size, budget in ((1, 0), (1, None), (64, None)):
        fast = optimize_for_inference(net, batch_size=batch_size, memory_budget=budget)
        report = optimization_report(fast)
        assert bool(report.from_bases) == (batch_size == 64 and not temperature)
        assert report.from_cells
        assert_equal(fast, net, 16)
        assert_equal(optimize_for_inference(nn.Sequential(nn.Identity(), net), memory_budget=budget), net, 16)
        assert fast.second(torch.empty(0, 16, 7, 7, dtype=torch.double)).shape == (0, 16, 3, 3)
        assert_equal(optimize_for_inference(net.float(), memory_budget=budget), net, 16, 1e-4)
        net.double()


def test_norms_that_cannot_be_folded():
    net = small()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.running_mean = module.running_var = None
    net = net.double()
    fast, x = optimize_for_inference(net), images(4, 16).double()
    assert difference(fast, net, x) < 1e-9
    assert difference(fast, small().double(), x) > 1e-6


@pytest.mark.parametrize('feature_cls', ['getter', 'hook'])
@pytest.mark.parametrize('name', SMALLEST)
def test_feature_extractors(name, feature_cls):
    torch.manual_seed(0)
    net = lively(timm.create_model(name, features_only=True, feature_cls=feature_cls, out_indices=(0, 1, 2))).double()
    assert_equal(optimize_for_inference(net, batch_size=8, memory_budget='20MB'), net)


def test_detector():
    pytest.importorskip('mmdet', reason='needs MMDetection')
    import kw_mmdet  # noqa: F401 (registers the backbone)
    from mmcv import Config
    from mmdet.models import build_detector

    torch.manual_seed(0)
    logging.disable(logging.INFO)
    detector = build_detector(Config.fromfile(str(CONFIG)).model)
    detector.init_weights()
    logging.disable(logging.NOTSET)
    lively(detector.backbone)
    detector = detector.eval().double()
    fast = optimize_for_inference(detector, batch_size=8, memory_budget='20MB')
    assert len(optimization_report(fast).from_bases) > 5
    x, shape = images().double(), (64, 64, 3)
    assert difference(fast.extract_feat, detector.extract_feat, x) < 1e-9
    metas = [dict(img_shape=shape, pad_shape=shape, ori_shape=shape, scale_factor=1.0, flip=False)]
    with torch.no_grad():
        ours, theirs = (
            d.float()(return_loss=False, rescale=True, img=[x[:1].float()], img_metas=[metas]) for d in (fast, detector)
        )
    assert [len(boxes) for boxes in ours[0][0]] == [len(boxes) for boxes in theirs[0][0]]
    assert sum(len(boxes) for boxes in ours[0][0]) > 0


@pytest.mark.parametrize('norm_layer', [nn.BatchNorm1d, nn.LayerNorm])
@pytest.mark.parametrize('training', [True, False])
def test_the_given_network_stays_as_it_was(norm_layer, training):
    net = small(norm_layer).train(training)
    net.stem.attention.fc1.weight.requires_grad_(False)
    before = {name: (value.clone(), value.requires_grad) for name, value in net.state_dict(keep_vars=True).items()}
    for budget in (0, None):
        fast = optimize_for_inference(net, memory_budget=budget)
        assert not any(module.training for module in fast.modules())
        assert not any(t.requires_grad for t in (*fast.parameters(), *fast.buffers()))
        assert not any(isinstance(module, KWLayer | Warehouse) for module in fast.modules())
        assert all(module.training == training for module in net.modules())
        after = net.state_dict(keep_vars=True)
        assert {name: value.requires_grad for name, value in after.items()} == {n: b[1] for n, b in before.items()}
        assert all(torch.equal(value, before[name][0]) for name, value in after.items())
        ours, theirs = ({t.untyped_storage().data_ptr() for t in (*n.parameters(), *n.buffers())} for n in (fast, net))
        assert not ours & theirs


def test_shares_no_memory_with_layers_of_one_channel():
    net = nn.Sequential(nn.Conv2d(1, 8, 3))
    kernelize(net, {'w': WarehousePlan(['0'])}, nn.LayerNorm)
    x = torch.randn(2, 1, 8, 8)
    fast = optimize_for_inference(net.eval())
    with torch.no_grad():
        before = fast(x)
        for parameter in net.parameters():
            parameter.fill_(1)
        assert torch.equal(fast(x), before)


def saved(net):
    buffer = io.BytesIO()
    torch.save(net, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)


@pytest.mark.parametrize('duplicate', [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net)), saved])
def test_copies(duplicate):
    fast, x = optimize_for_inference(small(), memory_budget=0), images(2, 16)
    other = duplicate(fast)
    expected = fast(x)
    assert torch.equal(other(x), expected)
    assert str(optimization_report(other)) == str(optimization_report(fast))
    other.warehouses.shared.cells.zero_()
    for layer in (other.first, other.second):  # both read it
        assert (layer(images(1, 7, 16)).flatten(2).std(-1) < 1e-6).all()
    assert torch.equal(fast(x), expected)


def test_is_not_for_training():
    fast = optimize_for_inference(small()).train()
    with pytest.raises(RuntimeError, match=r'cannot be trained; call \.eval\(\)'):
        fast(images(2, 16))


@pytest.mark.parametrize(
    ('model', 'arguments', 'message'),
    [
        (lambda: nn.Linear(1, 1), {}, 'Linear has no KW layer'),
        (lambda: optimize_for_inference(small()), {}, 'Sequential was optimized before'),
        (small, dict(batch_size=0), 'batch_size must be at least 1, got 0'),
        (small, dict(memory_budget='lots'), r"memory_budget='lots' is not a memory size\. Use .*'2GB'"),
        (small, dict(memory_budget=-1), 'memory_budget=-1 is not a memory size'),
        (small, dict(storage=torch.float16), r'storage=torch\.float16 is not supported\. Use torch\.bfloat16'),
        (lambda: small().double(), dict(storage=torch.int8), r'float32 networks; call model\.float\(\)'),
    ],
)
def test_bad_arguments(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        optimize_for_inference(model(), **arguments)


@pytest.mark.parametrize(
    ('shape', 'message'),
    [
        ((2, 4, 16, 16), r'batched input \(B, 3, .*got shape \(2, 4, 16, 16\)'),
        ((2, 2, 16, 16), r'batched input \(B, 3, .*got shape \(2, 2, 16, 16\)'),
        ((3, 16, 16), r'batched input .*got shape \(3, 16, 16\).*unsqueeze'),
        ((2, 3, 0, 16), 'no pixels'),
    ],
)
def test_bad_inputs(shape, message):
    with pytest.raises(ValueError, match=message):
        optimize_for_inference(small())(torch.zeros(shape))


@torch.no_grad()
@pytest.mark.parametrize('kw', [{}, dict(memory_budget=0), dict(memory_budget=0, storage=torch.bfloat16)])
def test_part_of_a_network_without_its_warehouse(kw):
    net = small()
    part = nn.Sequential(net.first, net.second)
    x = torch.randn(2, net.first.in_channels, 8, 8)
    fast = optimize_for_inference(part, **kw)
    assert difference(fast, part, x) < (1e-2 if 'storage' in kw else 1e-5)
    # What bases do not replace comes along, once, and moves with the part.
    stores = [name for name in fast.state_dict() if name.endswith('store.cells')]
    assert stores == [name for name, _ in fast.named_buffers() if name.endswith('store.cells')]
    assert len(stores) == 1
    assert all(buffer.is_meta for buffer in fast.to('meta').buffers())


@torch.no_grad()
@pytest.mark.parametrize('kw', [{}, dict(memory_budget=0, storage=torch.int8)])
def test_compiling(kw):
    torch._dynamo.reset()
    fast = optimize_for_inference(small(), batch_size=8, **kw)
    graph = torch.compile(fast, fullgraph=True, backend='aot_eager')
    for batch in (2, 1, 5):
        torch.testing.assert_close(graph(images(batch, 16)), fast(images(batch, 16)))


@torch.no_grad()
def test_export():
    fast, x = optimize_for_inference(small(), batch_size=8).double(), images(2, 16).double()
    program = torch.export.export(fast, (x,)).module()
    assert difference(program, fast, x) < 1e-9


@torch.no_grad()
def test_export_with_any_batch_size():
    fast, x = optimize_for_inference(small(), batch_size=8).double(), images(2, 16).double()
    shapes = ({0: Dim('batch', min=1, max=64)},)
    program = torch.export.export(fast, (x,), dynamic_shapes=shapes).module()
    assert_equal(program, fast, 16)


@torch.no_grad()
def test_trace():
    fast = optimize_for_inference(small()).double()
    traced = torch.jit.trace(fast, images(2, 16).double(), check_trace=False)
    x = images(2, 16, seed=3).double()
    torch.testing.assert_close(traced(x), fast(x))


@torch.no_grad()
@pytest.mark.parametrize('chunk', [1, 2**40])
def test_autocast(chunk, monkeypatch):
    monkeypatch.setattr(dynamic_conv, '_CHUNK_BYTES', chunk)
    net, x = small(), images(3, 16)
    expected = net(x)
    for batch_size, budget in ((1, 0), (64, None)):
        fast = optimize_for_inference(net, batch_size=batch_size, memory_budget=budget)
        with torch.autocast('cpu', torch.bfloat16):
            ours = fast(x)
        assert ours.dtype == torch.bfloat16
        assert (ours - expected).norm() < 0.05 * expected.norm()
        assert (fast.bfloat16()(x.bfloat16()) - expected).norm() < 0.05 * expected.norm()


class Owner(nn.Module):
    def __init__(self, net, warehouse):
        super().__init__()
        self.net, self.warehouse = net, warehouse

    def forward(self, x):
        return self.net(x)


class Backwards(nn.Sequential):
    def forward(self, x):
        for module in reversed(self):
            x = module(x)
        return x


@pytest.mark.parametrize('case', ['layer used twice', 'norm used twice', 'norm first'])
def test_norms_that_are_not_behind_one_layer_alone(case):
    torch.manual_seed(0)
    warehouse = Warehouse([(8, 8, 3, 3)])
    layer = KWConv2d(8, 8, 3, padding=1, warehouse=warehouse)
    static, one, two = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.BatchNorm2d(8)
    net = {
        'layer used twice': nn.Sequential(layer, one, layer, two),
        'norm used twice': nn.Sequential(layer, one, static, one),
        'norm first': Backwards(layer, one),
    }[case]
    net = with_lively_norms(lively(Owner(net, warehouse), 8)).double()
    assert difference(optimize_for_inference(net), net, images(2, 8, 8).double()) < 1e-9
