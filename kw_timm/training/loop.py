"""The loop around timm's parts: epochs, steps, what happens when something happens, and going on from there."""

import argparse
import math
import signal
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import ClassificationTask
from timm.utils import NativeScaler, dispatch_clip_grad

from .. import anneal, get_temperature
from . import state as states
from .data import DataError, batches, count_classes, loader_for, make_dataset, unreadable
from .evaluate import evaluate
from .logs import Logs
from .network import attentions, data_config, network_of
from .recipes import Recipe

__all__ = ['Diverged', 'Interrupted', 'Training']


class Diverged(ValueError):
    """The loss is no number any more."""


class Interrupted(KeyboardInterrupt):
    """Someone asked to stop; the run is saved."""


@dataclass
class Progress:
    """Where a run is.

    Attributes:
        epoch: Epoch that is trained, from 0.
        batch: Micro-batches of it that are done.
        step: Steps of the optimizer, of all epochs.
        loss: Sum of the losses of the epoch's micro-batches.
        best: Best top-1 so far, in percent.
        best_epoch: Its epoch.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    loss: float = 0.0
    best: float = -1.0
    best_epoch: int = -1


class Training:
    """A run: everything that is needed for the next step.

    Args:
        recipe: How to train.
        settings: Everything else, see :mod:`kw_timm.training.options`.
        device: Where.
        rank: Number of this process.
        world: How many there are.

    Raises:
        ValueError: If data, network and options do not fit one another.
    """

    def __init__(
        self, recipe: Recipe, settings: argparse.Namespace, device: torch.device, rank: int = 0, world: int = 1
    ) -> None:
        self.recipe, self.settings, self.device, self.rank, self.world = recipe, settings, device, rank, world
        states.seed_all(settings.seed, 0, rank)
        dataset, held_out = make_dataset(settings, True), make_dataset(settings, False)
        classes = count_classes(dataset)
        network: Any = network_of(recipe, settings, classes).to(device)
        self.network: Any = network
        if classes and classes > self.network.num_classes:
            raise ValueError(
                f'The data has {classes} classes, the network {self.network.num_classes}; give --num-classes.'
            )
        config = data_config(network, settings, published=True)
        self.loader = loader_for(dataset, config, settings, recipe, device)
        self.held_out = loader_for(held_out, config, settings, None, device)
        self.batches = len(self.loader)
        if not self.batches:
            raise DataError(
                f'The {len(dataset)} images are fewer than a batch: give --batch-size {max(len(dataset) // world, 1)}.'
            )
        self.steps = math.ceil(self.batches / settings.grad_accum_steps)
        self.is_kw = bool(attentions(network))
        if self.is_kw and recipe.temperature_epochs:
            anneal(network, recipe.temperature_epochs * self.batches)
        self.images_per_step = settings.batch_size * settings.grad_accum_steps * world
        self.lr = settings.lr or recipe.lr_base * self.images_per_step / recipe.lr_base_size
        self.optimizer = create_optimizer_v2(
            network,
            opt=recipe.opt,
            lr=self.lr,
            weight_decay=recipe.weight_decay,
            momentum=recipe.momentum,
            **({'eps': recipe.opt_eps} if recipe.opt_eps else {}),
        )
        self.scheduler, _ = create_scheduler_v2(
            self.optimizer,
            sched='cosine',
            num_epochs=recipe.epochs - recipe.warmup_epochs,
            warmup_epochs=recipe.warmup_epochs,
            warmup_prefix=True,
            warmup_lr=recipe.warmup_lr,
            min_lr=recipe.min_lr,
            step_on_epochs=False,
            updates_per_epoch=self.steps,
        )
        self.mixup = self._mixup()
        self.task = self._task()
        amp = settings.amp
        self.autocast = torch.autocast(device.type, getattr(torch, settings.amp_dtype)) if amp else nullcontext()
        self.scaler: Any = NativeScaler(device=device.type) if amp and settings.amp_dtype == 'float16' else None
        self.layout = torch.channels_last if settings.channels_last else torch.contiguous_format
        self.at, self.logs = Progress(), Logs(None, 0, 0, 0)
        self._loss = torch.zeros((), device=device)  # Of the epoch, without waiting for the device.
        self._random: dict[str, Any] = {}  # When the checkpoint was made that the run goes on from.
        self.asked = self.stop = False  # By a signal to this process; of any process, as all know.

    def _mixup(self) -> Mixup | None:
        recipe = self.recipe
        if not (recipe.mixup or recipe.cutmix):
            return None
        return Mixup(
            mixup_alpha=recipe.mixup,
            cutmix_alpha=recipe.cutmix,
            prob=recipe.mixup_prob,
            switch_prob=recipe.mixup_switch_prob,
            mode=recipe.mixup_mode,
            label_smoothing=recipe.smoothing,
            num_classes=self.network.num_classes,
        )

    def _task(self) -> ClassificationTask:
        settings, recipe = self.settings, self.recipe
        if settings.channels_last:
            self.network.to(memory_format=torch.channels_last)
        if settings.sync_bn and self.world > 1:
            self.network = torch.nn.SyncBatchNorm.convert_sync_batchnorm(self.network)
        loss = dict(smoothing=recipe.smoothing, soft_targets=self.mixup is not None)
        task = ClassificationTask(self.network, criterion_kwargs=loss, device=self.device, verbose=False)
        if recipe.model_ema:
            task.setup_ema(decay=recipe.model_ema_decay)
        if settings.torchcompile:
            task.compile(backend=settings.torchcompile)
            task.compile_ema(backend=settings.torchcompile)
        if self.world > 1:
            task.prepare_distributed(device_ids=[self.device] if self.device.type == 'cuda' else None)
        return task

    def run(self) -> Progress:
        """Train to the end, from where :meth:`resume` left it.

        Raises:
            Diverged: If the loss is no number any more.
            Interrupted: If someone asked to stop.
            DataError: If images can no longer be read.
            OSError: If what was trained could not be saved at the end.
        """
        at, shown = self.at, self.settings.output if self.rank == 0 else None
        self.logs = Logs(shown, self.recipe.epochs * self.steps, at.step, at.epoch)
        try:
            with self._stopping():
                while at.epoch < self.recipe.epochs:
                    self._epoch()
                    last = at.epoch + 1 == self.recipe.epochs
                    self._evaluate_and_save(must=last)
        except DataError as error:
            if self.world == 1:  # Others do not know.
                self._keep()
            raise DataError(f'{error} {self._where()}') from error
        except RuntimeError as error:
            if 'DataLoader worker' not in str(error):
                raise
            # torch says so wherever it is; within a step, which is not whole, nothing can be saved.
            raise DataError(f'{unreadable(error)} {self._where()}') from error
        finally:
            self.logs.close()
        return at

    def _epoch(self) -> None:
        at, group = self.at, self.settings.grad_accum_steps
        begun = at.batch  # More than 0 after an interruption within the epoch.
        if begun == 0:
            at.loss = 0.0
            states.seed_all(self.settings.seed, at.epoch + 1, self.rank)
        for part in (self.loader.sampler, self.loader.dataset):
            if hasattr(part, 'set_epoch'):
                part.seed = self.settings.seed
                part.set_epoch(at.epoch)
        self.network.train()
        for attention in attentions(self.network) if self.settings.attention == 'frozen' else ():
            attention.eval()
        for number, (images, target) in enumerate(self._reading(begun), begun):
            size = min(group, self.batches - number // group * group)
            is_last = (number + 1) % group == 0 or number + 1 == self.batches
            self._batch(images, target, size, is_last)
            at.batch = number + 1
            if is_last:
                self._step_is_done()
        self.optimizer.zero_grad()

    def _reading(self, begun: int) -> Iterator[Any]:
        """Yield the batches of the epoch; those that were done are read again, so that the rest is as it would be."""
        stream, reading = states.Stream(self.settings.seed, self.at.epoch + 1, self.rank, 1), batches(self.loader)
        if begun:
            self.logs.say(f'reading {begun} of {self.batches} batches again')
        for number in range(self.batches):
            with stream.drawing():
                batch = next(reading, None)
            if batch is None:  # A stream that is shorter than it says.
                break
            if number == begun - 1:
                states.restore_random_state(self._random)
            if number >= begun:
                yield batch

    def _batch(self, images: torch.Tensor, target: torch.Tensor, size: int, is_last: bool) -> None:
        if self.mixup is not None:
            images, target = self.mixup(images, target)
        images = images.contiguous(memory_format=self.layout)
        parameters, clip = self.task.get_clip_parameters(), self.recipe.clip_grad
        with nullcontext() if is_last else self.task.no_sync():
            with self.autocast:
                loss = self.task(images, target)['loss']
            self._loss = loss.detach() if self.at.batch == 0 else self._loss + loss.detach()
            if is_last:
                self._look()
            if self.scaler is not None:
                self.scaler(loss / size, self.optimizer, clip_grad=clip, parameters=parameters, need_update=is_last)
            else:
                (loss / size).backward()
        if is_last:
            if self.scaler is None:
                if clip:
                    dispatch_clip_grad(parameters, clip)
                self.optimizer.step()
            self.optimizer.zero_grad()

    def _look(self, always: bool = False) -> None:
        """Look whether the loss is a number, on a GPU now and then, and whether any process was asked to stop."""
        if not always and self.device.type != 'cpu' and self.at.step % self.settings.log_interval:
            return
        seen = torch.stack([self._loss.double(), torch.tensor(float(self.asked), device=self.device).double()])
        if self.world > 1:
            dist.all_reduce(seen)
        self.at.loss, self.stop = float(seen[0]) / self.world, bool(seen[1])
        if not math.isfinite(self.at.loss):
            at, lr = self.at, self.optimizer.param_groups[0]['lr']
            raise Diverged(
                f'The loss became {self.at.loss} in epoch {at.epoch + 1}, step {at.step + 1}, at a learning rate of '
                f'{lr:.3g}; nothing was saved since. Lower --lr or set --clip-grad 1. {self._where()}'
            )

    def _step_is_done(self) -> None:
        at, every = self.at, self.settings.recovery_interval
        at.step += 1
        self.task.update_ema(step=at.step)
        self.scheduler.step_update(at.step)
        self.logs.step(at.epoch, self.images_per_step)
        if at.batch == self.batches:
            return
        if self.stop or (self.asked and self.world == 1):
            self._look(always=True)
            self._keep()
            raise Interrupted(f'Stopped in epoch {at.epoch + 1}, after step {at.step}. {self._where()}')
        if every and at.step % every == 0:
            self._look(always=True)
            self._save(states.LAST)

    def _evaluate_and_save(self, must: bool) -> None:
        at = self.at
        self._look(always=True)
        ema = self.task.has_ema()
        rates = dict(lr=self.optimizer.param_groups[0]['lr'])
        if self.is_kw:
            rates['temperature'] = get_temperature(self.network)
        found = evaluate(self.task.get_eval_model(ema=ema), self.held_out, self.device, self.autocast, self.layout)
        found = {key: found[key] for key in ('loss', 'top1', 'top5')}
        self.logs.epoch(at.epoch, at.step, dict(loss=at.loss / self.batches, **rates), found)
        is_best = found['top1'] > at.best
        if is_best:
            at.best, at.best_epoch = found['top1'], at.epoch
        at.epoch, at.batch = at.epoch + 1, 0
        self._save(states.LAST, *([states.BEST] if is_best else []), must=must)
        if self.stop and at.epoch < self.recipe.epochs:
            raise Interrupted(f'Stopped after epoch {at.epoch}. {self._where()}')

    def _keep(self) -> None:
        """Save what is there, of steps that are whole."""
        if self.at.batch % self.settings.grad_accum_steps == 0 and (self.at.batch or self.at.epoch):
            self._save(states.LAST)

    def _save(self, *names: str, must: bool = False) -> None:
        """Save the run; a disk without room stops nothing but the last time."""
        mine = states.random_state()
        each: list[Any] = [mine] * self.world
        if self.world > 1:
            dist.all_gather_object(each, mine)
        if self.rank:
            return
        state = {
            **self.task.get_checkpoint_state(),
            **self.task.get_checkpoint_state(ema=True),
            'arch': self.settings.model,
            'epoch': self.at.epoch - (self.at.batch == 0),
            'version': 2,
            'optimizer': self.optimizer.state_dict(),
            'metric': self.at.best,
            'run': asdict(self.at),
            'random': each,
            'options': options_of(self.recipe, self.settings, self.world),
        }
        if self.scaler is not None:
            state[self.scaler.state_dict_key] = self.scaler.state_dict()
        try:
            states.save(state, *(self.settings.output / name for name in names))
        except OSError as error:
            text = f'The run could not be saved ({error}). {self._where()}'
            if must:
                raise OSError(f'{text} Make room and resume: the steps since are computed again.') from error
            self.logs.say(f'{text} Training goes on and tries again; make room.')

    def _where(self) -> str:
        file = self.settings.output / states.LAST
        if not file.is_file():
            return 'Nothing was saved yet.'
        return f"'{file}' holds what was saved last; go on from there with --resume."

    def resume(self, file: Path) -> None:
        """Go on from a checkpoint.

        Raises:
            ValueError: If it is none, or was made by another number of processes within an epoch.
        """
        state = states.load(file)
        self.at = Progress(**state['run'])
        if len(state['random']) != self.world and self.at.batch:
            raise ValueError(
                f"'{file}' was saved within an epoch by {len(state['random'])} processes, now there are {self.world}; "
                f'start as many.'
            )
        other = differences(state['options'], options_of(self.recipe, self.settings, self.world))
        if other and self.rank == 0:
            print(f'kw-timm: the run goes on with other options than before: {", ".join(other)}')
        self.task.load_checkpoint_state(state['state_dict'])
        if self.task.has_ema():
            self.task.load_checkpoint_state(state['state_dict_ema'], ema=True)
        self.optimizer.load_state_dict(state['optimizer'])
        if self.scaler is not None and self.scaler.state_dict_key in state:
            self.scaler.load_state_dict(state[self.scaler.state_dict_key])
        self.scheduler.step_update(self.at.step)
        self._loss = torch.tensor(self.at.loss, device=self.device, dtype=getattr(torch, self.settings.model_dtype))
        self._random = state['random'][min(self.rank, len(state['random']) - 1)]

    @contextmanager
    def _stopping(self) -> Iterator[None]:
        """Let Ctrl-C and SIGTERM end the run after the step; a second one at once."""

        def stop(number: int, frame: Any) -> None:
            if self.asked:
                raise KeyboardInterrupt
            self.asked = True
            self.logs.say('stopping after this step; once more stops at once')

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def options_of(recipe: Recipe, settings: argparse.Namespace, world: int) -> dict[str, Any]:
    """Return all options as plain data, for checkpoints and ``args.yaml``."""
    values = {**asdict(recipe), **vars(settings), 'processes': world}
    return {key: str(value) if isinstance(value, Path) else value for key, value in values.items()}


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Say which options differ that what is computed depends on."""
    free = ('output', 'resume', 'log_interval', 'recovery_interval', 'data_dir', 'device', 'validation_batch_size')
    return [
        f'{key} {before.get(key)!r} -> {now.get(key)!r}'
        for key in dict.fromkeys([*before, *now])
        if key not in free and before.get(key) != now.get(key)
    ]
