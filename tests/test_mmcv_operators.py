"""torchvision's operators in the place of mmcv's compiled ones: the numbers of mmcv-full 1.7.2, and when they serve."""

import importlib.util
import itertools
import subprocess
import sys
import warnings
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip('mmdet', reason='needs MMDetection')
import kw_mmdet  # before mmcv.ops
import mmcv.ops
import mmcv_cases
from kw_mmdet import operators
from mmcv_cases import ACROSS, DOWN, RECORD, SCALE, TYPES, nms_results, random_boxes, regions, roi_align_results

# Relative to the largest value. float16: gradients are added up in float32 here, in float16 by compiled mmcv.
TOLERANCE = {'float16': 1e-3, 'float32': 1e-6, 'float64': 1e-12}
CONFIG = Path(__file__).parent.parent / 'configs/shapes/mask_rcnn_kw1x_mobilenetv2_050_fpn_shapes.py'
ACCELERATORS = [
    name for name, there in [('cuda', torch.cuda.is_available()), ('mps', torch.backends.mps.is_available())] if there
]


@pytest.fixture
def ours(monkeypatch):
    """Torchvision's operators in mmcv.ops, also where compiled ones are installed."""
    module = operators._TorchvisionOperators(mmcv.__version__)
    for name in ('nms', 'roi_align', 'info', 'deform_conv'):
        monkeypatch.setattr(sys.modules[f'mmcv.ops.{name}'], 'ext_module', module)
    return module


@pytest.fixture
def compiled():
    """Compiled mmcv's own module."""
    module = sys.modules['mmcv._ext']
    if isinstance(module, operators._TorchvisionOperators):
        pytest.fail('mmcv without compiled operators is installed here; run: make test-mmcv-full')
    return module


@pytest.fixture
def no_extension(monkeypatch):
    """mmcv as before its operators were asked for; undone afterwards."""
    monkeypatch.setattr(mmcv, '_ext', None, raising=False)
    monkeypatch.setattr(mmcv, '__path__', list(mmcv.__path__))
    monkeypatch.delitem(sys.modules, 'mmcv._ext', raising=False)


def agree(got: np.ndarray, expected: np.ndarray, kind: str) -> None:
    """Compare with the tolerance of a type."""
    scale = np.abs(expected).max(initial=1)
    np.testing.assert_allclose(got / scale, expected / scale, rtol=0, atol=TOLERANCE[kind])


def check_against_record(results: dict[str, np.ndarray]) -> None:
    """Compare results with recorded ones: indices exactly, values with the tolerance of their type."""
    with np.load(RECORD) as record:
        for name, result in results.items():
            expected = record[name]
            assert result.dtype == expected.dtype, name
            assert result.shape == expected.shape, name
            if result.dtype.kind == 'i':
                assert np.array_equal(result, expected), name
            else:
                agree(result, expected, result.dtype.name)


def test_nms_gives_what_compiled_mmcv_gave(ours):
    results = nms_results()
    assert len(results['nms 0.50 offset=0 whole=True']) not in (0, 120)
    check_against_record(results)


def test_roi_align_gives_what_compiled_mmcv_gave(ours):
    check_against_record(roi_align_results())


def test_mmcv_2_gets_the_same_numbers(mmdet3_python, tmp_path):
    target = tmp_path / 'results.npz'
    subprocess.run([mmdet3_python, '-W', 'ignore', mmcv_cases.__file__, target], check=True, timeout=240)
    with np.load(target) as results:
        check_against_record(dict(results))
        assert set(results) == set(np.load(RECORD))


@pytest.mark.mmcv_full
def test_compiled_mmcv_gives_what_was_recorded(compiled):
    check_against_record({**nms_results(), **roi_align_results()})


@pytest.mark.mmcv_full
def test_nms_equals_compiled_bit_by_bit(compiled):
    random = np.random.RandomState(2)
    for threshold, offset, whole in itertools.product((0.1, 0.3, 1 / 3, 0.5, 0.7), (0, 1), (False, True)):
        for count in (0, 1, 2, 37, 300):
            boxes = torch.from_numpy(random_boxes(random, count, whole))
            scores = torch.from_numpy((random.rand(count) * 20).round().astype(np.float32))
            expected = compiled.nms(boxes, scores, iou_threshold=threshold, offset=offset)
            assert torch.equal(operators.nms(boxes, scores, threshold, offset), expected)


@pytest.mark.mmcv_full
@pytest.mark.parametrize('kind', TYPES)
def test_roi_align_equals_compiled_bit_by_bit(compiled, kind):
    random = np.random.RandomState(3)
    for mode, aligned, ratio in itertools.product((operators.MAX, operators.AVERAGE), (False, True), (0, 1, 2, 3)):
        features, rois, gradients = regions(random, kind)
        results = []
        for module in (operators, compiled):
            output = torch.zeros_like(gradients)
            rows, columns = (torch.zeros_like(output[: 0 if mode else None]) for _ in range(2))
            gradient = torch.zeros_like(features)
            settings = (DOWN, ACROSS, SCALE, ratio, mode, aligned)
            module.roi_align_forward(features, rois, output, rows, columns, *settings)
            module.roi_align_backward(gradients, rois, rows, columns, gradient, *settings)
            results.append((output, rows, columns, gradient))
        *forward, gradient = zip(*results, strict=True)
        assert all(torch.equal(mine, theirs) for mine, theirs in forward)
        if kind == 'float16' and mode == operators.MAX:
            agree(gradient[0].double().numpy(), gradient[1].double().numpy(), kind)
        else:
            assert torch.equal(*gradient)


def detector_results() -> list[torch.Tensor]:
    """Loss, gradients and detections of the demo's Mask R-CNN, for one image with two objects."""
    from mmcv import Config
    from mmdet.core.mask import BitmapMasks
    from mmdet.models import build_detector

    torch.manual_seed(0)
    np.random.seed(0)
    detector = build_detector(Config.fromfile(str(CONFIG)).model)
    size, boxes = 128, [[8, 16, 72, 64], [40, 30, 120, 110]]
    masks = np.zeros((2, size, size), np.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes, strict=True):
        mask[top:bottom, left:right] = 1
    shape = (size, size, 3)
    metas = [dict(img_shape=shape, ori_shape=shape, pad_shape=shape, scale_factor=np.ones(4, np.float32), flip=False)]
    image = torch.randn(1, 3, size, size)
    losses = detector.train().forward_train(
        image,
        metas,
        gt_bboxes=[torch.tensor(boxes).float()],
        gt_labels=[torch.tensor([0, 1])],
        gt_masks=[BitmapMasks(masks, size, size)],
    )
    loss, _ = detector._parse_losses(losses)
    loss.backward()
    with torch.no_grad():
        ((found, segments),) = detector.eval().simple_test(image, metas)
    assert sum(map(len, found)) > 10
    gradients = [p.grad for p in detector.parameters() if p.grad is not None]
    pictures = [torch.from_numpy(np.stack(of_class)) for of_class in segments if of_class]
    return [loss.detach(), *gradients, *map(torch.from_numpy, found), *pictures]


@pytest.mark.mmcv_full
def test_detector_trains_and_detects_as_with_compiled_operators(compiled, monkeypatch):
    expected = detector_results()
    for name in ('nms', 'roi_align'):
        monkeypatch.setattr(sys.modules[f'mmcv.ops.{name}'], 'ext_module', operators)
    assert all(itertools.starmap(torch.equal, zip(detector_results(), expected, strict=True)))


@pytest.mark.gpu
@pytest.mark.parametrize('device', ACCELERATORS or [pytest.param('none', marks=pytest.mark.skip('no accelerator'))])
def test_accelerators_give_what_the_cpu_gives(ours, device):
    check_against_record(nms_results(device))
    results = roi_align_results(device, ('float32',))
    lowest = torch.finfo(torch.float32).min  # what mmcv's maxima start from there; -10000 on the CPU
    check_against_record({name: np.where(result == lowest, -10000, result) for name, result in results.items()})


@pytest.mark.parametrize('mode', ['avg', 'max'])
def test_gradients_are_those_of_numerical_differences(ours, mode):
    features, rois, _ = regions(np.random.RandomState(4), 'float64')
    features = features.requires_grad_()

    def pool(x: torch.Tensor) -> torch.Tensor:
        return mmcv.ops.roi_align(x, rois, (DOWN, ACROSS), SCALE, 0, mode, True)

    assert torch.autograd.gradcheck(pool, features, fast_mode=True)


@pytest.mark.parametrize('mode', ['avg', 'max'])
def test_roi_align_takes_types_that_compiled_mmcv_refuses(ours, mode):
    features, rois, gradients = regions(np.random.RandomState(5), 'bfloat16')
    pooled, slopes = {}, {}
    for name, x, boxes in [
        ('bfloat16', features, rois),
        ('mixed', features, rois.float()),
        ('float32', features.float(), rois.float()),
    ]:
        x = x.clone().requires_grad_()
        pooled[name] = mmcv.ops.roi_align(x, boxes, (DOWN, ACROSS), SCALE, 0, mode, True)
        pooled[name].backward(gradients.to(x.dtype))
        slopes[name] = x.grad
    for name in ('bfloat16', 'mixed'):
        assert pooled[name].dtype == slopes[name].dtype == torch.bfloat16
        torch.testing.assert_close(pooled[name], pooled['float32'].bfloat16(), rtol=0, atol=0)
        # The place of a maximum, which goes from forward to backward, is rounded to bfloat16.
        torch.testing.assert_close(slopes[name].float(), slopes['float32'], rtol=0, atol=0.01 if mode == 'avg' else 0.2)


@pytest.mark.parametrize('kind', [torch.float16, torch.bfloat16, torch.float64])
def test_nms_takes_types_that_compiled_mmcv_refuses(kind):
    boxes = torch.from_numpy(random_boxes(np.random.RandomState(6), 80, True)).to(kind)
    scores = torch.rand(80, generator=torch.Generator().manual_seed(0)).to(kind)
    kept = operators.nms(boxes, scores, 0.45)
    assert 0 < len(kept) < 80
    assert torch.equal(kept, operators.nms(boxes.float(), scores.float(), 0.45))


@pytest.mark.parametrize('mode', ['avg', 'max'])
def test_roi_align_takes_no_regions_and_no_images(ours, mode):
    features = torch.rand(2, 3, 5, 6, requires_grad=True)
    for x in (features, features[:0]):
        pooled = mmcv.ops.roi_align(x, torch.zeros(0, 5), (DOWN, ACROSS), SCALE, 0, mode, True)
        assert pooled.shape == (0, 3, DOWN, ACROSS)
        pooled.sum().backward()
    assert not features.grad.any()


def test_channels_last_features_are_read_right(ours):
    features, rois, _ = regions(np.random.RandomState(7), 'float32')
    for mode in ('avg', 'max'):
        expected = mmcv.ops.roi_align(features, rois, (DOWN, ACROSS), SCALE, 0, mode, True)
        got = mmcv.ops.roi_align(
            features.to(memory_format=torch.channels_last), rois, (DOWN, ACROSS), SCALE, 0, mode, True
        )
        assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ('name', 'call'),
    [
        ('softnms', lambda: mmcv.ops.soft_nms(torch.rand(3, 4), torch.rand(3))),
        ('nms_match', lambda: mmcv.ops.nms_match(torch.rand(3, 5), 0.5)),
        (
            'deform_conv_forward',
            lambda: mmcv.ops.DeformConv2d(1, 1, 3)(torch.rand(1, 1, 5, 5), torch.rand(1, 18, 3, 3)),
        ),
    ],
)
def test_other_operators_are_refused_by_name(ours, name, call):
    with pytest.raises(NotImplementedError, match=rf"operator '{name}' .* pip install .* mmcv(-full)?==\d"):
        call()


def test_reports_of_the_environment_are_answered(ours):
    from mmcv.utils import collect_env

    assert 'torchvision' in collect_env()['MMCV Compiler']


def test_stands_in_where_nothing_is_compiled(no_extension, tmp_path):
    mmcv.__path__[:] = [str(tmp_path)]
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert kw_mmdet.use_torchvision_ops()
    module = importlib.import_module('mmcv._ext')
    assert module is mmcv._ext
    assert module.nms is operators.nms
    assert importlib.util.find_spec('mmcv._ext') is not None  # asked by mmcv.utils.check_ops_exist
    assert kw_mmdet.use_torchvision_ops()
    assert importlib.import_module('mmcv._ext') is module


def test_compiled_operators_win(no_extension, tmp_path):
    Path(tmp_path, '_ext.py').write_text('nms = None\n')
    mmcv.__path__[:] = [str(tmp_path)]
    assert not kw_mmdet.use_torchvision_ops()
    assert sys.modules['mmcv._ext'].nms is None


@pytest.mark.parametrize('file', [f'_ext{EXTENSION_SUFFIXES[0]}', '_ext.py'])
def test_compiled_operators_that_cannot_be_loaded_are_told_of(no_extension, tmp_path, file):
    Path(tmp_path, file).write_text('import libtorch_of_another_version\n')
    mmcv.__path__[:] = [str(tmp_path)]
    with pytest.warns(UserWarning, match="cannot be loaded here .* torchvision's are used") as caught:
        assert kw_mmdet.use_torchvision_ops()
    assert len(caught) == 1


def test_missing_mmcv_is_told_in_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, 'mmcv', None)
    with pytest.raises(ImportError, match=r"pip install 'kw-timm\[mmdet\]'"):
        kw_mmdet.use_torchvision_ops()
