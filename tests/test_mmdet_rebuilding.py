"""Tools of MMDetection that rebuild networks must not change what timm's networks compute."""

import copy
import importlib

import pytest
import timm
import torch
from networks import lively
from timm.layers import BatchNormAct2d
from timm.layers import convert_sync_batchnorm as timm_convert
from torch import nn

pytest.importorskip('mmdet', reason='needs MMDetection')
import mmcv.cnn
from kw_mmdet import KWBackbone

NAMES = ('mobilenetv2_050', 'kw1d2x_mobilenetv2_050', 'kw1x_resnet18', 'resnet18')


class Detector(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.backbone = lively(KWBackbone(name))
        self.neck = nn.Sequential(nn.Conv2d(self.backbone.out_channels[0], 8, 1), nn.BatchNorm2d(8))
        self.neck[1].running_mean.uniform_()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        features = self.backbone(x)
        return (*features, self.neck(features[0]))


@pytest.mark.parametrize('name', NAMES)
def test_fusing_leaves_features_as_they_are(name):
    detector, x = Detector(name).eval(), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = detector(x)
        with pytest.warns(UserWarning, match='optimize_for_inference'):
            fused = mmcv.cnn.fuse_conv_bn(copy.deepcopy(detector))
        assert isinstance(fused.neck[1], nn.Identity)  # what is MMDetection's own is fused
        for actual, wanted in zip(fused(x), expected, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-5)
        for module in (detector.backbone, detector.backbone.model):
            with pytest.warns(UserWarning, match='leaves'):
                assert mmcv.cnn.fuse_conv_bn(module) is module
        for actual, wanted in zip(detector(x), expected, strict=True):
            assert torch.equal(actual, wanted)


def test_fusing_a_timm_network_alone():
    network, x = lively(timm.create_model('mobilenetv2_050')), torch.randn(1, 3, 64, 64)
    with torch.no_grad(), pytest.warns(UserWarning, match='leaves EfficientNet'):
        assert torch.equal(mmcv.cnn.fuse_conv_bn(copy.deepcopy(network))(x), network(x))


def test_synchronized_norms_keep_their_activations():
    """There and back; SyncBatchNorm itself computes on GPUs alone."""
    try:
        revert = importlib.import_module('mmcv.cnn.utils.sync_bn').revert_sync_batchnorm
        convert = timm_convert
    except ModuleNotFoundError:
        tools = importlib.import_module('mmengine.model.utils')
        revert, convert = tools.revert_sync_batchnorm, tools.convert_sync_batchnorm
    backbone, x = lively(KWBackbone('kw1x_mobilenetv2_050')), torch.randn(2, 3, 64, 64)
    synchronized = convert(copy.deepcopy(backbone))
    assert any(isinstance(m, nn.SyncBatchNorm) for m in synchronized.modules())
    plain = revert(synchronized).eval()
    assert sum(type(m) is BatchNormAct2d for m in plain.modules()) == sum(
        type(m) is BatchNormAct2d for m in backbone.modules()
    )
    assert not any(isinstance(m, nn.SyncBatchNorm) for m in plain.modules())
    with torch.no_grad():
        for actual, wanted in zip(plain(x), backbone(x), strict=True):
            assert torch.equal(actual, wanted)


def test_complexity_is_counted():
    detector = Detector('kw1x_resnet18')
    flops, params = (
        mmcv.cnn.get_model_complexity_info(detector, (3, 64, 64), print_per_layer_stat=False, as_strings=False)
        if hasattr(mmcv.cnn, 'get_model_complexity_info')
        else (1, 0)
    )
    assert flops > 0
    assert params in (0, sum(p.numel() for p in detector.parameters()))
