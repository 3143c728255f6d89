"""One training step by what people train with: the gradients, or the weights, that plain PyTorch gives."""

import copy
import os
import socket
import subprocess
import sys
from pathlib import Path

import drive_engines
import pytest
import torch
from networks import network
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.optim.swa_utils import AveragedModel, update_bn

from kw_timm.kernelize import KWLayer
from kw_timm.layers import Warehouse

DRIVER = Path(drive_engines.__file__)
TINY = 'kw1d2x_mobilenetv2_050'


@pytest.fixture(scope='module')
def by_two_processes(tmp_path_factory) -> list[dict[tuple[str, str], dict[str, torch.Tensor]]]:
    """Gradients by network and engine, of each of two processes."""
    file = tmp_path_factory.mktemp('engines') / 'found'
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = str(probe.getsockname()[1])
    env = {**os.environ, 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': port, 'WORLD_SIZE': '2'}
    started = [
        subprocess.Popen(
            [sys.executable, str(DRIVER), str(file)],
            env={**env, 'RANK': rank, 'LOCAL_RANK': rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in '01'
    ]
    for process in started:
        output, _ = process.communicate(timeout=280)
        assert process.returncode == 0, output
    return [torch.load(file.with_suffix(f'.{rank}'), weights_only=True) for rank in range(2)]


@pytest.mark.parametrize('name', drive_engines.NAMES)
def test_two_processes_give_the_gradients_of_one(by_two_processes, name):
    model = drive_engines.make_network(name)
    images, labels = drive_engines.data()
    nn.functional.cross_entropy(model(images), labels).backward()
    tried = [engine for net, engine in by_two_processes[0] if net == name]
    assert len(tried) >= 2
    for engine in tried:
        for found in by_two_processes:
            grads = found[name, engine]
            assert grads.keys() == dict(model.named_parameters()).keys()
            for key, parameter in model.named_parameters():
                size = parameter.grad.abs().max()
                assert size > 0, key
                assert (grads[key] - parameter.grad).abs().max() <= 1e-9 * size, (engine, key)


def test_a_warehouse_that_is_sharded_too_early_says_what_to_do():
    net = network(TINY)
    with drive_engines.one_process():
        from torch.distributed.fsdp import fully_shard

        mesh = drive_engines.init_device_mesh('cpu', (1,))
        for warehouse in net.warehouses.values():
            fully_shard(warehouse, mesh=mesh)
        fully_shard(net, mesh=mesh)
        with pytest.raises(RuntimeError, match='reshard_after_forward=False'):
            net(torch.randn(2, 3, 32, 32))


def step(model: nn.Module, x: torch.Tensor) -> None:
    """Take a step of plain SGD."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(x).square().mean().backward()
    optimizer.step()


def test_averaged_weights():
    net, x = network(TINY), torch.randn(4, 3, 32, 32)
    averaged = AveragedModel(net)
    averaged.update_parameters(net)
    before = copy.deepcopy(net.state_dict())
    step(net, x)
    averaged.update_parameters(net)
    for key, value in averaged.module.named_parameters():
        torch.testing.assert_close(value, (before[key] + net.state_dict()[key]) / 2)
    update_bn([x], averaged)
    assert averaged(x).isfinite().all()


@pytest.mark.parametrize('kept', [1.0, 0.5])
def test_pruned_warehouses(kept):
    """Pruning a warehouse prunes its cells in every layer, and learning goes on."""
    net, x = network(TINY), torch.randn(2, 3, 32, 32)
    plain = copy.deepcopy(net)
    for warehouse in net.warehouses.values():
        prune.l1_unstructured(warehouse, 'weight', amount=1 - kept)
    if kept == 1.0:
        assert torch.equal(net(x), plain(x))
    for _ in range(2):  # a second step needs the weights made anew
        step(net, x)
        step(plain, x)
    if kept == 1.0:
        torch.testing.assert_close(net(x), plain(x))
    for warehouse in net.warehouses.values():
        net(x)
        zeros = (warehouse.weight == 0).float().mean()
        assert zeros == pytest.approx(1 - kept, abs=0.02)
        assert torch.equal(warehouse.weight, warehouse.weight_orig * warehouse.weight_mask)
        prune.remove(warehouse, 'weight')
    assert not any('_orig' in key for key in net.state_dict())


class Doubled(nn.Module):
    """A parametrization whose effect is easy to undo."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    def right_inverse(self, x: torch.Tensor) -> torch.Tensor:
        return x / 2


def test_parametrized_warehouses():
    net, x = network(TINY), torch.randn(2, 3, 32, 32)
    expected = net(x)
    for warehouse in net.warehouses.values():
        parametrize.register_parametrization(warehouse, 'weight', Doubled())
    assert torch.equal(net(x), expected)
    for _ in range(2):
        step(net, x)
    with parametrize.cached():
        assert net(x).isfinite().all()
    assert isinstance(next(iter(net.warehouses.values())), Warehouse)
    for warehouse in net.warehouses.values():
        parametrize.remove_parametrizations(warehouse, 'weight')
    assert net(x).isfinite().all()


def test_hooks_of_a_warehouse_run_for_every_layer():
    net, x = network(TINY), torch.randn(2, 3, 32, 32)
    called = dict.fromkeys(net.warehouses, 0)
    for name, warehouse in net.warehouses.items():
        warehouse.register_forward_hook(lambda *_, name=name: called.update({name: called[name] + 1}))
    net(x)
    assert sum(called.values()) == sum(isinstance(module, KWLayer) for module in net.modules())


def test_accumulated_and_clipped():
    """Two halves of a batch, and clipping by norm, as loops of one's own do it."""
    net, x = drive_engines.make_network(TINY), torch.randn(4, 3, 32, 32, dtype=torch.float64)
    plain = copy.deepcopy(net)
    plain(x).square().mean().backward()
    for part in x.split(2):
        (net(part).square().mean() / 2).backward()
    norms = [nn.utils.clip_grad_norm_(model.parameters(), 0.01) for model in (net, plain)]
    torch.testing.assert_close(*norms, rtol=1e-9, atol=0)
    assert norms[0] > 0.01
    for (key, value), expected in zip(net.named_parameters(), plain.parameters(), strict=True):
        assert (value.grad - expected.grad).abs().max() <= 1e-9 * expected.grad.abs().max(), key
