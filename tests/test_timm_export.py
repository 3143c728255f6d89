"""Compiling, exporting and ONNX, of the smallest network of each family."""

import onnxruntime
import pytest
import torch
from networks import SMALLEST, images, network
from torch import nn
from torch.export import Dim

from kw_timm import WarehousePlan, kernelize

# Exporting the others takes half a minute each.
RESNET_QUICKLY = [SMALLEST[0], *(pytest.param(name, marks=pytest.mark.slow) for name in SMALLEST[1:])]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def small() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 4))
    kernelize(net, {'a': WarehousePlan(['0']), 'b': WarehousePlan(['2']), 'c': WarehousePlan(['4'])})
    return net.eval()


@torch.no_grad()
def test_compile_to_machine_code():
    net, x = small(), images(size=8)
    torch.testing.assert_close(torch.compile(net, fullgraph=True)(x), net(x))


def test_compile_training():
    net, x = small().train().double(), images(4, size=8).double()
    gradients = []
    for model in (torch.compile(net, fullgraph=True, backend='aot_eager'), net):
        net.zero_grad()
        model(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in net.parameters()])
    torch.testing.assert_close(*gradients)


@torch.no_grad()
@pytest.mark.parametrize('name', RESNET_QUICKLY)
def test_compile(name):
    """A whole network is one graph; lowered, but run by torch's own kernels, which takes seconds."""
    model, x = network(name).double(), images().double()
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend='aot_eager')(x), model(x))


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize('name', SMALLEST)
def test_compile_whole_networks_to_machine_code(name):
    model, x = network(name), images()
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x), rtol=1e-2, atol=1e-3)


@torch.no_grad()
@pytest.mark.slow  # in small: test_graphs.py
@pytest.mark.parametrize('name', SMALLEST)
def test_export_with_any_batch_size(name, tmp_path):
    model = network(name).double()
    program = torch.export.export(model, (images(2).double(),), dynamic_shapes=({0: Dim('batch', min=1, max=64)},))
    torch.export.save(program, tmp_path / 'network.pt2')
    exported = torch.export.load(tmp_path / 'network.pt2').module()
    for batch in (1, 2, 5):
        x = images(batch).double()
        torch.testing.assert_close(exported(x), model(x))


@torch.no_grad()
@pytest.mark.slow  # in small: test_graphs.py
@pytest.mark.parametrize('name', SMALLEST)
def test_onnx_with_any_batch_size(name, tmp_path):
    model, path = network(name), tmp_path / 'network.onnx'
    torch.onnx.export(model, (images(),), path, dynamo=True, verbose=False, dynamic_shapes=({0: 'batch'},))
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    for batch in (1, 2, 5, 16):
        x = images(batch)
        output = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
        torch.testing.assert_close(output, model(x), rtol=1e-2, atol=1e-3)


@torch.no_grad()
def test_trace():
    model = small()
    traced = torch.jit.trace(model, images(size=8), check_trace=False)
    x = images(size=8, seed=2)
    torch.testing.assert_close(traced(x), model(x))
