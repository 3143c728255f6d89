"""The installed generation of MMDetection with our package: its checkpoints, and configs that inherit ours."""

import logging
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip('mmdet', reason='needs MMDetection')
import kw_mmdet
from kw_mmdet.generation import GENERATION, Config
from mmdet_forms import Recorder, build_detector, load_checkpoint
from torch.utils.data import DataLoader

from kw_timm.weights.unpickle import RefusedFileError, load_pickled

LEAF = 'mask_rcnn/mask_rcnn_kw1x_mobilenetv2_100_fpn_1x_coco.py'

if GENERATION == 2:
    from mmcv.runner import EpochBasedRunner, epoch_based_runner

    def train(folder: Path, epochs: int, resume: Path | None = None) -> int:
        """Train by the framework's own runner, with checkpoints; return the epoch that it began with."""
        model = Recorder()
        optimizer = torch.optim.AdamW(model.parameters())
        logger = logging.getLogger('framework')
        runner = EpochBasedRunner(model, optimizer=optimizer, work_dir=str(folder), logger=logger, max_epochs=epochs)
        runner.meta = dict(hook_msgs=dict(best_score=np.float64(0.5)), scores=np.arange(3.0))
        runner.register_checkpoint_hook(dict(interval=1))
        if resume:
            runner.resume(str(resume))
            assert runner.meta['hook_msgs']['best_score'] == 0.5
        began = runner.epoch
        runner.run([DataLoader(range(2))], [('train', 1)])
        return began

else:
    from mmengine.optim import OptimWrapper
    from mmengine.runner import Runner

    def train(folder: Path, epochs: int, resume: Path | None = None) -> int:
        """Train by the framework's own runner, with checkpoints; return the epoch that it began with."""
        model = Recorder()
        runner = Runner(
            model,
            str(folder),
            train_dataloader=DataLoader(range(2)),
            optim_wrapper=OptimWrapper(torch.optim.AdamW(model.parameters())),
            param_scheduler=[dict(type='MultiStepLR', milestones=[1])],
            train_cfg=dict(by_epoch=True, max_epochs=epochs),
            load_from=resume and str(resume),
            resume=resume is not None,
            default_scope='mmdet',
            experiment_name=f'{folder.name}_{epochs}',
        )
        runner.message_hub.update_info('best_score', np.float64(0.5))
        runner.train()
        return epochs - len(model.rates) // 2


def test_training_resumes_from_its_checkpoint(tmp_path, monkeypatch):
    if GENERATION == 2:
        monkeypatch.setattr(epoch_based_runner.time, 'sleep', lambda seconds: None)
    assert train(tmp_path, 1) == 0
    checkpoint = load_pickled(tmp_path / 'epoch_1.pth')
    assert checkpoint['meta']['epoch'] == 1
    assert checkpoint['optimizer']
    # The reader's own allow-list is gone, the framework's has stayed.
    assert train(tmp_path, 2, resume=tmp_path / 'epoch_1.pth') == 1
    assert (tmp_path / 'epoch_2.pth').is_file()


class Payload:
    """Names a method by `getattr`, as a history of a log does, but one that does harm."""

    def __init__(self, owner: type, name: str) -> None:
        self.arguments = owner, name

    def __reduce__(self):
        return getattr, self.arguments


@pytest.mark.parametrize('arguments', [(np.ndarray, 'tofile'), (dict, 'pop')])
def test_other_methods_are_refused(tmp_path, arguments):
    torch.save({'state_dict': {'a': torch.ones(1)}, 'meta': Payload(*arguments)}, tmp_path / 'x.pth')
    with pytest.raises(pickle.UnpicklingError):
        load_checkpoint(torch.nn.Linear(1, 1), str(tmp_path / 'x.pth'), map_location='cpu')
    with pytest.raises(RefusedFileError, match='nothing of it was run'):
        load_pickled(tmp_path / 'x.pth')


BASES = [f"__import__('kw_mmdet').configs_path('{LEAF}')"] + ([f"'kw_mmdet::{LEAF}'"] if GENERATION == 3 else [])


@pytest.mark.parametrize('base', BASES)
def test_configs_are_inherited_from_anywhere(tmp_path, base):
    path = tmp_path / 'mine.py'
    path.write_text(f'_base_ = {base}\nmodel = dict(backbone=dict(init_cfg=None))\n')
    config = Config.fromfile(str(path))
    assert (config.model.type, config.model.backbone.name) == ('MaskRCNN', 'kw1x_mobilenetv2_100')
    with torch.device('meta'):
        assert isinstance(build_detector(config.model).backbone, kw_mmdet.KWBackbone)


def test_a_config_that_does_not_exist():
    with pytest.raises(FileNotFoundError, match=r'no config .*Beside it are: .*mask_rcnn_resnet50_fpn_1x_coco.py'):
        kw_mmdet.configs_path('mask_rcnn/mask_rcnn_resnet500.py')
