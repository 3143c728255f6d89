"""Kernels by way of bases: when they are, that nothing put into an attention is passed over, and what it costs."""

import math

import pytest
import timm
import torch
from networks import images
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from kw_timm import WarehousePlan, kernelize, mixing_work, optimize_for_inference
from kw_timm.layers import KWConv2d, Warehouse, kw_layers, straightforward
from kw_timm.ops import ConvSpec, taps
from kw_timm.ops.bases import bases_from_batch

BATCH = 40  # Many enough for the layer below.


@pytest.fixture
def used(monkeypatch):
    """The batches that kernels were made of bases for."""
    batches = []

    def spy(x, *rest):
        batches.append(len(x))
        return compute(x, *rest)

    compute = kw_layers.conv_from_bases
    monkeypatch.setattr(kw_layers, 'conv_from_bases', spy)
    return batches


def layer(**options):
    """One of several layers, of whose 288 cells each has 17 bases per mixture."""
    torch.manual_seed(0)
    net = nn.Module()
    net.warehouse = Warehouse([(8, 8, 3, 3)] * 8, cell_num_ratio=4)
    net.conv = KWConv2d(8, 8, 3, padding=1, warehouse=net.warehouse, index=1, **options)
    return net.double()


def inputs(batch=BATCH):
    return torch.randn(batch, 8, 4, 5, dtype=torch.double, generator=torch.Generator().manual_seed(1))


def assert_straightforward(conv, x, **tolerance):
    with straightforward():
        expected = conv(x)
    torch.testing.assert_close(conv(x), expected, **tolerance)


def test_choice():
    assert bases_from_batch(17, 17) == bases_from_batch(33, 17) == math.inf
    batches = [bases_from_batch(terms, 288) for terms in (17, 33, 65, 129, 257)]
    assert batches == sorted(batches)
    for terms, batch in zip((17, 33, 65), batches, strict=False):
        assert terms * (288 + batch) < 288 * batch  # Fewer operations.
        assert batch > terms


def test_large_batches_alone(used):
    conv = layer().conv.eval()
    least = bases_from_batch(17, 288)
    for batch in (1, least - 1, least, BATCH):
        assert_straightforward(conv, inputs(batch), rtol=1e-12, atol=1e-14)
    assert used == [least, BATCH]


def refused(change):
    return pytest.param(change, id=change.__name__)


def listen(attention):
    attention.register_forward_hook(lambda module, args, output: None)


def change_output(attention):
    attention.register_forward_hook(lambda module, args, output: 2 * output)


def change_logits(attention):
    attention.fc2.register_forward_hook(lambda module, args, output: output.clamp(-1, 1))


def prune_map(attention):
    prune.l1_unstructured(attention.fc2, 'weight', 0.5)


def parametrize_map(attention):
    parametrize.register_parametrization(attention.fc2, 'weight', nn.Hardtanh(-1e-3, 1e-3))


def adapt_map(attention):
    attention.fc2 = nn.Sequential(attention.fc2, nn.Tanh())


@pytest.mark.parametrize(
    'change', map(refused, (listen, change_output, change_logits, prune_map, parametrize_map, adapt_map))
)
def test_what_was_put_in_is_heard(change, used):
    conv = layer().conv.eval()
    plain = conv(inputs())
    assert used == [BATCH]
    change(conv.attention)
    assert_straightforward(conv, inputs(), rtol=1e-12, atol=1e-14)
    assert used == [BATCH]
    assert torch.allclose(conv(inputs()), plain) == (change is listen)


def test_own_gradients_of_frozen_parts(used):
    """What needs a gradient gets the straightforward one, whatever else is frozen."""
    net = layer(bias=True)
    parts = dict(net.named_parameters())
    x = inputs()
    for frozen in ([], ['warehouse.weight'], [name for name in parts if 'attention' in name], list(parts)[:1]):
        for wants_input in (False, True):
            for name, parameter in parts.items():
                parameter.requires_grad_(name not in frozen)
            wanted = [p for p in parts.values() if p.requires_grad] + [x.requires_grad_(wants_input)] * wants_input
            found = torch.autograd.grad(net.conv(x).sin().sum(), wanted)
            with straightforward():
                expected = torch.autograd.grad(net.conv(x).sin().sum(), wanted)
            for ours, theirs in zip(found, expected, strict=True):
                assert (ours - theirs).norm() <= 1e-9 * theirs.norm()
            x.requires_grad_(False)
    assert len(used) == 8


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast(dtype, used):
    """Rounding to the type costs no more than with cells."""
    net, x = layer().float().eval(), inputs().float()
    with torch.no_grad():
        exact = net.conv(x)
        with torch.autocast('cpu', dtype):
            ours = net.conv(x)
            assert len(used) == 2
            cells = torch.cat([net.conv(part) for part in x.split(10)])
    assert ours.dtype == cells.dtype == dtype
    assert len(used) == 2
    errors = [float((y.float() - exact).norm() / exact.norm()) for y in (ours, cells)]
    assert 0 < errors[0] < 2 * errors[1] < 0.05


def test_cells_of_another_type(used):
    net = layer().float()
    net.warehouse.bfloat16()
    assert_straightforward(net.conv, inputs().float(), rtol=1e-5, atol=1e-6)
    net.conv(inputs().float()).sum().backward()
    assert net.warehouse.weight.grad.dtype == torch.bfloat16
    assert used == [BATCH] * 2


def test_checkpointed_training(used):
    net = layer().train()
    x, gradients = inputs(), []
    for run in (net.conv, lambda x: checkpoint(net.conv, x, use_reentrant=False)):
        net.zero_grad()
        run(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in net.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)
    assert len(used) == 3


def test_operations_are_counted():
    """Fewer than for cells, and about as many as the rule says."""
    net, x = layer().eval(), inputs(128)
    with FlopCounterMode(display=False) as by_bases, torch.no_grad():
        net.conv(x)
    net.conv.attention.register_forward_hook(lambda *args: None)  # By cells, then.
    with FlopCounterMode(display=False) as by_cells, torch.no_grad():
        net.conv(x)
    saved = by_cells.get_total_flops() - by_bases.get_total_flops()
    kernel = 8 * 8 * 3 * 3
    assert saved == 2 * kernel * (128 * 288 - 17 * (128 + 288))


@pytest.mark.parametrize(('batch', 'gflops'), [(128, 154.4), (8, 24.6)])
def test_work_of_a_pass(batch, gflops):
    """At 4x and 128 images 154 GFLOP instead of 394; 8 images are too few."""
    with torch.device('meta'):
        model = timm.create_model('kw4x_resnet18')
    assert mixing_work(model, batch).flops / 1e9 == pytest.approx(gflops, abs=0.1)


@pytest.mark.parametrize('size', [(1, 1), (2, 1), (3, 2), (5, 4)])
@pytest.mark.parametrize(('stride', 'padding', 'dilation'), [(1, 1, 1), (2, 1, 1), (1, 6, 6), (1, 2, 1), (3, 1, 1)])
def test_seeing_positions(size, stride, padding, dilation):
    """Exactly the positions whose weights can change something."""
    spec = ConvSpec.of((9, 1, 1), (1, 1, 1, 1), (3, 3), (stride,) * 2, (padding,) * 2, (dilation,) * 2)
    x, kernel = torch.ones(1, 1, *size), torch.ones(1, 1, 3, 3, requires_grad=True)
    nn.functional.conv2d(x, kernel, None, stride, padding, dilation).sum().backward()
    assert taps.seeing_positions(x, spec) == tuple(kernel.grad.flatten().nonzero().flatten().tolist())


@pytest.mark.parametrize('storage', [None, torch.bfloat16, torch.int8])
@pytest.mark.parametrize('budget', [0, '1GB'])
def test_optimized_networks_of_tiny_images(storage, budget):
    """Positions that see nothing are left out of cells and of bases, in whatever type they are stored."""
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Conv2d(3 if i == 0 else 8, 8, 3, padding=1, stride=2) for i in range(5)))
    kernelize(net, {'a': WarehousePlan(['1', '2', '3', '4'], cell_num_ratio=4)})
    net.eval()
    fast = optimize_for_inference(net, batch_size=8, memory_budget=budget, storage=storage)
    x = images(8, size=16)
    with torch.no_grad():
        expected, found = net(x), fast(x)
    assert (found - expected).norm() <= {None: 1e-5, torch.bfloat16: 0.02, torch.int8: 0.03}[storage] * expected.norm()
