"""Tools that count operations and parameters, and those that look for a classifier's weight."""

import io
import math
import re

import pytest
import timm
import torch
from networks import images, network
from timm.layers import TestTimePoolHead
from torch.utils.flop_counter import FlopCounterMode

import kw_timm
from kw_timm.inference import mixing_work
from kw_timm.layers import KWAttention, KWConv2d, KWLinear, Warehouse, straightforward

NAME, STATIC = 'kw1x_mobilenetv2_050', 'mobilenetv2_050'


def flops(call) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def attention_flops(model: torch.nn.Module, batch: int) -> int:
    attentions = [module for module in model.modules() if isinstance(module, KWAttention)]
    return sum(2 * batch * (a.fc1.weight.numel() + a.fc2.weight.numel()) for a in attentions)


@pytest.fixture(scope='module')
def expected() -> int:
    """The static network's operations, the mixing's and the attentions'."""
    model, static = network(NAME), timm.create_model(STATIC).eval()
    return flops(lambda: static(images(2, 32))) + int(mixing_work(model, 2).flops) + attention_flops(model, 2)


def test_operations_of_a_network(expected):
    model, x = network(NAME), images(2, 32)
    assert flops(lambda: model(x)) == expected
    with torch.no_grad():
        assert flops(lambda: model(x)) == expected
        fast = kw_timm.optimize_for_inference(model, memory_budget=0)
        assert flops(lambda: fast(x)) == expected
    with straightforward():
        assert flops(lambda: model(x)) == expected


def test_operations_of_a_training_step():
    """Backward makes the kernels again, and takes the gradients of coefficients, cells, kernels and input."""
    layer = KWConv2d(8, 8, 3, padding=1, bias=False, warehouse=Warehouse([(8, 8, 3, 3)])).eval()
    x = torch.randn(2, 8, 6, 6, requires_grad=True)
    mixing, conv = 2 * 2 * 9 * 9 * 64, 2 * 2 * 36 * 8 * 8 * 9
    step = flops(lambda: layer(x).sum().backward())
    attention = step - (mixing + conv) - (mixing + 2 * mixing + 2 * conv)
    assert 0 < attention <= 3 * attention_flops(layer, 2)


def test_mixing_has_a_line_of_its_own():
    model = network(NAME)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(images(2, 32))
    counts = {str(operator): count for operator, count in counter.get_flop_counts()['Global'].items()}
    assert counts['kw_timm.mix_cells'] == mixing_work(model, 2).flops


@pytest.mark.parametrize('kind', ['convolution', 'linear'])
def test_hooks_for_counters_by_type(kind):
    if kind == 'linear':
        layer = KWLinear(8, 8, warehouse=Warehouse([(8, 8, 1)])).eval()
        x, conv, mixing = torch.randn(2, 5, 8), 2 * 5 * 64, 2 * 64
    else:
        layer = KWConv2d(8, 8, 3, padding=1, warehouse=Warehouse([(8, 8, 3, 3)])).eval()
        x, conv, mixing = torch.randn(2, 8, 6, 6), 2 * 36 * 64 * 9, 2 * 9 * 9 * 64
    layer.__flops__ = 0
    kw_timm.flop_hooks()[type(layer)](layer, (x,), layer(x))
    assert layer.__flops__ == conv + mixing
    assert layer.__params__ == sum(p.numel() for name, p in layer.named_parameters() if 'warehouse' not in name)


def test_mmcv():
    complexity = pytest.importorskip('mmcv.cnn').get_model_complexity_info
    pytest.importorskip('kw_mmdet')
    model, static = network(NAME), timm.create_model(STATIC).eval()
    table = io.StringIO()
    ours, parameters = complexity(model, (3, 32, 32), as_strings=False, ost=table)
    theirs, _ = complexity(static, (3, 32, 32), print_per_layer_stat=False, as_strings=False)
    # It counts norms, biases and activations too, by rules of its own.
    extra = (mixing_work(model, 1).flops + attention_flops(model, 1)) / 2
    assert ours == pytest.approx(theirs + extra, rel=0.02)
    assert parameters == sum(p.numel() for p in model.parameters())
    # The whole network's line: all parameters but those of timm's norms, whose type it does not know; cells once.
    share = re.search(r'([\d.]+)% Params', table.getvalue())
    assert 99 < float(share[1]) <= 100


def test_ptflops():
    ptflops = pytest.importorskip('ptflops')
    model, static = network(NAME), timm.create_model(STATIC).eval()
    options = dict(print_per_layer_stat=False, as_strings=False, backend='pytorch')
    ours, parameters = ptflops.get_model_complexity_info(
        model, (3, 32, 32), custom_modules_hooks=kw_timm.flop_hooks(), **options
    )
    theirs, _ = ptflops.get_model_complexity_info(static, (3, 32, 32), **options)
    extra = (mixing_work(model, 1).flops + attention_flops(model, 1)) / 2
    assert ours == pytest.approx(theirs + extra, rel=0.02)
    assert parameters == sum(p.numel() for p in model.parameters())


def test_fvcore(expected):
    nn = pytest.importorskip('fvcore.nn')
    model, x = network(NAME), images(2, 32)
    # It counts multiply-adds, and something for norms and pools.
    total = nn.FlopCountAnalysis(model, x).unsupported_ops_warnings(False).total()
    assert total == pytest.approx(expected / 2, rel=0.05)
    assert nn.parameter_count(model)[''] == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize('name', ['kw1x_mobilenetv2_050', 'kw1d2x_mobilenetv2_050'])
def test_torchinfo_counts_parameters_once(name):
    torchinfo = pytest.importorskip('torchinfo')
    model = network(name)
    total = sum(p.numel() for p in model.parameters())
    assert torchinfo.summary(model, input_size=(2, 3, 32, 32), verbose=0).total_params == total
    assert sum(p.numel() for p in model.parameters()) == total  # And leaves nothing behind.


@pytest.mark.parametrize('name', ['kw1x_mobilenetv2_050', 'kw1d2x_mobilenetv2_050'])
def test_torchinfo_counts_mixing(name):
    """Two operations for each of FlopCounterMode's; that leaves norms and biases out, which torchinfo counts."""
    torchinfo = pytest.importorskip('torchinfo')
    model, x = network(name), images(2, 64)
    summary = torchinfo.summary(model, input_data=x, verbose=0)
    before, text = summary.total_mult_adds, str(summary)
    counted = kw_timm.count_mult_adds(kw_timm.count_mult_adds(summary))
    assert counted is summary
    assert str(counted) != text
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        model(x)
    assert before < 0.2 * flops.get_total_flops() / 2
    assert counted.total_mult_adds == pytest.approx(flops.get_total_flops() / 2, rel=0.02)


def test_the_weight_of_a_kw_classifier():
    model = network('kw1d2x_mobilenetv2_050')
    message = 'KWLinear.in_features=1280.* has no weight, because its kernel is made anew for every sample'
    with pytest.raises(AttributeError, match=f'{message}.*test-time pooling'):
        TestTimePoolHead(model, original_pool=2)
    assert model.get_classifier().bias.shape == (1000,)
    assert not hasattr(model.get_classifier(), 'weight')
    assert model(images(1, 32)).shape == (1, 1000)


def test_test_time_pooling_of_a_static_classifier():
    head = TestTimePoolHead(network(NAME), original_pool=1)
    assert head(images(1, 96)).shape == (1, 1000)


def test_cfg_names_what_is_there():
    for name in ('kw1d2x_mobilenetv2_050', NAME, 'kw1d4x_resnet18'):
        model = network(name)
        weight = model.get_submodule(model.default_cfg['classifier']).weight
        assert math.isfinite(float(weight.sum()))
