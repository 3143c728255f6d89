"""Memory and cost of networks optimized for inference, cells in fewer bits, and the report."""

import pytest
import timm
import torch
from networks import SMALLEST, images, network
from torch import nn

from kw_timm import WarehousePlan, kernelize, mixing_work, optimization_report, optimize_for_inference


def optimized_layers(net):
    return [m for m in net.modules() if hasattr(m, 'work')]


def stored(net, suffix):
    return sum(b.nbytes for name, b in net.named_buffers() if name.endswith(suffix))


@pytest.mark.parametrize('batch_size', [1, 8])
def test_more_memory_never_costs_more(batch_size):
    net, costs = network(SMALLEST[1]), []
    before = mixing_work(net, batch_size)
    for budget in (0, 10**5, 10**6, '5MB', '20 MB', 0.05e9, None):
        fast = optimize_for_inference(net, batch_size=batch_size, memory_budget=budget)
        report = optimization_report(fast)
        assert report.bases_bytes <= report.memory_budget
        assert report.bases_bytes == stored(fast, '.bases')
        assert report.cells_bytes == stored(fast, '.cells')
        assert report.work == mixing_work(fast, batch_size)
        assert report.work_before == before
        assert len(report.from_bases) + len(report.from_cells) == len(optimized_layers(fast))
        assert f'{len(report.from_bases)} from precomputed bases' in str(report)
        assert f'{len(report.from_cells)} from cells' in str(report)
        assert f'batches of {batch_size}' in str(report)
        costs.append(sum(layer.work(batch_size).cost for layer in optimized_layers(fast)))
    assert costs == sorted(costs, reverse=True)
    assert batch_size == 1 or costs[-1] < 0.8 * costs[0]


def test_work_of_the_largest_network():
    with torch.device('meta'):
        net = timm.create_model('kw4x_resnet50')
    one, eight = mixing_work(net, 1), mixing_work(net, 8)
    assert one.flops == pytest.approx(2 * 8.14e9, rel=0.01)
    assert one.bytes == pytest.approx(4.74e9, rel=0.01)
    assert (eight.flops, eight.bytes) == (8 * one.flops, one.bytes)


@pytest.mark.parametrize(('storage', 'size', 'error'), [(torch.bfloat16, 2, 0.004), (torch.int8, 1, 0.03)])
@pytest.mark.parametrize('budget', [0, None])
def test_fewer_bits(storage, size, error, budget):
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1)), images(3, 8, 16)
    kernelize(net, {'w': WarehousePlan(['0'], 2, 0.5, 0.5)})
    net.eval()[0].attention.norm1.running_mean.normal_()
    plain = optimization_report(optimize_for_inference(net, batch_size=32, memory_budget=budget))
    fast = optimize_for_inference(net, batch_size=32, memory_budget=budget, storage=storage)
    report, source = optimization_report(fast), '.bases' if budget is None else '.cells'
    assert {b.dtype for name, b in fast.named_buffers() if name.endswith(source)} == {storage}
    assert report.cells_bytes * 4 == plain.cells_bytes * size
    assert report.bases_bytes * 4 == plain.bases_bytes * size
    assert stored(fast, source) == report.cells_bytes + report.bases_bytes
    assert 1e-4 < report.storage_error < error
    assert f'stored as {storage}: relative error up to {report.storage_error:.1e}' in str(report)
    expected = net(x).detach()
    # Errors of cells are random, so outputs have about the same; those of bases may add up where terms cancel.
    assert 1e-5 < float((fast(x) - expected).norm() / expected.norm()) < 3 * report.storage_error


def test_exact_storage_has_no_error():
    report = optimization_report(optimize_for_inference(network(SMALLEST[0])))
    assert report.storage_error == 0
    assert 'stored as' not in str(report)


def test_reports_of_other_networks():
    with pytest.raises(ValueError, match='Linear does not come from optimize_for_inference'):
        optimization_report(nn.Linear(1, 1))
    with pytest.raises(ValueError, match='Linear has no KW layer'):
        mixing_work(nn.Linear(1, 1), 1)
