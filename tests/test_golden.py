"""The networks agree with the reference implementation, in float64."""

import copy
import json

import pytest
import timm
import torch
import torch.nn.functional as F
from reference_data import CLASSIFICATION, assert_close, golden, reference_input, reference_state_dict
from torch import nn

import kw_timm
from kw_timm.checkpoints import reference_keys


@pytest.fixture(scope='module', params=CLASSIFICATION)
def name(request) -> str:
    return request.param


@pytest.fixture(scope='module')
def loaded(name, tmp_path_factory) -> nn.Module:
    """Write the reference's weights as its weight files are, and load them as a user does."""
    path = tmp_path_factory.mktemp('weights') / f'{name}.pth'
    torch.save({'model': reference_state_dict(name), 'epoch': 299}, path)
    # float64 beforehand: the file's numbers must not pass through float32.
    model = timm.create_model(name, drop_rate=0.0).double()
    kw_timm.load_checkpoint(model, path)
    path.unlink()
    return model


def test_logits_and_pyramid(name, loaded):
    model = copy.deepcopy(loaded).eval()
    numbers, metadata = golden(name)
    assert sum(p.numel() for p in model.parameters()) == int(metadata['param_count'])
    x = reference_input('eval', 2, 3, 64, 64)
    with torch.no_grad():
        for temperature in (0.0, 0.25, 1.0):
            kw_timm.set_temperature(model, temperature)
            assert_close(model(x), numbers[f'logits/temperature={temperature}'])
        kw_timm.set_temperature(model, 0.0)
        final, features = model.forward_intermediates(x)
    features = features[-4:]
    if 'mobilenetv2' in name:
        # The detection pyramid ends in the 1x1 head, and has no stride-2 level.
        features[-1] = final
    for i, feature in enumerate(features):
        assert list(feature.shape) == numbers[f'pyramid_shape/{i}'].tolist()
        assert_close(feature[0, :8], numbers[f'pyramid/{i}'])


def test_training_loss_and_gradients(name, loaded):
    model = copy.deepcopy(loaded).train()
    numbers, metadata = golden(name)
    kw_timm.set_temperature(model, 0.25)
    loss = F.cross_entropy(model(reference_input('train', 2, 3, 64, 64)), torch.tensor([1, 2]))
    assert_close(loss.detach().reshape(1), numbers['train/loss'])
    loss.backward()
    keys = reference_keys(model)
    norms = {keys[key]: p.grad.norm() for key, p in model.named_parameters()}
    expected = dict(zip(json.loads(metadata['param_names']), numbers['train/grad_norm'], strict=True))
    assert norms.keys() == {key for key, norm in expected.items() if norm >= 0}
    # A gradient that is zero but for rounding (a bias before a norm) has no relative accuracy of its own.
    floor = 1e-9 * max(expected.values())
    for key, norm in norms.items():
        assert abs(norm - expected[key]) <= 1e-9 * expected[key] + 1e-6 * floor, key


def test_float32_logits(name, loaded):
    model = copy.deepcopy(loaded).float().eval()
    with torch.no_grad():
        logits = model(reference_input('eval', 2, 3, 64, 64).float()).double()
    assert_close(logits, golden(name)[0]['logits/temperature=0.0'], rtol=1e-4)
