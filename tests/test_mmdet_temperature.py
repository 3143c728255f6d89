"""The temperature while MMDetection 2.x trains: of every step as scheduled, of everything between steps 0."""

import logging

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

import kw_timm
from kw_timm.layers import KWConv2d, Warehouse

pytest.importorskip('mmdet', reason='needs MMDetection')
pytest.importorskip('mmcv.runner', reason='needs MMDetection 2.x')
import mmcv.runner as runners
from kw_mmdet import TemperatureHook

STEPS = 3  # per epoch


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    """mmcv sleeps two seconds in every epoch."""
    monkeypatch.setattr('time.sleep', lambda _: None)


class Images(Dataset):
    def __len__(self) -> int:
        return 2 * STEPS

    def __getitem__(self, i: int) -> torch.Tensor:
        return torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(i))

    def evaluate(self, results, logger=None, **kwargs):
        return {'acc': 0.0}


class Detector(nn.Module):
    """Notes the temperature of every training step, of its gradient, and of validation."""

    def __init__(self) -> None:
        super().__init__()
        self.warehouse = Warehouse([(4, 3, 3, 3)])
        self.layer = KWConv2d(3, 4, 3, warehouse=self.warehouse)
        self.checkpointing = False
        self.steps: list[float] = []
        self.backward: list[float] = []
        self.validated: list[float] = []

    def train_step(self, images, optimizer=None, **kwargs):
        self.steps.append(kw_timm.get_temperature(self))
        features = checkpoint(self.layer, images, use_reentrant=False) if self.checkpointing else self.layer(images)
        features.register_hook(lambda _: self.backward.append(kw_timm.get_temperature(self)))
        return dict(loss=features.square().mean(), log_vars={}, num_samples=1)

    def val_step(self, images, optimizer=None, **kwargs):
        self.validated.append(kw_timm.get_temperature(self))
        return dict(loss=torch.zeros(()), log_vars={}, num_samples=1)


def scheduled(steps: int, epochs: float) -> list[float]:
    return [max(0.0, 1 - (i + 1) / (epochs * STEPS)) for i in range(steps)]


class Training:
    """A runner with hooks in an order that people may choose, and what evaluation saw."""

    def __init__(self, folder, kind: str = 'EpochBasedRunner', late: bool = False, **evaluation) -> None:
        self.seen: list[float] = []
        model = Detector()
        length = dict(max_epochs=3) if kind == 'EpochBasedRunner' else dict(max_iters=3 * STEPS)
        optimizer = torch.optim.SGD(model.parameters(), 1e-4)
        logger = logging.getLogger('temperature')
        self.runner = getattr(runners, kind)(
            model, optimizer=optimizer, work_dir=str(folder), logger=logger, meta={}, **length
        )
        loader = DataLoader(Images(), batch_size=2)
        hooks = [TemperatureHook(epochs=2)]
        evaluate = runners.EvalHook(loader, test_fn=self.evaluate, **evaluation) if evaluation else None
        hooks += [evaluate] if evaluate else []
        for hook in reversed(hooks) if late else hooks:
            self.runner.register_hook(hook)
        self.runner.register_optimizer_hook(dict(grad_clip=None))

    def evaluate(self, model, loader):
        self.seen.append(kw_timm.get_temperature(model))
        return [None] * len(loader.dataset)

    def run(self, *modes: str) -> None:
        modes = modes or ('train',)
        self.runner.run([DataLoader(Images(), batch_size=2) for _ in modes], [(mode, 1) for mode in modes])


@pytest.mark.parametrize('late', [False, True])
@pytest.mark.parametrize('kind', ['EpochBasedRunner', 'IterBasedRunner'])
@pytest.mark.parametrize('by_epoch', [True, False])
def test_evaluation_is_at_zero_and_training_goes_on(tmp_path, kind, late, by_epoch):
    training = Training(tmp_path, kind, late, interval=1 if by_epoch else 2, by_epoch=by_epoch)
    training.run()
    model = training.runner.model
    assert model.steps == pytest.approx(scheduled(3 * STEPS, 2))
    assert model.backward == pytest.approx(model.steps)
    assert set(training.seen) == {0.0} or (kind == 'IterBasedRunner' and by_epoch)
    assert kw_timm.get_temperature(model) == 0


def test_evaluation_before_the_first_step(tmp_path):
    training = Training(tmp_path, 'IterBasedRunner', interval=1, by_epoch=False, start=0)
    training.run()
    assert training.seen == [0.0] * (3 * STEPS + 1)
    assert training.runner.model.steps == pytest.approx(scheduled(3 * STEPS, 2))


@pytest.mark.parametrize('kind', ['EpochBasedRunner', 'IterBasedRunner'])
def test_validation_in_the_workflow(tmp_path, kind):
    training = Training(tmp_path, kind)
    training.run('train', 'val')
    model = training.runner.model
    assert set(model.validated) == {0.0}
    assert model.steps == pytest.approx(scheduled(3 * STEPS, 2))


def test_resumed_training_goes_on_where_it_was(tmp_path):
    first = Training(tmp_path, interval=1)
    first.runner._max_epochs = 1
    first.runner.register_hook(runners.CheckpointHook(interval=1))
    first.run()
    second = Training(tmp_path, interval=1)
    # Its own file: torch refuses mmcv's meta data unless it is said to be trusted.
    saved = torch.load(tmp_path / 'epoch_1.pth', weights_only=False)
    second.runner.model.load_state_dict(saved['state_dict'], strict=False)
    second.runner._epoch, second.runner._iter = saved['meta']['epoch'], saved['meta']['iter']
    second.run()
    assert first.runner.model.steps + second.runner.model.steps == pytest.approx(scheduled(3 * STEPS, 2))
    assert second.seen == [0.0, 0.0]


def test_averaged_weights_are_evaluated_at_zero(tmp_path):
    training = Training(tmp_path, interval=1)
    training.runner.register_hook(runners.EMAHook(), priority='HIGH')
    add = torch.Tensor.add_
    # mmcv 1.7 calls it as torch has not taken it for long: add_(number, tensor).
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch.Tensor, 'add_', lambda x, a, b=None, **k: add(x, b, alpha=a) if b is not None else add(x, a, **k)
        )
        training.run()
    assert training.seen == [0.0] * 3
    assert training.runner.model.steps == pytest.approx(scheduled(3 * STEPS, 2))


def test_checkpointed_gradients_are_those_of_the_step(tmp_path):
    """mmcv goes backward after the iteration, when checkpointing computes forward again."""
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        training = Training(tmp_path, interval=1, by_epoch=False)
        model = training.runner.model
        model.checkpointing = checkpointing
        model.layer.attention.norm1.eval()
        noted: list[torch.Tensor] = []
        model.warehouse.weight.register_hook(lambda g, noted=noted: noted.append(g.clone()))
        training.run()
        gradients.append(noted)
    assert len(gradients[0]) == 3 * STEPS
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)
