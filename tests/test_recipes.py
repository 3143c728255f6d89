"""The recipes against the rules of the published training, at the first, the middle and the last step."""

import argparse
import json
import math
from pathlib import Path

import pytest
import torch
from test_training import EXACT, NETWORK
from timm.layers import DropPath
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn

from kw_timm import get_temperature
from kw_timm.training import PUBLISHED, RECIPES, recipe_of
from kw_timm.training.loop import Training
from kw_timm.training.network import data_config, network_of
from kw_timm.training.options import add_train_options, resolve

RESNETS_WITHOUT_DROP_PATH = ('resnet18', 'kw1d4x_resnet18', 'kw1d2x_resnet18')
REFERENCE = Path(__file__).parent / 'reference/published.json'


def is_mobilenet(name: str) -> bool:
    return 'mobilenet' in name


def resolved(*options: str):
    parser = argparse.ArgumentParser()
    add_train_options(parser)
    return resolve(parser.parse_args(options))


@pytest.fixture(scope='module', params=sorted(RECIPES))
def name(request) -> str:
    return request.param


@pytest.fixture(scope='module')
def training(name) -> Training:
    """A run by a network's recipe, two batches of four an epoch; of a small network, the recipe does not ask which."""
    options = (*NETWORK, *EXACT, '--recipe', name, '--batch-size', '4', '--generated', '8', '--output', 'nowhere')
    options += ('--hflip', str(RECIPES[name].hflip))  # Which generated images do not get.
    return Training(*resolved(*options), torch.device('cpu'))


def test_generated_images_are_not_mirrored():
    """That would make them images of another class."""
    assert resolved(*NETWORK)[0].hflip == 0
    assert resolved(*NETWORK, '--hflip', '0.5')[0].hflip == 0.5
    assert resolved('folder', *NETWORK)[0].hflip == 0.5


def test_steps(name, training):
    """Learning rate, temperature and weight decay, of the step about to be taken."""
    small = is_mobilenet(name)
    epochs, warmup, annealed = (150, 0, 15) if small else (300, 20, 20)
    peak = 0.05 * 4 / 256 if small else 4e-3 * 4 / 4096
    assert training.recipe.epochs == epochs
    assert training.steps == 2
    total, begun = 2 * epochs, 2 * warmup
    training.network.train()
    for step in (0, 1, begun // 2, begun, 2 * annealed - 1, 2 * annealed, total // 2, total - 1):
        training.scheduler.step_update(step)
        training.network.warehouses.training_passes.fill_(step + 1)
        falling = 1e-6 + (peak - 1e-6) * (1 + math.cos(math.pi * (step - begun) / (total - begun))) / 2
        expected = peak * step / begun if step < begun else falling
        groups = training.optimizer.param_groups
        assert [group['lr'] for group in groups] == pytest.approx([expected] * len(groups), rel=1e-12)
        assert get_temperature(training.network) == pytest.approx(max(0, 1 - (step + 1) / (2 * annealed)), abs=1e-12)
        for group in groups:
            for parameter in group['params']:
                decays = parameter.dim() > 1
                assert group['weight_decay'] == ((4e-5 if small else 0.05) if decays else 0)
    named = {id(p): key for key, p in training.network.named_parameters()}
    undecayed = [named[id(p)] for group in groups if not group['weight_decay'] for p in group['params']]
    assert {key for key in named.values() if key.endswith('bias')} <= set(undecayed)
    assert not any('warehouses' in key for key in undecayed)


def test_optimizer(name, training):
    group = training.optimizer.param_groups[0]
    if is_mobilenet(name):
        assert type(training.optimizer) is torch.optim.SGD
        assert (group['momentum'], group['nesterov']) == (0.9, True)
    else:
        assert type(training.optimizer) is torch.optim.AdamW
        assert (group['eps'], group['betas']) == (1e-8, (0.9, 0.999))
    assert training.recipe.clip_grad is None
    assert training.task.has_ema() == ('convnext' in name)
    if 'convnext' in name:
        assert training.task.get_trainable_module(ema=True).decay == 0.9999


def test_augmentation(name, training):
    """It is the same in all steps."""
    small, mixed = is_mobilenet(name), not is_mobilenet(name) and name != 'kw1d4x_resnet18'
    crop, flip, *others = training.loader.dataset.transform.transforms
    assert type(crop).__name__ == 'RandomResizedCropAndInterpolation'
    assert crop.scale == (0.08, 1.0)
    assert str(crop.interpolation).endswith('BILINEAR' if small else 'BICUBIC')
    assert (type(flip).__name__, flip.p) == ('RandomHorizontalFlip', 0.5)
    kinds = [type(other).__name__ for other in others]
    assert kinds == ([] if small else ['RandAugment']) + ['MaybePILToTensor']
    for operation in [] if small else others[0].ops:
        assert (operation.magnitude, operation.magnitude_std) == (9, 0.5)
    if not small:
        assert others[0].num_layers == 2
        assert any(operation.name == 'SolarizeIncreasing' for operation in others[0].ops)
    erasing = training.loader.random_erasing
    assert (erasing is None) == small
    if erasing is not None:
        assert (erasing.probability, erasing.max_count, erasing.per_pixel) == (0.25, 1, True)
    mixup = training.mixup
    assert (mixup is not None) == mixed
    smoothing = 0.1 if not small or name.startswith(('kw1x', 'kw4x')) else 0
    if mixup is not None:
        found = (mixup.mixup_alpha, mixup.cutmix_alpha, mixup.mix_prob, mixup.switch_prob, mixup.mode)
        assert found == (0.8, 1.0, 1.0, 0.5, 'batch')
        assert mixup.label_smoothing == smoothing
        assert isinstance(training.task.criterion, SoftTargetCrossEntropy)
    elif smoothing:
        assert isinstance(training.task.criterion, LabelSmoothingCrossEntropy)
        assert training.task.criterion.smoothing == smoothing
    else:
        assert isinstance(training.task.criterion, nn.CrossEntropyLoss)
        assert training.task.criterion.label_smoothing == 0


# One of each kind; the others take seconds.
QUICK = ('resnet50', 'convnext_tiny', 'mobilenetv2_050', 'kw1d4x_resnet18', 'kw1x_resnet18')


@pytest.mark.parametrize(
    'name', [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in sorted(RECIPES)]
)
def test_networks(name):
    """Drop path and dropout of the networks themselves, how they begin, and what they are evaluated on."""
    recipe, settings = resolved('--model', name)
    with torch.device('meta'):
        network = network_of(recipe, settings, None)
    expected = 0.3 if name == 'kw1x_convnext_tiny' else 0.0 if is_mobilenet(name) else 0.1
    expected = 0.0 if name in RESNETS_WITHOUT_DROP_PATH else expected
    found = [module.drop_prob for module in network.modules() if isinstance(module, DropPath)]
    if 'convnext' in name:
        assert found == pytest.approx([expected * i / 17 for i in range(18)][-len(found) :], abs=1e-6)
        assert len(found) >= 17
        assert {block.gamma.shape for block in network.stages[0].blocks} == {(96,)}
    else:
        assert set(found) == ({expected} if expected else set())
        assert len(found) == (len([*network.layer1, *network.layer2, *network.layer3, *network.layer4]) if found else 0)
    assert getattr(network, 'drop_rate', 0.0) == 0
    config = data_config(network, settings, published=True)
    assert [config[key] for key in ('input_size', 'crop_pct', 'interpolation')] == [(3, 224, 224), 0.875, 'bicubic']
    assert (config['mean'], config['std']) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert {module.init for module in network.modules() if hasattr(module, 'init')} <= {'published'}


def test_published_numbers():
    rows = json.loads(REFERENCE.read_text())['classification']
    assert {row['name']: (row['top1'], row['top5']) for row in rows} == PUBLISHED


def test_where_values_come_from(tmp_path):
    config = tmp_path / 'run.yaml'
    config.write_text('epochs: 30\nweight_decay: 0.1\nsmoothing: 0\n')
    recipe, settings = resolved('--model', 'kw1x_resnet50', '-c', str(config), '--smoothing', '0.2')
    assert (recipe.epochs, recipe.weight_decay, recipe.smoothing) == (30, 0.1, 0.2)
    # Fewer epochs: the shares stay.
    assert (recipe.warmup_epochs, recipe.temperature_epochs) == (2, 2)
    assert settings.output == Path('train-kw1x_resnet50')
    # From weights: temperature 0.
    recipe, _ = resolved('--model', 'kw1x_resnet50', '--pretrained-static', 'resnet50')
    assert (recipe.temperature_epochs, recipe.init) == (0, 'live')
    recipe, _ = resolved('--model', 'kw1x_resnet50', '--pretrained', '--temperature-epochs', '3')
    assert recipe.temperature_epochs == 3


def test_networks_without_a_recipe():
    assert recipe_of('kw2x_resnet34') == RECIPES['kw1x_resnet18']
    assert recipe_of('kw2x_efficientnet_b0') == RECIPES['kw1x_mobilenetv2_100']
    assert recipe_of('kw1x_resnet18.osvai_in1k', 'resnet50') == RECIPES['resnet50']
