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
from kw_timm.weights import reference_keys


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


def training_step(model, x):
    """Return the loss, and the norm of every gradient by the reference's name."""
    model = copy.deepcopy(model).train()
    kw_timm.set_temperature(model, 0.25)
    loss = F.cross_entropy(model(x), torch.tensor([1, 2]))
    loss.backward()
    keys = reference_keys(model)
    return loss.detach(), {keys[key]: p.grad.norm() for key, p in model.named_parameters()}


def test_training_loss_and_gradients(name, loaded):
    numbers, metadata = golden(name)
    x = reference_input('train', 2, 3, 64, 64)
    loss, norms = training_step(loaded, x)
    assert_close(loss.reshape(1), numbers['train/loss'])
    expected = dict(zip(json.loads(metadata['param_names']), numbers['train/grad_norm'], strict=True))
    assert norms.keys() == {key for key, norm in expected.items() if norm >= 0}
    # A gradient that is zero but for rounding (a bias before a norm) has no relative accuracy of its own.
    floor = 1e-9 * max(expected.values())
    errors = {key: abs(norm - expected[key]) - 1e-6 * floor for key, norm in norms.items()}
    far = [key for key, error in errors.items() if error > 1e-9 * expected[key]]
    if far:
        # Norms over two images can amplify rounding beyond that: such a gradient has to agree as well as is known from
        # what the last bit of the images does to it, and still to 1e-8.
        noise = torch.Generator().manual_seed(0)
        near = [
            training_step(loaded, x * (1 + 2e-16 * torch.randn(x.shape, dtype=x.dtype, generator=noise)))[1]
            for _ in range(4)
        ]
        for key in far:
            assert errors[key] <= max(abs(other[key] - norms[key]) for other in near), key
            assert errors[key] <= 1e-8 * expected[key], key


def test_float32_logits(name, loaded):
    model = copy.deepcopy(loaded).float().eval()
    with torch.no_grad():
        logits = model(reference_input('eval', 2, 3, 64, 64).float()).double()
    assert_close(logits, golden(name)[0]['logits/temperature=0.0'], rtol=1e-4)
