"""The MMDetection backbone: levels, freezing, weights, errors."""

from types import SimpleNamespace

import pytest
import timm
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import kw_timm
from kw_timm.weights import to_reference_state_dict

pytest.importorskip('mmdet', reason='needs MMDetection')
from kw_mmdet import KWBackbone, TemperatureHook
from kw_mmdet.features import PyramidFeatures
from kw_mmdet.generation import BACKBONES
from mmdet_forms import load_checkpoint, save

SMALL = ('kw1x_resnet18', 'kw1x_mobilenetv2_050', 'kw1x_convnext_tiny', 'resnet18', 'mobilenetv2_050', 'regnetx_002')


def without_gradient(module: nn.Module, x: torch.Tensor) -> list[str]:
    sum(f.square().mean() for f in module(x)).backward()
    return [name for name, p in module.named_parameters() if p.requires_grad and p.grad is None]


@pytest.mark.parametrize('name', [*SMALL, 'kw1x_mobilenetv4_conv_small'])
@pytest.mark.parametrize('out_indices', [(0, 1, 2, 3), (1, 2), (-1,)])
def test_levels_and_no_dead_parameters(name, out_indices):
    backbone = BACKBONES.build(dict(type='KWBackbone', name=name, out_indices=out_indices)).train()
    features = backbone(torch.randn(2, 3, 64, 96))
    assert isinstance(features, tuple)
    for feature, channels, stride in zip(features, backbone.out_channels, backbone.strides, strict=True):
        assert feature.shape == (2, channels, 64 // stride, 96 // stride)
    assert [s for i, s in enumerate((4, 8, 16, 32)) if i in {i % 4 for i in out_indices}] == list(backbone.strides)
    assert without_gradient(backbone, torch.randn(2, 3, 64, 64)) == []


def test_mobilenetv2_ends_in_its_head_unless_told_otherwise():
    assert KWBackbone('kw1x_mobilenetv2_100').out_channels == (24, 32, 96, 1280)
    assert KWBackbone('kw1x_mobilenetv2_100', head_conv=False).out_channels == (24, 32, 96, 320)
    assert KWBackbone('kw1x_mobilenetv2_100', out_indices=(0, 1)).out_channels == (24, 32)


@pytest.mark.parametrize('frozen_stages', [-1, 0, 1, 2, 4])
def test_frozen_stages_spare_warehouses(frozen_stages):
    backbone = KWBackbone('kw1x_resnet18', frozen_stages=frozen_stages).train()
    frozen = {name.split('.')[1] for name, p in backbone.named_parameters() if not p.requires_grad}
    expected = ({'conv1', 'bn1'} if frozen_stages >= 0 else set()) | {f'layer{i + 1}' for i in range(frozen_stages)}
    assert frozen == expected
    assert all(p.requires_grad for p in backbone.model.warehouses.parameters())
    modes = {name: m.training for name, m in backbone.model.named_modules() if name.startswith('layer1.')}
    assert any(modes.values()) == (frozen_stages < 1)
    if frozen_stages < 4:  # with all stages frozen only warehouses are left, and they still learn
        assert without_gradient(backbone, torch.randn(2, 3, 64, 64)) == []


@pytest.mark.parametrize('norm_eval', [True, False])
def test_norm_eval_covers_the_attention(norm_eval):
    backbone = KWBackbone('kw1x_resnet18', norm_eval=norm_eval).train()
    norms = [m for m in backbone.modules() if isinstance(m, _BatchNorm)]
    assert any(isinstance(m, nn.BatchNorm1d) for m in norms)
    assert all(m.training != norm_eval for m in norms)
    before = backbone.model.layer1[0].conv1.attention.norm1.running_mean.clone()
    backbone(torch.randn(2, 3, 64, 64))
    assert torch.equal(before, backbone.model.layer1[0].conv1.attention.norm1.running_mean) == norm_eval
    assert not any(m.training for m in backbone.eval().modules())


def test_drop_path_and_layer_scale_reach_the_network():
    backbone = KWBackbone('kw1x_convnext_tiny', drop_path_rate=0.4, ls_init_value=1.0)
    blocks = [block for stage in backbone.model.stages for block in stage.blocks]
    rates = [getattr(block.drop_path, 'drop_prob', 0.0) for block in blocks]
    assert rates == pytest.approx([0.4 * i / 17 for i in range(18)])
    assert all(torch.equal(block.gamma, torch.ones_like(block.gamma)) for block in blocks)
    resnet = KWBackbone('kw1x_resnet18', drop_path_rate=0.1)
    assert [b.drop_path.drop_prob for s in range(1, 5) for b in getattr(resnet.model, f'layer{s}')] == [0.1] * 8


@pytest.mark.parametrize('name', ['kw1x_resnet18', 'kw1d2x_mobilenetv2_050', 'kw1x_convnext_tiny'])
@pytest.mark.parametrize('naming', ['own', 'reference'])
def test_classification_weights_load(name, naming, tmp_path):
    source = timm.create_model(name).eval()
    weights = source.state_dict() if naming == 'own' else to_reference_state_dict(source)
    path = tmp_path / 'weights.pth'
    torch.save({'model': weights}, path)
    for how in (dict(pretrained=str(path)), dict(init_cfg=dict(type='Pretrained', checkpoint=str(path)))):
        backbone = KWBackbone(name, out_indices=(0, 1), out_norms=False, **how).eval()
        backbone.init_weights()
        x = torch.randn(1, 3, 64, 64)
        expected = [f for f in source.forward_intermediates(x, intermediates_only=True) if f.shape[-1] in (16, 8)]
        for ours, theirs in zip(backbone(x), expected, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize('name', ['kw1x_mobilenetv2_050', 'kw1x_convnext_tiny'])
def test_a_static_detectors_weights_are_kept(name, tmp_path):
    """At `KernelizeStatic` the KW backbone computes what the static one of a trained detector computes."""
    static = KWBackbone(name.removeprefix('kw1x_'))
    with torch.no_grad():
        for parameter in static.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    static.double().eval()
    path = tmp_path / 'detector.pth'
    weights = {f'backbone.{key}': value for key, value in static.state_dict().items()}
    torch.save({'state_dict': weights | {'rpn_head.rpn_conv.bias': torch.zeros(4)}}, path)
    x = torch.randn(1, 3, 64, 64).double()
    for prefix in (None, 'backbone.'):
        backbone = KWBackbone(name, init_cfg=dict(type='KernelizeStatic', checkpoint=str(path), prefix=prefix))
        backbone.double().eval().init_weights()
        for ours, theirs in zip(backbone(x), static(x), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_static_weights_that_do_not_exist(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'no weight file .*nowhere\.pth'):
        KWBackbone('kw1x_resnet18', init_cfg=dict(type='KernelizeStatic', checkpoint='nowhere.pth')).init_weights()
    with pytest.raises(ValueError, match=r"'resnet1k' is neither a file nor a network"):
        KWBackbone('kw1x_resnet18', init_cfg=dict(type='KernelizeStatic', checkpoint='timm://resnet1k')).init_weights()


def test_weights_that_do_not_exist_or_fit(tmp_path):
    wrong = tmp_path / 'wrong.pth'
    torch.save(timm.create_model('kw1x_mobilenetv2_050').state_dict(), wrong)
    with pytest.raises(ValueError, match=r'kw1x_mobilenetv2_050.*kw1x_resnet18'):
        KWBackbone('kw1x_resnet18', pretrained=str(wrong)).init_weights()
    with pytest.raises(FileNotFoundError, match=r'no weight file .*nowhere\.pth'):
        KWBackbone('kw1x_resnet18', pretrained=str(tmp_path / 'nowhere.pth')).init_weights()
    with pytest.raises(ValueError, match='not both'):
        KWBackbone('kw1x_resnet18', pretrained=True, init_cfg=dict(type='Pretrained', checkpoint='x'))
    with pytest.raises(ValueError, match='must be dict'):
        KWBackbone('kw1x_resnet18', init_cfg=dict(type='Kaiming')).init_weights()
    with pytest.raises(ValueError, match="weights of 'kw4x_resnet18'"):
        KWBackbone('kw1x_resnet18', init_cfg=dict(type='Pretrained', checkpoint='timm://kw4x_resnet18')).init_weights()


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (dict(name='kw4x_resnet5'), 'no network .*Did you mean kw4x_resnet50'),
        (dict(name='kw1x_resnet18', out_indices=(0, 4)), r'out of range: kw1x_resnet18 has levels 0 to 3'),
        (dict(name='kw1x_resnet18', out_indices=(1, 0)), 'from fine to coarse'),
        (dict(name='kw1x_resnet18', out_indices=()), 'out_indices is empty'),
        (dict(name='kw1x_resnet18', frozen_stages=5), 'frozen_stages=5 is out of range'),
        (dict(name='kw1x_resnet18', head_conv=True), 'no 1x1 head convolution'),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        PyramidFeatures(**arguments)


def test_temperature_reaches_a_detector_backbone():
    backbone = KWBackbone('kw1x_resnet18')
    kw_timm.set_temperature(backbone, 0.5)
    assert kw_timm.get_temperature(backbone.model) == 0.5


def test_temperature_hook_follows_the_schedule():
    backbone = KWBackbone('kw1x_resnet18')
    hook = TemperatureHook(epochs=2)
    runner = SimpleNamespace(model=backbone, data_loader=range(5), train_dataloader=range(5), iter=0)
    for runner.iter in range(12):
        hook.before_train_iter(runner)
        assert kw_timm.get_temperature(backbone) == pytest.approx(max(0.0, 1 - (runner.iter + 1) / 10))
    runner.iter = 3
    hook.before_train_iter(runner)
    hook.before_val_epoch(runner)
    assert kw_timm.get_temperature(backbone) == 0
    with pytest.raises(ValueError, match='epochs of TemperatureHook'):
        TemperatureHook(epochs=0)


def test_a_backbone_that_anneals_by_itself_needs_no_hook(tmp_path):
    backbone = KWBackbone('kw1d2x_mobilenetv2_050', temperature_steps=4).train()
    for expected in (0.75, 0.5):
        backbone(torch.randn(2, 3, 64, 64))
        assert kw_timm.get_temperature(backbone) == expected
    runner = SimpleNamespace(model=backbone, data_loader=range(5), train_dataloader=range(5), iter=0)
    with pytest.raises(ValueError, match=r'anneals its temperature by itself.*TemperatureHook'):
        TemperatureHook(epochs=2).before_train_iter(runner)
    plain = KWBackbone('kw1d2x_mobilenetv2_050')
    plain.load_state_dict(backbone.state_dict())
    backbone.load_state_dict(plain.state_dict())
    assert kw_timm.get_temperature(backbone) == 0.5


def test_framework_checkpoint_holds_weights_alone(tmp_path):
    backbone = KWBackbone('kw1x_resnet18')
    save(backbone, tmp_path / 'checkpoint.pth')
    saved = torch.load(tmp_path / 'checkpoint.pth', weights_only=True)['state_dict']
    assert saved.keys() == backbone.state_dict().keys()
    copy = KWBackbone('kw1x_resnet18')
    load_checkpoint(copy, str(tmp_path / 'checkpoint.pth'), strict=True)
    assert all(torch.equal(a, b) for a, b in zip(copy.state_dict().values(), saved.values(), strict=True))
