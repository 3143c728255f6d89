"""KW networks in MMPreTrain: the documentation's config, trained by mmengine's runner, is plain SGD on real images."""

import copy
import multiprocessing
import os
import socket
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from test_docs import ROOT, blocks
from torch import nn

import kw_timm
from kw_timm.layers.annealing import without_passes
from kw_timm.training.data import GeneratedImages

pytest.importorskip('mmpretrain', reason='needs pip install mmpretrain, and MMDetection 3.x or mmengine')
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from mmpretrain.registry import MODELS
from mmpretrain.structures import DataSample

NAME = 'kw1d4x_resnet18'
SIZE, CLASSES, IMAGES, STEPS, RATE = 64, 10, 4, 8, 0.1
PLAIN = dict(num_classes=CLASSES, drop_rate=0.0, drop_path_rate=0.0)
MEAN, STD = (torch.tensor(v).view(3, 1, 1) for v in ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375]))


@pytest.fixture(autouse=True)
def _scope():
    """Whatever a runner leaves behind, tests of MMDetection in the same process find their own registry."""
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        yield


@pytest.fixture(scope='module')
def documented(tmp_path_factory) -> Config:
    """The config that users copy."""
    (code,) = (code for _, code in blocks(ROOT / 'docs' / 'training.md', 'python') if 'TimmClassifier' in code)
    file = tmp_path_factory.mktemp('documented') / 'kw.py'
    file.write_text(code)
    return Config.fromfile(file)


@pytest.fixture(scope='module')
def start() -> nn.Module:
    """The network that training begins with, as nothing anneals it."""
    torch.manual_seed(0)
    return timm.create_model(NAME, **PLAIN).train()


@pytest.fixture
def config(documented, start, tmp_path) -> Config:
    """It, with a smaller network that begins with weights from a file, and few images: a step is an epoch."""
    data = GeneratedImages(IMAGES, size=SIZE)
    for number in range(IMAGES):
        image, target = data[number]
        file = tmp_path / 'images' / str(target) / f'{number}.png'
        file.parent.mkdir(parents=True)
        image.save(file)
    torch.save(start.state_dict(), tmp_path / 'start.pth')
    config = copy.deepcopy(documented)
    config.model.update(model_name=NAME, temperature_steps=STEPS, checkpoint_path=str(tmp_path / 'start.pth'), **PLAIN)
    loader = dict(
        batch_size=IMAGES,
        num_workers=0,
        sampler=dict(type='DefaultSampler', shuffle=False),
        dataset=dict(
            type='CustomDataset',
            data_root=str(tmp_path / 'images'),
            pipeline=[dict(type='LoadImageFromFile'), dict(type='PackInputs')],
        ),
    )
    config.train_dataloader = config.val_dataloader = config.test_dataloader = loader
    config.val_evaluator = config.test_evaluator = dict(type='Accuracy')
    config.optim_wrapper = dict(optimizer=dict(type='SGD', lr=RATE))
    config.train_cfg, config.param_scheduler = dict(by_epoch=True, max_epochs=1, val_interval=1), []
    config.work_dir, config.experiment_name, config.log_level = str(tmp_path / 'run'), tmp_path.name, 'ERROR'
    return config


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """The images as MMPreTrain's pipeline is to hand them over."""
    images, labels = zip(*(GeneratedImages(IMAGES, size=SIZE)[i] for i in range(IMAGES)), strict=True)
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)
    return ((pixels - MEAN) / STD).contiguous(), torch.tensor(labels)


def step(model: nn.Module, temperature: float) -> nn.Module:
    """Take a step of plain SGD."""
    kw_timm.set_temperature(model, temperature)
    model.zero_grad()
    images, labels = batch()
    nn.functional.cross_entropy(model(images), labels).backward()
    torch.optim.SGD(model.parameters(), RATE).step()
    return model


def difference(found: nn.Module, expected: nn.Module) -> float:
    """Return the largest difference of a weight, running statistics included."""
    weights, wanted = without_passes(found.state_dict()), expected.state_dict()
    assert weights.keys() == wanted.keys()
    return max(float((weights[key] - value).abs().max()) for key, value in wanted.items())


def test_the_config_of_the_documentation(documented):
    model = MODELS.build(documented.model).model
    assert type(model).__name__ == 'KWResNet'
    assert model.num_classes == 1000
    assert kw_timm.get_temperature(model.train()) == 1
    assert {'train_dataloader', 'optim_wrapper', 'train_cfg', 'val_evaluator'} <= documented.keys()


def test_steps_evaluation_and_resuming(config, start, tmp_path):
    """A step is plain SGD's at the temperature of the first pass; evaluation is at 0; the second goes on counting."""
    runner = Runner.from_cfg(config)
    runner.train()
    expected = step(copy.deepcopy(start), 1 - 1 / STEPS)
    assert difference(runner.model.model, expected) < 1e-5
    assert difference(step(copy.deepcopy(start), 0.0), expected) > 1e-3
    assert runner.model.model.warehouses.training_passes == 1

    saved = timm.create_model(NAME, **PLAIN)
    kw_timm.load_checkpoint(saved, tmp_path / 'run' / 'epoch_1.pth')
    assert difference(runner.model.model, saved) == 0
    found = runner.test()
    with torch.no_grad():
        logits = saved.eval()(batch()[0])
    assert found['accuracy/top1'] == 100 * float((logits.argmax(1) == batch()[1]).float().mean())
    (data,) = runner.test_dataloader
    scores = torch.stack([sample.pred_score for sample in runner.model.test_step(data)])
    torch.testing.assert_close(scores, logits.softmax(1), rtol=1e-4, atol=1e-5)

    config.train_cfg.max_epochs, config.resume = 2, True
    config.experiment_name += '_resumed'
    runner = Runner.from_cfg(config)
    runner.train()
    assert runner.model.model.warehouses.training_passes == 2
    assert difference(runner.model.model, step(expected, 1 - 2 / STEPS)) < 1e-4


def test_a_backbone_anneals_itself():
    """By MMPreTrain's wrapper of timm's backbones, also of a network whose classifier, which goes, is a KW layer."""
    backbone = dict(type='TIMMBackbone', model_name='kw1d2x_mobilenetv2_050', temperature_steps=STEPS)
    head = dict(type='LinearClsHead', num_classes=CLASSES, in_channels=1280)
    model = MODELS.build(
        dict(type='ImageClassifier', backbone=backbone, neck=dict(type='GlobalAveragePooling'), head=head)
    )
    before = copy.deepcopy(model.state_dict())
    model.init_weights()
    assert all(torch.equal(value, before[key]) for key, value in model.backbone.state_dict(prefix='backbone.').items())
    images, labels = batch()
    samples = [DataSample().set_gt_label(label) for label in labels]
    model.train()(images, samples, mode='loss')['loss'].backward()
    assert kw_timm.get_temperature(model) == 1 - 1 / STEPS
    assert all(p.grad is not None for name, p in model.named_parameters() if 'warehouses.' in name)


def in_one_of_two(rank: int, port: str, config: Config, folder: Path) -> None:
    """Train in one of two processes."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=port)
    runner = Runner.from_cfg(config)
    runner.train()
    torch.save(runner.model.module.state_dict(), folder / f'{rank}.pth')


def test_two_processes(config, start, tmp_path):
    """Each counts its own passes, one a step; the step is that of the mean of their gradients."""
    config.launcher, config.train_dataloader.batch_size = 'pytorch', IMAGES // 2
    config.val_dataloader = config.val_evaluator = config.val_cfg = None
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = str(probe.getsockname()[1])
    fork = multiprocessing.get_context('fork')  # Importing MMPreTrain anew takes longer than the test.
    processes = [fork.Process(target=in_one_of_two, args=(rank, port, config, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(100)
        assert process.exitcode == 0
    images, labels = batch()
    gradients = []
    for rank in range(2):
        model = copy.deepcopy(start)
        kw_timm.set_temperature(model, 1 - 1 / STEPS)
        nn.functional.cross_entropy(model(images[rank::2]), labels[rank::2]).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for rank in range(2):
        found = torch.load(tmp_path / f'{rank}.pth', weights_only=True)
        assert found['warehouses.training_passes'] == 1
        for (key, before), *both in zip(start.named_parameters(), *gradients, strict=True):
            torch.testing.assert_close(found[key], before - RATE * sum(both) / 2, rtol=1e-4, atol=1e-5)
