"""Under autocast, cells are cast once in a pass for all layers of their warehouse."""

import pytest
import timm
import torch
from networks import images
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from kw_timm.layers import KWLayer, straightforward
from kw_timm.ops import casts

TYPE = torch.bfloat16


class Casts(TorchDispatchMode):
    """Counts what is cast, by shape."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        if operation is torch.ops.aten._to_copy.default and (args[0].dtype, result.dtype) == (torch.float32, TYPE):
            self.shapes.append(tuple(result.shape))
        return result


@pytest.fixture(scope='module')
def net() -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model('kw1x_mobilenetv2_050', num_classes=10, drop_rate=0.0, init='live').train()


def warehouses(net: torch.nn.Module) -> list[tuple[int, ...]]:
    return sorted(tuple(p.shape) for p in net.warehouses.parameters())


def cell_casts(net: torch.nn.Module, run) -> list[tuple[int, ...]]:  # type: ignore[no-untyped-def]
    with Casts() as seen, torch.autocast('cpu', TYPE):
        run()
    return sorted(shape for shape in seen.shapes if shape in warehouses(net))


@pytest.mark.parametrize('batch', [2, 12], ids=['cells', 'bases too'])
def test_once_a_warehouse_and_pass(net, batch):
    x = images(batch, 32)
    outputs = []
    for _ in range(2):  # The first pass's graph is still there in the second.
        assert cell_casts(net, lambda: outputs.append(net(x))) == warehouses(net)
    assert sum(isinstance(m, KWLayer) for m in net.modules()) > 2 * len(warehouses(net))


def test_gradients(net, monkeypatch):
    """As with a cast of its own for every layer, but for rounding of the sum."""

    def gradients() -> list[torch.Tensor]:
        net.zero_grad()
        with torch.autocast('cpu', TYPE):
            loss = net(images(4, 64)).float().square().mean()
        loss.backward()
        return [p.grad.clone() for p in net.parameters()]

    found = gradients()
    with monkeypatch.context() as patch:
        patch.setattr(casts, '_newest', {})  # Nothing is remembered under a tensor's value.
        patch.setattr(casts, 'learns', lambda _: False)
        expected = gradients()
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).norm() <= 0.02 * theirs.norm() + 1e-6


def test_changed_unseen(net):
    """What is written into ``data`` counts no version; the next pass sees it all the same."""
    with torch.autocast('cpu', TYPE):
        kept = net.eval()(images(2, 32))  # Its graph holds the casts.
        for p in net.warehouses.parameters():
            p.data.mul_(0.5)
        found = net(images(2, 32))
        with straightforward():
            expected = net(images(2, 32))
        for p in net.warehouses.parameters():
            p.data.mul_(2)
    net.train()
    assert (found - expected).norm() < 0.05 * expected.norm() < 0.05 * (kept - expected).norm() * 100


def test_changed_in_place_between_layers(net):
    """Seen by its version, within a pass too."""
    largest = max(net.warehouses.values(), key=lambda warehouse: len(warehouse.partition.layers))
    layers = [m for m in net.modules() if isinstance(m, KWLayer) and m.warehouse is largest]
    first, second = layers[:2]
    with torch.autocast('cpu', TYPE):
        kept = first._cells_for(images(1, 8))
        assert second._cells_for(images(1, 8)) is kept
        with torch.no_grad():
            first.warehouse.weight.mul_(2)
        try:
            assert torch.equal(layers[2]._cells_for(images(1, 8)), 2 * kept)
        finally:
            with torch.no_grad():
                first.warehouse.weight.div_(2)


def test_nothing_is_kept(net):
    """Neither the casts of a pass whose graph is gone, nor any without gradients."""
    with torch.autocast('cpu', TYPE):
        net(images(2, 32)).float().sum().backward()
        with torch.no_grad():
            net(images(2, 32))
    for p in net.warehouses.parameters():
        known = casts._newest.get(p)
        assert known is None or known.tensor() is None


def test_checkpointed(net):
    x = images(2, 32).requires_grad_()
    with torch.autocast('cpu', TYPE):
        y = checkpoint(net, x, use_reentrant=False)
    y.float().sum().backward()
    assert all(p.grad is not None for p in net.parameters())
