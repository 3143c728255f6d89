"""The detection backbones agree with the reference implementation, in float64."""

import json

import pytest
import torch
from reference_data import DETECTION, assert_close, golden, reference_input, reference_state_dict
from torch import nn

from kw_timm.weights import reference_keys, to_timm_state_dict
from kw_timm.weights.key_tables import rename, timm_names

pytest.importorskip('mmdet', reason='needs MMDetection')
from kw_mmdet import KWBackbone

FROZEN_STAGES = {'resnet50': 1, 'mobilenetv2_100': 1, 'convnext_tiny': -1}


def family(name: str) -> str:
    return next(f for f in ('resnet', 'mobilenetv2', 'convnext') if f in name)


def names_of_reference(model: nn.Module, name: str) -> dict[str, str]:
    """``{key of the backbone's network: key of the reference}``."""
    if name.startswith('kw'):
        return reference_keys(model)
    back = {timm: reference for reference, timm in timm_names(family(name), 'classifier.1').items()}
    return {key: rename(key, back) for key in model.state_dict()}


@pytest.mark.parametrize('name', DETECTION)
def test_features_and_frozen_parameters(name):
    base = name.rpartition('x_')[2]
    backbone = KWBackbone(name, frozen_stages=FROZEN_STAGES[base], norm_eval=True).double()
    numbers, metadata = golden(f'detection_{name}')
    reference = reference_state_dict(f'detection_{name}')

    names = names_of_reference(backbone.model, name)
    if name.startswith('kw'):
        converted = to_timm_state_dict(reference, backbone.model)
    else:
        converted = {rename(key, timm_names(family(name), 'classifier.1')): value for key, value in reference.items()}
    own = backbone.state_dict()
    unused = {key for key in converted if key not in own and f'model.{key}' not in own}
    assert unused <= {'classifier.weight', 'classifier.bias', 'fc.weight', 'fc.bias'}
    backbone.load_state_dict({key: converted[key.removeprefix('model.')] for key in own})

    frozen = {names[key] for key, p in backbone.model.named_parameters() if not p.requires_grad}
    assert frozen == set(json.loads(metadata['frozen']))

    backbone.train()  # norm_eval keeps the running statistics, and there is no drop path
    with torch.no_grad():
        features = backbone(reference_input('detection', 2, 3, 96, 160))
    assert [f.shape[1] for f in features] == list(backbone.out_channels)
    for i, feature in enumerate(features):
        assert list(feature.shape) == numbers[f'feature_shape/{i}'].tolist()
        assert_close(feature.mean((2, 3)), numbers[f'feature_mean/{i}'])
        assert_close(feature[1, :8], numbers[f'feature/{i}'])
