"""What timm knows of the variants before anyone runs one: names, sizes, cfgs, construction options."""

import pytest
import timm
import torch
from networks import PARAMETERS, SMALLEST, VARIANTS, images
from reference_data import CLASSIFICATION, manifest
from timm.layers import DropPath
from torch import nn

import kw_timm
from kw_timm.layers import KWAttention, KWLayer
from kw_timm.models import KWConvNeXt, KWMobileNetV2, KWResNet
from kw_timm.models.derived import DERIVED
from kw_timm.weights import reference_keys


def test_lists_the_released_variants_apart_from_the_others():
    assert sorted(timm.list_models('kw*')) == sorted([*VARIANTS, *DERIVED])
    assert sorted(timm.list_models('kw*', pretrained=True)) == sorted(f'{name}.osvai_in1k' for name in VARIANTS)
    assert sorted(timm.list_models('kw*', include_tags=True)) == sorted(
        [*(f'{name}.osvai_in1k' for name in VARIANTS), *DERIVED]
    )
    assert sorted(name for name in VARIANTS if 'resnet' in name) == sorted(timm.list_models(module='kw_resnet'))


def test_unknown_variant():
    with pytest.raises(RuntimeError, match='Unknown model \\(kw3x_resnet18\\)'):
        timm.create_model('kw3x_resnet18')


@pytest.fixture(scope='module')
def shells() -> dict[str, nn.Module]:
    """Every variant, without storage."""
    with torch.device('meta'):
        return {name: timm.create_model(name) for name in VARIANTS}


@pytest.mark.parametrize('name', VARIANTS)
def test_parameters(name, shells):
    assert sum(p.numel() for p in shells[name].parameters()) == PARAMETERS[name]


@pytest.mark.parametrize('name', VARIANTS)
def test_names_are_timms_own(name, shells):
    """Static entries are named as in timm's network; warehouses and attentions come on top, no tensor twice."""
    model = shells[name]
    static = {'resnet': name[-8:], 'mobilenetv2': 'mobilenetv2_100', 'convnext': 'convnext_tiny'}[model.family]
    own = {key for key in model.state_dict() if not key.startswith('warehouses.') and '.attention.' not in key}
    with torch.device('meta'):
        assert own < set(
            timm.create_model(static, **({'conv_mlp': True} if model.family == 'convnext' else {})).state_dict()
        )
    parameters = [id(p) for _, p in model.named_parameters(remove_duplicate=False)]
    assert len(parameters) == len(set(parameters))
    layers = [module for module in model.modules() if isinstance(module, KWLayer)]
    registered = {id(warehouse) for warehouse in model.warehouses.values()}
    assert {id(layer.__dict__['warehouse']) for layer in layers} == registered


@pytest.mark.parametrize('name', CLASSIFICATION)
def test_reference_names_and_shapes(name, shells):
    model = shells[name]
    keys, reference = reference_keys(model), manifest(name)
    assert set(keys.values()) == set(reference)
    for key, value in model.state_dict().items():
        expected = reference[keys[key]]
        assert tuple(value.shape) == ((expected[1],) if key.endswith('.gamma') else expected)


@pytest.mark.parametrize('name', VARIANTS)
def test_evaluation_settings(name, shells):
    config = timm.data.resolve_model_data_config(shells[name])
    assert config == {
        'input_size': (3, 224, 224),
        'interpolation': 'bilinear' if 'mobilenetv2' in name else 'bicubic',
        'mean': (0.485, 0.456, 0.406),
        'std': (0.229, 0.224, 0.225),
        'crop_pct': 0.875,
        'crop_mode': 'center',
    }
    cfg = shells[name].pretrained_cfg
    assert (cfg['architecture'], cfg['tag'], cfg['num_classes']) == (name, 'osvai_in1k', 1000)
    assert cfg['license'] == 'apache-2.0'
    assert '2406.07879' in cfg['paper_ids']


@pytest.mark.parametrize('name', VARIANTS)
def test_cfg_names_the_stem_and_the_classifier(name, shells):
    cfg, keys = shells[name].default_cfg, shells[name].state_dict()
    assert f'{cfg["classifier"]}.weight' in keys
    assert f'{cfg["first_conv"]}.weight' in keys


def test_transforms_of_the_data_config(shells):
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(shells['kw1x_resnet18']))
    sizes = [getattr(step, 'size', None) for step in transform.transforms]
    assert sizes[:2] == [256, (224, 224)]


@pytest.mark.parametrize(
    ('name', 'norm', 'bias'),
    [(SMALLEST[0], nn.BatchNorm1d, 0), (SMALLEST[1], nn.BatchNorm1d, 0), (SMALLEST[2], nn.LayerNorm, 1)],
)
def test_norm_of_the_attention(name, norm, bias, shells):
    for module in shells[name].modules():
        if isinstance(module, KWAttention):
            assert isinstance(module.norm1, norm)
            assert (module.fc1.bias is not None) == bias


def test_non_local_basis_in_one_variant_only(shells):
    having = {name for name in VARIANTS if any(hasattr(m, 'fc3') for m in shells[name].modules())}
    assert having == {'kw1d2x_resnet50'}


@pytest.mark.parametrize('name', VARIANTS)
def test_default_dropout(name, shells):
    expected = 0.1 if 'resnet' in name or 'kw1d2x_mobilenetv2' in name else 0.0
    model = shells[name]
    assert (model.head.drop.p if 'convnext' in name else model.drop_rate) == expected
    assert not any(isinstance(module, DropPath) for module in model.modules())


@pytest.mark.parametrize('name', ['kw1x_resnet18', 'kw1d2x_resnet50'])
def test_drop_path_has_one_rate_in_every_resnet_block(name):
    with torch.device('meta'):
        model = timm.create_model(name, drop_path_rate=0.2)
    blocks = [block for stage in (model.layer1, model.layer2, model.layer3, model.layer4) for block in stage]
    assert [block.drop_path.drop_prob for block in blocks] == [0.2] * len(blocks)


def test_drop_path_grows_with_depth_in_convnext():
    with torch.device('meta'):
        model = timm.create_model('kw1x_convnext_tiny', drop_path_rate=0.3)
    rates = [module.drop_prob for module in model.modules() if isinstance(module, DropPath)]
    assert rates == sorted(rates)
    assert rates[-1] == pytest.approx(0.3)


def test_drop_rates_take_effect_in_training_only():
    model = timm.create_model('kw1x_mobilenetv2_050', drop_rate=0.5, drop_path_rate=0.5)
    assert (model.drop_rate, max(m.drop_prob for m in model.modules() if isinstance(m, DropPath)) > 0.4) == (0.5, True)
    x = images()
    assert torch.equal(model.eval()(x), model(x))
    assert not torch.equal(model.train()(x), model(x))


@pytest.mark.parametrize(('name', 'cls'), zip(SMALLEST, (KWResNet, KWMobileNetV2, KWConvNeXt), strict=True))
def test_classes_are_timms(name, cls, shells):
    assert type(shells[name]) is cls
    assert isinstance(shells[name], (timm.models.ResNet, timm.models.EfficientNet, timm.models.ConvNeXt))
    assert isinstance(shells[name], kw_timm.models.KWNetwork)


def test_device_and_type_arguments():
    model = timm.create_model('kw1x_resnet18', device='meta', dtype=torch.float16)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {('meta', torch.float16)}


@pytest.mark.parametrize(('ratio', 'message'), [(1.5, 'does not add up'), (0.0, 'must be a positive number')])
def test_bad_ratios(ratio, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model('kw1x_resnet18', cell_num_ratio=ratio)


def test_initial_weights_of_static_layers():
    torch.manual_seed(0)
    resnet = timm.create_model('kw1x_resnet18')
    assert resnet.conv1.weight.std().item() == pytest.approx((2 / (64 * 49)) ** 0.5, rel=0.05)
    mobile = timm.create_model('kw1d2x_mobilenetv2_050')
    assert mobile.blocks[2][1].conv_pw.weight.std().item() == pytest.approx((2 / 96) ** 0.5, rel=0.1)
    convnext = timm.create_model('kw1x_convnext_tiny')
    assert convnext.head.fc.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not convnext.head.fc.bias.any()
