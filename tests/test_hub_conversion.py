"""Weight files of the authors convert both ways to the last bit: 15 variants, the static networks, the detectors."""

from pathlib import Path

import pytest
import timm
import torch
from hub_support import NAME, VARIANT, reference_checkpoint, reference_shapes, synthetic
from kw_hub import convert_file
from kw_hub.convert import export_to_backbone, export_to_reference
from kw_hub.errors import HubError
from kw_hub.source import read_source
from kw_hub.verify import verify_file, verify_folder
from reference_data import CLASSIFICATION, manifest

from kw_timm.weights.detectors import detector_to_ours, detector_to_reference, export_backbone
from kw_timm.weights.exact import (
    assert_same_tensors,
    recognise_network,
    to_reference_exact,
    to_timm_exact,
)
from kw_timm.weights.static import STATIC_NETWORKS
from kw_timm.weights.variants import released_names

CONFIGS = Path(__file__).parents[1] / 'configs/mask_rcnn'
NETWORKS = [*released_names(), *STATIC_NETWORKS]
DETECTORS = [
    'resnet50',
    'kw1x_resnet50',
    'kw4x_resnet50',
    'mobilenetv2_100',
    'kw1x_mobilenetv2_100',
    'kw4x_mobilenetv2_100',
    'convnext_tiny',
    'kw1x_convnext_tiny',
]


def quick(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    return {k: torch.randn(s) if not k.endswith('num_batches_tracked') else torch.tensor(3) for k, s in shapes.items()}


@pytest.mark.parametrize('name', NETWORKS)
def test_networks_convert_both_ways(name):
    reference = quick(reference_shapes(name))
    network = recognise_network(reference)
    assert (network.name, network.num_classes, network.in_chans) == (name, 1000, 3)
    converted = to_timm_exact(reference, network)
    assert converted.keys() == network.skeleton().state_dict().keys()
    back = to_reference_exact(converted, network)
    assert list(back) == list(reference)
    assert_same_tensors(back, reference)
    # Ours are recognised and accepted like theirs.
    assert recognise_network(converted) == network
    assert_same_tensors(to_timm_exact(converted, network), converted)


@pytest.mark.parametrize('name', [*CLASSIFICATION, *STATIC_NETWORKS])
def test_keys_come_back_in_the_order_of_the_reference(name):
    shapes = manifest(name)
    with torch.device('meta'):
        reference = {key: torch.empty(shape) for key, shape in shapes.items()}
    network = recognise_network(reference)
    # safetensors sorts keys, so that a stored file's order tells nothing.
    converted = {key: torch.empty(value.shape) for key, value in sorted(network.skeleton().state_dict().items())}
    back = to_reference_exact(converted, network)
    assert list(back) == list(shapes)
    assert {key: tuple(value.shape) for key, value in back.items()} == shapes


def test_there_are_fifteen_variants_and_five_static_networks():
    assert len(NETWORKS) == 20


@pytest.mark.parametrize('network', STATIC_NETWORKS)
def test_static_networks_load_into_timms_own(network):
    reference = synthetic(manifest(network), torch.float32)
    model = timm.create_model(network)
    model.load_state_dict(to_timm_exact(reference, recognise_network(reference)))
    first = next(iter(model.parameters()))
    assert torch.equal(first, next(iter(reference.values())))


def test_static_file_converts_for_timms_own_network(tmp_path):
    reference = synthetic(manifest('mobilenetv2_050'))
    torch.save({'model': reference}, tmp_path / 'file.pth')
    converted = convert_file(tmp_path / 'file.pth', output=tmp_path / 'out', quiet=True)
    assert converted.name == 'mobilenetv2_050.osvai_in1k'
    model = timm.create_model(f'local-dir:{converted.folder}', pretrained=True)
    assert torch.equal(model.classifier.weight, reference['classifier.1.weight'])
    assert any('known answer agrees' in line for line in verify_folder(converted.folder))
    export_to_reference(converted.folder, tmp_path / 'back.pth')
    back = torch.load(tmp_path / 'back.pth')['model']
    assert_same_tensors(back, reference)
    assert list(back) == list(reference)


@pytest.mark.parametrize('backbone', DETECTORS)
def test_detectors_convert_both_ways_and_load_strictly(backbone):
    mmdet_models = pytest.importorskip('mmdet.models', reason='needs MMDetection')
    from mmcv import Config

    from kw_timm.weights.exact import Network

    name = f'mask_rcnn_{backbone}_fpn_1x_coco'
    config = Config.fromfile(str(CONFIGS / f'{name}.py'))
    import kw_mmdet  # noqa: F401

    detector = mmdet_models.build_detector(config.model)
    own = detector.state_dict()
    # Backbone as the reference's manifests have it (or its classification file), the rest under MMDetection's names.
    try:
        shapes = manifest(f'detection_{backbone}')
    except FileNotFoundError:
        shapes = reference_shapes(Network(backbone).name)
    reference = quick(
        {f'backbone.{key}': shape for key, shape in shapes.items()}
        | {key: tuple(value.shape) for key, value in own.items() if not key.startswith('backbone.')}
    )
    converted = detector_to_ours(reference)
    assert converted.name == name
    detector.load_state_dict(converted.state_dict, strict=True)
    assert bool(converted.unused) == ('convnext' not in backbone)
    assert_same_tensors(detector_to_reference(converted), reference)

    network = converted.backbone.create()
    network.load_state_dict(export_backbone(converted), strict=True)
    stem = next(key for key in converted.state_dict if key.startswith('backbone.model.') and key.endswith('.weight'))
    assert torch.equal(network.state_dict()[stem.removeprefix('backbone.model.')], converted.state_dict[stem])


def test_detector_file_converts_exports_and_gives_its_backbone(tmp_path):
    body = {'neck.fpn_convs.0.conv.weight': torch.randn(4, 4), 'rpn_head.rpn_conv.weight': torch.randn(4, 4)}
    body['roi_head.mask_head.conv_logits.bias'] = torch.randn(80)
    backbone = quick(manifest('detection_kw1x_mobilenetv2_100'))
    for key in backbone:
        if key.endswith('running_var'):
            backbone[key].abs_()
    reference = body | {f'backbone.{k}': v for k, v in backbone.items()}
    file = tmp_path / 'detector.pth'
    meta = {'epoch': 12, 'CLASSES': ('person', 'bicycle'), 'mmdet_version': '2.11.0'}
    torch.save({'meta': meta, 'state_dict': reference, 'optimizer': {'state': {}}}, file)

    converted = convert_file(file, output=tmp_path / 'out', quiet=True)
    assert converted.name == 'mask_rcnn_kw1x_mobilenetv2_100_fpn_1x_coco'
    written = torch.load(tmp_path / 'out' / f'{converted.name}.pth')
    assert written['meta'] == meta
    assert 'backbone.model.conv_stem.attention.fc1.weight' in written['state_dict']
    assert not any('classifier' in key for key in written['state_dict'])
    assert verify_folder(tmp_path / 'out')

    export_to_reference(tmp_path / 'out', tmp_path / 'back.pth')
    back = torch.load(tmp_path / 'back.pth')
    assert back['meta'] == meta
    assert_same_tensors(back['state_dict'], reference)

    exported = export_to_backbone(tmp_path / 'out', tmp_path / 'backbone')
    model = timm.create_model(
        f'local-dir:{exported.folder}', pretrained=True, features_only=True, out_indices=(1, 2)
    ).eval()
    assert [f.shape[1] for f in model(torch.randn(1, 3, 64, 64))] == [24, 32]
    with pytest.raises(HubError, match='no detector'):
        export_to_backbone(exported.folder, tmp_path / 'again')


def test_converted_detector_loads_as_dist_test_does(tmp_path):
    mmdet_models = pytest.importorskip('mmdet.models', reason='needs MMDetection')
    import kw_mmdet  # noqa: F401
    from mmcv import Config
    from mmcv.runner import load_checkpoint

    name = 'mask_rcnn_kw1x_mobilenetv2_100_fpn_1x_coco'
    detector = mmdet_models.build_detector(Config.fromfile(str(CONFIGS / f'{name}.py')).model)
    neck_and_heads = {k: tuple(v.shape) for k, v in detector.state_dict().items() if not k.startswith('backbone.')}
    backbone = manifest('detection_kw1x_mobilenetv2_100')
    reference = quick({f'backbone.{key}': shape for key, shape in backbone.items()} | neck_and_heads)
    torch.save({'meta': {'CLASSES': ('person',), 'epoch': 12}, 'state_dict': reference}, tmp_path / 'theirs.pth')
    converted = convert_file(tmp_path / 'theirs.pth', output=tmp_path / 'ours', quiet=True)
    checkpoint = load_checkpoint(detector, str(tmp_path / 'ours' / f'{name}.pth'), map_location='cpu', strict=True)
    assert converted.name == name
    assert checkpoint['meta']['CLASSES'] == ('person',)
    loaded = detector.state_dict()
    assert torch.equal(loaded['roi_head.mask_head.conv_logits.bias'], reference['roi_head.mask_head.conv_logits.bias'])
    stem = loaded['backbone.model.warehouses.stem.weight']
    assert torch.equal(stem, reference['backbone.warehouse_manager.weights.0'])


def test_converted_folder_is_what_timm_loads(converted_folder, reference_file):
    assert sorted(p.name for p in converted_folder.iterdir()) == [
        'config.json',
        'known_answer.safetensors',
        'model.safetensors',
        'weights.json',
    ]
    model = timm.create_model(f'local-dir:{converted_folder}', pretrained=True)
    theirs = torch.load(reference_file, weights_only=False)['model']
    assert torch.equal(model.warehouses['layer1'].weight, theirs['warehouse_manager.weights.0'])
    assert model.pretrained_cfg['tag'] == 'osvai_in1k'
    checks = ' '.join(verify_folder(converted_folder))
    assert 'known answer agrees' in checks
    assert '4,031,768' in checks


def test_export_gives_back_every_bit(converted_folder, reference_file, tmp_path):
    assert export_to_reference(converted_folder, tmp_path / 'back.pth') == VARIANT
    theirs = torch.load(reference_file, weights_only=False)['model']
    assert_same_tensors(torch.load(tmp_path / 'back.pth')['model'], theirs)
    with pytest.raises(HubError, match='there already'):
        export_to_reference(converted_folder, tmp_path / 'back.pth')


@pytest.fixture(scope='module')
def averaged(tmp_path_factory):
    """A file with averaged weights besides, which its training code wrapped."""
    file = tmp_path_factory.mktemp('ema') / 'ema.pth'
    checkpoint = reference_checkpoint(VARIANT)
    checkpoint['model_ema'] = {f'module.{key}': value + 1 for key, value in checkpoint['model'].items()}
    torch.save(checkpoint, file)
    return file, checkpoint


@pytest.mark.parametrize(('choice', 'entry'), [('auto', 'model_ema'), ('ema', 'model_ema'), ('model', 'model')])
def test_averaged_weights_can_be_chosen(averaged, choice, entry):
    file, checkpoint = averaged
    source = read_source(file, choice)
    assert source.entry == entry
    expected = checkpoint['model']['fc.bias'] + (1 if entry == 'model_ema' else 0)
    assert torch.equal(source.state_dict['fc.bias'], expected)


def test_averaged_weights_that_are_not_there(reference_file):
    with pytest.raises(HubError, match='no averaged'):
        read_source(reference_file, 'ema')


@pytest.mark.parametrize('kind', ['half', 'channels_last', 'legacy', 'bare'])
def test_unusual_files_load(kind, tmp_path):
    weights = synthetic(reference_shapes(VARIANT))
    if kind == 'half':
        weights = {k: v.half() if v.is_floating_point() else v for k, v in weights.items()}
    if kind == 'channels_last':
        weights = {
            k: v.contiguous(memory_format=torch.channels_last) if v.dim() == 4 else v for k, v in weights.items()
        }
        assert not weights['conv1.weight'].is_contiguous()
    file = tmp_path / 'file.pth'
    content = weights if kind == 'bare' else {'model': weights}
    torch.save(content, file, _use_new_zipfile_serialization=kind != 'legacy')
    converted = convert_file(file, output=tmp_path / 'out', quiet=True)
    assert converted.name == NAME
    verify_folder(converted.folder)
    export_to_reference(converted.folder, tmp_path / 'back.pth')
    assert_same_tensors(torch.load(tmp_path / 'back.pth')['model'], weights)


def test_other_classes_and_channels(tmp_path):
    from kw_timm.weights.exact import Network

    network = Network('kw1x_mobilenetv2_050', num_classes=7, in_chans=1)
    weights = to_reference_exact({k: v.float() for k, v in network.create().state_dict().items()}, network)
    file = tmp_path / 'own.pth'
    torch.save({'model': weights}, file)
    converted = convert_file(file, output=tmp_path / 'out', quiet=True)
    assert converted.network == network
    model = timm.create_model(f'local-dir:{converted.folder}', pretrained=True).eval()
    assert model(torch.randn(1, 1, 64, 64)).shape == (1, 7)
    with pytest.raises(HubError, match='7 classes and 1 input'):
        convert_file(file, store=True, quiet=True)


def test_what_does_not_fit_is_named(reference_file, tmp_path):
    checkpoint = torch.load(reference_file, weights_only=False)['model']
    without = {key: value for key, value in checkpoint.items() if key != 'layer3.0.bn1.weight'}
    with pytest.raises(ValueError, match=r'missing: layer3\.0\.bn1\.weight'):
        to_timm_exact(without, recognise_network(without))
    with pytest.raises(ValueError, match='unexpected: extra'):
        to_timm_exact({**checkpoint, 'extra': torch.zeros(1)}, recognise_network(checkpoint))
    with pytest.raises(ValueError, match='no released variant'):
        recognise_network({'a': torch.zeros(3)})
    changed = {**checkpoint, 'fc.bias': checkpoint['fc.bias'] + 1}
    with pytest.raises(ValueError, match=r"'fc\.bias' changed"):
        assert_same_tensors(changed, checkpoint)
    with pytest.raises(ValueError, match='expected kw4x_resnet50'):
        convert_file(reference_file, tmp_path / 'out', expected='kw4x_resnet50.osvai_in1k', quiet=True)
    assert not (tmp_path / 'out').exists()


def test_verify_notices_a_single_changed_bit(stored):
    import json

    from safetensors.torch import load_file, save_file

    from kw_timm.weights.store import DamagedWeightsError, sha256_of

    file = stored / 'model.safetensors'
    weights = load_file(file)
    weights['layer1.0.bn1.weight'][0] += 0.01
    save_file(weights, file, metadata={'format': 'pt'})
    with pytest.raises(DamagedWeightsError, match='sha256'):
        verify_folder(stored)
    record = json.loads((stored / 'weights.json').read_text())
    (stored / 'weights.json').write_text(json.dumps(record | {'sha256': sha256_of(file)}))
    with pytest.raises(HubError, match='answers differently'):
        verify_folder(stored)


def test_verify_names_a_config_that_does_not_fit(stored):
    config = (stored / 'config.json').read_text()
    for other in ('kw1d2x_resnet18', 'no_such_network'):
        (stored / 'config.json').write_text(config.replace(VARIANT, other))
        with pytest.raises((HubError, ValueError), match=r'does not load|weights are of'):
            verify_folder(stored)


def test_verify_a_file(reference_file):
    assert NAME in verify_file(reference_file)[0]
