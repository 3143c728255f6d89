"""The temperature while MMDetection 3.x trains, by mmengine's loops."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import kw_timm
from kw_timm.layers import KWConv2d, Warehouse

pytest.importorskip('mmengine.runner', reason='needs MMDetection 3.x')
from kw_mmdet import TemperatureHook
from mmengine.evaluator import BaseMetric
from mmengine.hooks import EMAHook
from mmengine.model import BaseModel
from mmengine.runner import Runner

STEPS = 3  # per epoch


class Images(Dataset):
    def __len__(self) -> int:
        return 2 * STEPS

    def __getitem__(self, i: int) -> torch.Tensor:
        return torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(i))


class Detector(BaseModel):
    """Notes the temperature of every training step and evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.warehouse = Warehouse([(4, 3, 3, 3)])
        self.layer = KWConv2d(3, 4, 3, warehouse=self.warehouse)
        self.steps: list[float] = []
        self.seen: list[float] = []

    def forward(self, inputs, mode: str = 'tensor'):
        (self.steps if mode == 'loss' else self.seen).append(kw_timm.get_temperature(self))
        x = torch.stack(list(inputs)) if isinstance(inputs, list | tuple) else inputs
        return dict(loss=self.layer(x).square().mean()) if mode == 'loss' else [dict()] * len(x)

    def train_step(self, data, optim_wrapper):
        with optim_wrapper.optim_context(self):
            losses = self(data, mode='loss')
        optim_wrapper.update_params(losses['loss'])
        return losses

    def val_step(self, data):
        return self(data, mode='predict')


class Nothing(BaseMetric):
    def process(self, data_batch, data_samples) -> None:
        self.results.append(0)

    def compute_metrics(self, results) -> dict:
        return {'acc': 0.0}


@pytest.mark.parametrize('ema', [False, True])
@pytest.mark.parametrize('by_epoch', [True, False])
def test_evaluation_is_at_zero_and_training_goes_on(tmp_path, by_epoch, ema):
    loader = DataLoader(Images(), batch_size=2)
    loop = dict(by_epoch=True, max_epochs=3, val_interval=1)
    runner = Runner(
        model=Detector(),
        work_dir=str(tmp_path),
        train_dataloader=loader,
        val_dataloader=loader,
        val_evaluator=[Nothing()],
        val_cfg=dict(),
        train_cfg=loop if by_epoch else dict(by_epoch=False, max_iters=3 * STEPS, val_interval=2),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=1e-4)),
        custom_hooks=[TemperatureHook(epochs=2)] + ([EMAHook()] if ema else []),
        experiment_name=f'temperature_{by_epoch}_{ema}_{tmp_path.name}',
    )
    runner.train()
    model: nn.Module = runner.model
    assert model.steps == pytest.approx([max(0.0, 1 - (i + 1) / (2 * STEPS)) for i in range(3 * STEPS)])
    assert len(model.seen) >= 3 * STEPS
    assert set(model.seen) == {0.0}
