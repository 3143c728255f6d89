"""Graphs for other runtimes: whatever batch and size they are made with, they take any."""

import copy
import itertools
import shutil
from collections import OrderedDict

import onnxruntime
import pytest
import timm
import torch
from networks import SMALLEST, images, lively, network
from timm.utils.onnx import onnx_export
from torch import nn
from torch.export import Dim

from kw_timm import WarehousePlan, kernelize, optimize_for_inference
from kw_timm.ops import ConvSpec, straightforward_conv
from kw_timm.ops.products import conv_by_products
from kw_timm.pyramid import PyramidFeatures


class Mean(nn.Module):
    """Global pooling that onnxruntime has in float64 too."""

    def forward(self, x):
        return x.mean((2, 3))


# Of every kind of layer one.
KINDS = OrderedDict(
    stem=nn.Conv2d(3, 8, 3, stride=2, padding=1),
    relu=nn.ReLU(),
    same=nn.Conv2d(8, 8, (2, 4), padding='same'),
    depthwise=nn.Conv2d(8, 16, 3, groups=8, stride=(2, 1), padding=1),
    norm=nn.BatchNorm2d(16),
    grouped=nn.Conv2d(16, 16, 3, groups=2, padding=2, dilation=2),
    pointwise=nn.Conv2d(16, 8, 1, stride=2),
    pool=Mean(),
    head=nn.Linear(8, 4),
)
LAYERS = ('stem', 'same', 'depthwise', 'grouped', 'pointwise', 'head')
FORMS = ('as it is', 'cells', 'bases', 'int8')
BATCHES = (1, 2, 5, 16)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def small() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(copy.deepcopy(KINDS))
    kernelize(net, {name: WarehousePlan([name], 2) for name in LAYERS})
    return lively(net)


def in_form(net: nn.Module, form: str) -> nn.Module:
    if form == 'int8':
        return optimize_for_inference(net.float(), memory_budget=0, storage=torch.int8)
    net = net.double()
    if form == 'as it is':
        return net
    return optimize_for_inference(net, batch_size=64, memory_budget=0 if form == 'cells' else None)


def kind_of(net: nn.Module) -> torch.dtype:
    return next(b for b in net.buffers() if b.is_floating_point()).dtype


@torch.no_grad()
def assert_agrees(run, net, sizes=((64, 64), (49, 70)), batches=BATCHES, rtol=None):
    dtype = kind_of(net)
    # ONNX files have some constants, such as 1e-3, in float32.
    rtol = rtol or (1e-7 if dtype == torch.float64 else 1e-4)
    for batch, size in itertools.product(batches, sizes):
        x = torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(batch)).to(dtype)
        ours, theirs = run(x), net(x)
        theirs = list(theirs) if isinstance(theirs, list | tuple) else [theirs]
        ours = list(ours) if isinstance(ours, list | tuple) else [ours]
        assert len(ours) == len(theirs)
        for mine, other in zip(ours, theirs, strict=True):
            assert mine.shape == other.shape
            assert (mine - other).norm() <= rtol * other.norm()


def onnx_runner(path):
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    name = session.get_inputs()[0].name
    return lambda x: [torch.from_numpy(out) for out in session.run(None, {name: x.numpy()})]


def to_onnx(net, path):
    """By the exporter that traces: the other takes minutes for a whole network with dynamic sizes."""
    x, axes = images(2).to(kind_of(net)), {0: 'batch', 2: 'height', 3: 'width'}
    with torch.no_grad():
        torch.onnx.export(net, (x,), path, dynamo=False, input_names=['x'], dynamic_axes={'x': axes})
    return onnx_runner(path)


def to_program(net):
    some = Dim.DYNAMIC
    with torch.no_grad():
        return torch.export.export(
            net, (images(2).to(kind_of(net)),), dynamic_shapes=({0: Dim('batch', min=1, max=64), 2: some, 3: some},)
        )


def kinds_of_convolutions():
    for axes, window, stride, padding, groups, out in itertools.product(
        (1, 2, 3), (1, 2, 3), (1, 2), (0, 1), (1, 2, 4), (4, 8)
    ):
        for dilation, cell_in in ((1, 1), (2, 4 // groups)):
            for cut in (True, False):
                grid = (window**axes if cut else 1, out // 2, 4 // groups // cell_in)
                cell = (2, cell_in, *(1 if cut else window,) * axes)
                per_axis = ((n,) * axes for n in (window, stride, padding, dilation))
                yield ConvSpec.of(grid, cell, *per_axis, groups)


def test_products_are_convolutions():
    """Every combination of axes, window, stride, padding, dilation, groups and partition."""
    torch.manual_seed(0)
    for spec in kinds_of_convolutions():
        x = torch.randn(3, 4, *(7, 8, 6)[: len(spec.kernel_size)], dtype=torch.double)
        coefficients = torch.randn(3, torch.Size(spec.grid).numel(), 5, dtype=torch.double)
        cells, bias = torch.randn(5, *spec.cell_shape).double(), torch.randn(spec.kernel_shape[0]).double()
        ours = conv_by_products(x, coefficients, cells, bias, spec)
        torch.testing.assert_close(ours, straightforward_conv(x, coefficients, cells, bias, spec), msg=str(spec))


@pytest.mark.parametrize('form', FORMS)
def test_traced(form):
    net = in_form(small(), form)
    with torch.no_grad():
        assert_agrees(torch.jit.trace(net, images(2).to(kind_of(net)), check_trace=False), net)


@pytest.mark.parametrize('form', FORMS)
def test_onnx_by_tracing(form, tmp_path):
    net = in_form(small(), form)
    assert_agrees(to_onnx(net, tmp_path / 'net.onnx'), net)


@pytest.mark.parametrize(
    'form', ['bases', *(pytest.param(form, marks=pytest.mark.slow) for form in FORMS if form != 'bases')]
)
def test_exported(form, tmp_path):
    net = in_form(small(), form)
    torch.export.save(to_program(net), tmp_path / 'net.pt2')
    assert_agrees(torch.export.load(tmp_path / 'net.pt2').module(), net)


@pytest.mark.slow
@pytest.mark.parametrize('dynamic', ['shapes', 'axes'])
def test_onnx_by_exporting(dynamic, tmp_path):
    net, axes = in_form(small(), 'as it is'), {0: 'batch', 2: 'height', 3: 'width'}
    arguments = dict(dynamic_shapes=(axes,)) if dynamic == 'shapes' else dict(dynamic_axes={'x': axes})
    with torch.no_grad():
        torch.onnx.export(
            net,
            (images(2).double(),),
            tmp_path / 'net.onnx',
            dynamo=True,
            input_names=['x'],
            verbose=False,
            **arguments,
        )
    assert_agrees(onnx_runner(tmp_path / 'net.onnx'), net)


@pytest.mark.parametrize('form', ['as it is', pytest.param('bases', marks=pytest.mark.slow)])
def test_openvino(form):
    openvino = pytest.importorskip('openvino')
    net = in_form(small(), form).float()
    compiled = openvino.compile_model(openvino.convert_model(net, example_input=images(2)), 'CPU')
    assert_agrees(lambda x: torch.from_numpy(compiled(x.numpy())[0]), net)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which('g++') is None, reason='needs a C++ compiler')
def test_aot_inductor(tmp_path):
    net = in_form(small(), 'as it is')
    package = torch._inductor.aoti_compile_and_package(to_program(net), package_path=str(tmp_path / 'net.pt2'))
    assert_agrees(torch._inductor.aoti_load_package(package), net)


@pytest.mark.parametrize('axes', [1, 3])
def test_other_numbers_of_axes(axes, tmp_path):
    conv = {1: nn.Conv1d, 3: nn.Conv3d}[axes]
    torch.manual_seed(0)
    net = nn.Sequential(conv(3, 8, 3, padding=1), nn.ReLU(), conv(8, 8, 2, stride=2, groups=8), conv(8, 4, 1))
    kernelize(net, {str(i): WarehousePlan([str(i)]) for i in (0, 2, 3)})
    net = net.eval().double()
    x, dynamic = torch.randn(2, 3, *(8,) * axes).double(), {0: 'batch', 2: 'length'}
    with torch.no_grad():
        torch.onnx.export(
            net, (x,), tmp_path / 'net.onnx', dynamo=False, input_names=['x'], dynamic_axes={'x': dynamic}
        )
        sizes = [(length, *(8,) * (axes - 1)) for length in (8, 11)]
        assert_agrees(onnx_runner(tmp_path / 'net.onnx'), net, sizes)


@pytest.mark.parametrize('name', [SMALLEST[1], *(pytest.param(n, marks=pytest.mark.slow) for n in SMALLEST[::2])])
def test_onnx_of_whole_networks(name, tmp_path):
    net = network(name)  # In float32, for onnxruntime; the network enlarges rounding to 1e-4.
    assert_agrees(to_onnx(net, tmp_path / 'net.onnx'), net, batches=(1, 5), rtol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize('name', SMALLEST)
def test_timm_onnx_export(name, tmp_path):
    for dynamo in (False, True):
        net = network(name)
        onnx_export(
            net, str(tmp_path / 'net.onnx'), example_input=images(2), use_dynamo=dynamo, dynamic_size=not dynamo
        )
        run = onnx_runner(tmp_path / 'net.onnx')
        for batch in BATCHES:
            with torch.no_grad():
                torch.testing.assert_close(run(images(batch))[0], net(images(batch)), rtol=1e-2, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize('name', SMALLEST)
def test_openvino_of_whole_networks(name):
    openvino = pytest.importorskip('openvino')
    net = optimize_for_inference(network(name), batch_size=8, memory_budget='50MB')
    compiled = openvino.compile_model(openvino.convert_model(net, example_input=images(2)), 'CPU')
    for batch in BATCHES:
        x = images(batch)
        torch.testing.assert_close(torch.from_numpy(compiled(x.numpy())[0]), net(x), rtol=1e-2, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize('name', SMALLEST)
def test_onnx_of_features(name, tmp_path):
    torch.manual_seed(0)
    net = lively(timm.create_model(name, features_only=True, out_indices=(0, 1, 2))).double()
    assert_agrees(to_onnx(net, tmp_path / 'net.onnx'), net, batches=(1, 5))
    pyramid = PyramidFeatures(name).eval().double()
    assert_agrees(to_onnx(pyramid, tmp_path / 'pyramid.onnx'), pyramid, batches=(1, 5))


@pytest.mark.parametrize('training', [pytest.param(False, marks=pytest.mark.slow), True])
def test_compiled_for_batches_of_changing_size(training):
    net = small().double().train(training)
    compiled = torch.compile(net, fullgraph=True, backend='aot_eager')
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):
        for batch in (2, 3, 5, 7, 4, 16):
            x = images(batch).double()
            gradients = []
            for model in (compiled, net):
                net.zero_grad()
                with torch.set_grad_enabled(training):
                    out = model(x)
                gradients.append(
                    out if not training else torch.autograd.grad(out.square().sum(), list(net.parameters()))
                )
            torch.testing.assert_close(*gradients)
