"""Graphs for other runtimes: whatever batch and size they are made with, they take any."""

import copy
import itertools
import shutil
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial

import onnxruntime
import pytest
import timm
import torch
from networks import SMALLEST, images, lively
from timm.utils.onnx import onnx_export
from torch import nn
from torch.export import Dim

from kw_timm import WarehousePlan, kernelize, optimize_for_inference
from kw_timm.ops import ConvSpec, straightforward_conv
from kw_timm.ops.products import conv_by_products
from kw_timm.pyramid import PyramidFeatures
from kw_timm.random_weights import drawn_images, settle


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
# Whose graphs take the exporters and compilers longest.
LONG_ONES = ('same', 'grouped')
FORMS = ('as it is', 'cells', 'bases', 'int8')
BATCHES = (1, 2, 5, 16)
TINY = 'kw1d2x_mobilenetv2_050'
# Some processors compute in bfloat16 unless told otherwise.
PRECISE = {'INFERENCE_PRECISION_HINT': 'f32'}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def small(without: Sequence[str] = ()) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(OrderedDict((name, copy.deepcopy(m)) for name, m in KINDS.items() if name not in without))
    kernelize(net, {name: WarehousePlan([name], 2) for name in LAYERS if name not in without})
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
        x = (drawn_images(batch, size) if len(size) == 2 else torch.randn(batch, 3, *size)).to(dtype)
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
    """By the exporter that traces: the other takes a minute for a whole network with dynamic sizes."""
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


@pytest.mark.parametrize('tracing', [False, True])
def test_products_are_convolutions(tracing, monkeypatch):
    """Every combination of axes, window, stride, padding, dilation, groups and partition, in both ways of gathering."""
    monkeypatch.setattr(torch.jit, 'is_tracing', lambda: tracing)
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
    ('form', 'without'), [('bases', LONG_ONES), *(pytest.param(form, (), marks=pytest.mark.slow) for form in FORMS)]
)
def test_exported(form, without, tmp_path):
    net = in_form(small(without), form)
    torch.export.save(to_program(net), tmp_path / 'net.pt2')
    assert_agrees(torch.export.load(tmp_path / 'net.pt2').module(), net)


@pytest.mark.slow
@pytest.mark.parametrize('dynamic', ['shapes', 'axes'])
def test_onnx_by_exporting(dynamic, tmp_path):
    net = in_form(small(), 'as it is')
    assert_agrees(dynamo_with(dynamic)(net, tmp_path / 'net.onnx'), net)


@pytest.mark.parametrize('form', ['as it is', pytest.param('bases', marks=pytest.mark.slow)])
def test_openvino(form, tmp_path):
    net = in_form(small(), form).float()
    assert_agrees(by_openvino(net, tmp_path), net)


def test_openvino_of_a_block_that_halves_its_input_twice(tmp_path):
    """As residual networks begin a stage: what one of the layers sees must not give the other its sizes."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.conv1 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
            self.conv2 = nn.Conv2d(8, 8, 3, stride=2, padding=1)
            self.downsample = nn.Conv2d(8, 8, 1, stride=2)

        def forward(self, x):
            x = self.stem(x).relu()
            return self.conv2(self.conv1(x)) + self.downsample(x)

    torch.manual_seed(0)
    net = Block()
    kernelize(net, {name: WarehousePlan([name], 2) for name in ('conv1', 'conv2', 'downsample')})
    net = lively(net)
    assert_agrees(by_openvino(net, tmp_path, input=[[-1, 3, -1, -1]]), net)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which('g++') is None, reason='needs a C++ compiler')
def test_aot_inductor(tmp_path):
    """Of some kinds of layers; to compile all of them takes minutes."""
    net = in_form(small(LONG_ONES), 'as it is')
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


def taken(way: str, name: str = TINY, **options) -> nn.Module:
    """What people make of a network, in float32 and with sound weights."""
    torch.manual_seed(0)
    kind = way.removeprefix('optimized ')
    if kind == 'pyramid':
        net = PyramidFeatures(name, **options)
    else:
        net = timm.create_model(name, features_only=kind == 'features', **options)
    net = settle(net)
    return net if kind == way else optimize_for_inference(net, batch_size=8)


def by_timm(net, path, dynamo=False):
    onnx_export(net, str(path), example_input=images(2), use_dynamo=dynamo, dynamic_size=True)
    return onnx_runner(path)


def by_tracing(net, path):
    return torch.jit.trace(net, images(2), check_trace=False)


def by_exporting(net, path):
    return to_program(net).module()


def by_openvino(net, path, **arguments):
    openvino = pytest.importorskip('openvino')
    model = openvino.convert_model(net, example_input=images(2), **arguments)
    compiled = openvino.compile_model(model, 'CPU', PRECISE)
    return lambda x: [torch.from_numpy(out) for out in compiled(x.numpy()).values()]


def dynamo_with(dynamic):
    """Return torch's exporter of ONNX, the one that does not trace, told what is dynamic in one of two ways."""

    def export(net, path):
        axes = {0: 'batch', 2: 'height', 3: 'width'}
        arguments = dict(dynamic_shapes=(axes,)) if dynamic == 'shapes' else dict(dynamic_axes={'x': axes})
        with torch.no_grad():
            x = images(2).to(kind_of(net))
            torch.onnx.export(net, (x,), path, dynamo=True, input_names=['x'], verbose=False, **arguments)
        return onnx_runner(path)

    return export


QUICK = dict(traced=by_tracing, onnx=to_onnx, openvino=by_openvino)
LONG = {
    'exported': by_exporting,
    'timm': by_timm,
    'timm, dynamo': partial(by_timm, dynamo=True),
    'onnx, dynamic shapes': dynamo_with('shapes'),
    'onnx, dynamic axes': dynamo_with('axes'),
}
WAYS = ('network', 'features', 'pyramid', 'optimized network', 'optimized features', 'optimized pyramid')
OF_LEVELS = [way for way in WAYS if 'network' not in way]


@pytest.mark.parametrize('by', QUICK)
@pytest.mark.parametrize('way', ['features', *(pytest.param(way, marks=pytest.mark.slow) for way in OF_LEVELS[1:])])
def test_fine_levels(way, by, tmp_path):
    """Two levels, which take a second; what is behind them is not there."""
    net = taken(way, out_indices=(0, 1))
    assert_agrees(QUICK[by](net, tmp_path / 'net.onnx'), net)


@pytest.mark.slow
@pytest.mark.parametrize('by', LONG)
@pytest.mark.parametrize('way', OF_LEVELS)
def test_fine_levels_at_length(way, by, tmp_path):
    net = taken(way, out_indices=(0,))
    assert_agrees(LONG[by](net, tmp_path / 'net.onnx'), net)


@pytest.mark.slow
@pytest.mark.parametrize('by', QUICK)
@pytest.mark.parametrize('way', WAYS[:4])
def test_whole_networks(way, by, tmp_path):
    net = taken(way)
    assert_agrees(QUICK[by](net, tmp_path / 'net.onnx'), net)


@pytest.mark.slow
@pytest.mark.parametrize('by', ['onnx', 'openvino', 'timm'])
@pytest.mark.parametrize('name', [*SMALLEST, 'kw1d2x_resnet50'])
def test_every_family(name, by, tmp_path):
    net = taken('network', name)
    assert_agrees((QUICK | LONG)[by](net, tmp_path / 'net.onnx'), net)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize('by', ['timm, dynamo', 'onnx, dynamic shapes'])
def test_a_whole_network_at_length(by, tmp_path):
    net = taken('network')
    assert_agrees(LONG[by](net, tmp_path / 'net.onnx'), net)


@pytest.mark.parametrize(
    ('training', 'without'),
    [(True, LONG_ONES), *(pytest.param(training, (), marks=pytest.mark.slow) for training in (False, True))],
)
def test_compiled_for_batches_of_changing_size(training, without):
    net = small(without).double().train(training)
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
