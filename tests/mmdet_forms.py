"""What the configs make of the installed generation of MMDetection, told in one form for both.

    python tests/mmdet_forms.py CONFIGS DATA CHECKPOINTS OUT

CONFIGS is the folder of configs, DATA one with `annotations.json` and images in COCO's format, CHECKPOINTS one with
`NAME.pth` by MMDetection 2 for each of `TRIED`. Writes OUT by `torch.save`, and beside it a checkpoint of each of
`TRIED`, as the installed generation writes it.
"""

import itertools
import logging
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kw_mmdet  # noqa: F401  (registers, and lets torch read checkpoints)
import numpy as np
import torch
from kw_mmdet.generation import GENERATION, Config
from torch import nn
from torch.utils.data import DataLoader

# Configs of which outputs are compared: the demo, and a static network of the published table.
TRIED = ('shapes/mask_rcnn_kw1x_mobilenetv2_050_fpn_shapes', 'faster_rcnn/faster_rcnn_mobilenetv2_100_fpn_1x_coco')
STEPS = 60  # of an epoch, where schedules are followed
SEEDS = 3  # of which the training pipeline is followed


def all_configs(folder: Path) -> list[str]:
    """Names of the configs: paths in the folder without suffix."""
    return sorted(str(p.relative_to(folder).with_suffix('')) for p in folder.glob('[!_]*/*.py'))


class Recorder(nn.Module):
    """A model that learns nothing and writes down the learning rate of every step."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.rates: list[float] = []

    def train_step(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Take a step, as either runner asks for it."""
        optimizer = kwargs.get('optim_wrapper') or args[1]
        self.rates.append(optimizer.param_groups[0]['lr'])
        getattr(optimizer, 'optimizer', optimizer).step()
        outputs = dict(loss=torch.zeros(()))
        return outputs | dict(log_vars={}, num_samples=1) if GENERATION == 2 else outputs


if GENERATION == 2:
    from mmcv.parallel import collate, scatter
    from mmcv.runner import EpochBasedRunner, build_optimizer, epoch_based_runner, load_checkpoint, save_checkpoint
    from mmdet.apis import inference_detector
    from mmdet.datasets import PIPELINES as TRANSFORMS
    from mmdet.datasets import build_dataset
    from mmdet.models import build_detector

    def optimizer_of(model: nn.Module, config: Config) -> torch.optim.Optimizer:
        """The optimizer that training would use."""
        return build_optimizer(model, config.optimizer)

    def learning_rates(config: Config, folder: str) -> list[float]:
        """The learning rate of every step of the training, for a parameter at the base rate."""
        model = Recorder()
        optimizer = torch.optim.AdamW(model.parameters(), lr=config.optimizer.lr)
        logger = logging.getLogger('forms')
        epoch_based_runner.time = SimpleNamespace(sleep=lambda seconds: None)  # it waits two seconds in every epoch
        runner = EpochBasedRunner(model, optimizer=optimizer, logger=logger, max_epochs=config.runner.max_epochs)
        runner.register_lr_hook(config.lr_config)
        runner.run([DataLoader(range(STEPS))], [('train', 1)])
        return model.rates

    def settings(config: Config) -> dict[str, Any]:
        """What training and testing do, besides model, optimizer and schedule."""
        data, pipeline = config.data, config.data.train.pipeline
        test = data.test.pipeline[1]
        step = {s.type: s for s in pipeline}
        return dict(
            transforms=[s for s in map(plain_step, pipeline) if s],
            images=[step[k][n] for k, n in (('Normalize', 'mean'), ('Normalize', 'std'), ('Pad', 'size_divisor'))],
            rgb=step['Normalize'].to_rgb,
            batch=data.samples_per_gpu,
            workers=data.workers_per_gpu,
            epochs=config.runner.max_epochs,
            data=[(data[s].type, data[s].ann_file, data[s].img_prefix) for s in ('train', 'val', 'test')],
            classes=[data[s].get('classes') for s in ('train', 'val', 'test')],
            test=(test.img_scale, test.transforms[0].keep_ratio, test.flip),
            metric=config.evaluation.metric,
            evaluated=config.evaluation.get('interval', 1),
            scaling=config.auto_scale_lr,
            hooks=config.custom_hooks,
            kept=(config.checkpoint_config.interval, config.checkpoint_config.get('max_keep_ckpts', -1)),
            logged=config.log_config.interval,
        )

    def plain_step(step: Any) -> tuple[Any, ...] | None:
        """One step of the training pipeline in the common form."""
        match step.type:
            case 'LoadAnnotations':
                return 'annotations', step.with_bbox, step.get('with_mask', False)
            case 'RandomFlip':
                return 'flip', step.flip_ratio, step.get('direction', 'horizontal')
            case 'Resize':
                scale = step.img_scale
                return 'resize', scale if isinstance(scale, list) else [scale], step.keep_ratio
            case 'AutoAugment':
                return 'one of', [[plain_step(s) for s in policy] for policy in step.policies]
            case 'RandomCrop':
                return 'crop', {k: v for k, v in step.items() if k != 'type'}
        return None

    def policies(step: Any) -> list[list[Any]] | None:
        """What a step chooses from, if it does."""
        return step.get('policies')

    def with_data(config: Config, data: Path) -> Config:
        """Use a small data set and small test images."""
        config.data.train.update(ann_file=str(data / 'annotations.json'), img_prefix=f'{data}/')
        config.data.test.pipeline[1].img_scale = (192, 160)
        return config

    def training_set(config: Config) -> Any:
        """The training data set without its pipeline."""
        config.data.train.pipeline = []
        return build_dataset(config.data.train)

    def first_of(dataset: Any, index: int) -> dict[str, Any]:
        """What the pipeline gets of an image."""
        found = dict(img_info=dataset.data_infos[index], ann_info=dataset.get_ann_info(index))
        dataset.pre_pipeline(found)
        return found

    def batch_of(samples: list[Any], model: nn.Module) -> dict[str, Any]:
        """What the model trains on."""
        return scatter(collate(samples, len(samples)), [-1])[0]

    def contents(batch: dict[str, Any]) -> dict[str, Any]:
        """Image and annotations of a batch of one, as tensors."""
        found = dict(image=batch['img'], boxes=batch['gt_bboxes'][0], labels=batch['gt_labels'][0])
        masks = batch.get('gt_masks')
        return found if masks is None else found | dict(masks=torch.from_numpy(masks[0].to_ndarray()))

    def losses_of(model: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
        """Its losses."""
        return model(**batch)

    def detections(model: nn.Module, image: Path) -> list[Any]:
        """Boxes with scores, labels, and masks or None, best first."""
        result = inference_detector(model, str(image))
        boxes, masks = result if isinstance(result, tuple) else (result, None)
        labels = np.concatenate([np.full(len(b), i) for i, b in enumerate(boxes)])
        order = np.argsort(-np.concatenate(boxes)[:, 4], kind='stable')
        if masks is not None:
            masks = torch.from_numpy(np.stack(list(itertools.chain(*masks)))[order])
        return [torch.from_numpy(np.concatenate(boxes)[order]), torch.from_numpy(labels[order]), masks]

    def save(model: nn.Module, path: Path) -> None:
        """Write a checkpoint, with a numpy value in it as evaluation leaves it."""
        save_checkpoint(model, str(path), meta=dict(hook_msgs=dict(best_score=np.float64(0.5)), CLASSES=('a',)))

else:
    from mmdet.apis import inference_detector
    from mmdet.registry import DATASETS, MODELS, TRANSFORMS
    from mmengine.logging import MessageHub
    from mmengine.optim import OptimWrapper, build_optim_wrapper
    from mmengine.registry import init_default_scope
    from mmengine.runner import Runner, load_checkpoint, save_checkpoint
    from mmengine.runner.checkpoint import get_state_dict

    init_default_scope('mmdet')

    def build_detector(model: Any) -> nn.Module:
        """The detector of a config."""
        return MODELS.build(model)

    def optimizer_of(model: nn.Module, config: Config) -> torch.optim.Optimizer:
        """The optimizer that training would use."""
        return build_optim_wrapper(model, config.optim_wrapper).optimizer

    def learning_rates(config: Config, folder: str) -> list[float]:
        """The learning rate of every step of the training, for a parameter at the base rate."""
        model = Recorder()
        optimizer = torch.optim.AdamW(model.parameters(), lr=config.optim_wrapper.optimizer.lr)
        hooks = dict.fromkeys(('timer', 'logger', 'checkpoint', 'sampler_seed', 'runtime_info'))
        runner = Runner(
            model,
            folder,
            train_dataloader=DataLoader(range(STEPS)),
            optim_wrapper=OptimWrapper(optimizer),
            param_scheduler=config.param_scheduler,
            train_cfg=config.train_cfg,
            default_hooks=hooks,
            log_level='ERROR',
            default_scope='mmdet',
            experiment_name=Path(config.filename).stem,
        )
        runner.train()
        return model.rates

    def settings(config: Config) -> dict[str, Any]:
        """What training and testing do, besides model, optimizer and schedule."""
        train, images = config.train_dataloader, config.model.data_preprocessor
        loaders = [config[f'{split}_dataloader'] for split in ('train', 'val', 'test')]
        assert config.val_evaluator == config.test_evaluator
        assert config.test_evaluator.ann_file == config.test_dataloader.dataset.ann_file
        assert {loader.num_workers for loader in loaders} == {train.num_workers}
        resize = config.test_dataloader.dataset.pipeline[1]
        hooks = config.default_hooks
        return dict(
            transforms=[s for s in map(plain_step, train.dataset.pipeline) if s],
            images=[images.mean, images.std, images.pad_size_divisor],
            rgb=images.bgr_to_rgb,
            batch=train.batch_size,
            workers=train.num_workers,
            epochs=config.train_cfg.max_epochs,
            data=[(d.type, d.ann_file, d.data_prefix.img) for d in (loader.dataset for loader in loaders)],
            classes=[loader.dataset.get('metainfo', {}).get('classes') for loader in loaders],
            test=(resize.scale, resize.keep_ratio, 'RandomFlip' in str(config.test_dataloader.dataset.pipeline)),
            metric=config.test_evaluator.metric,
            evaluated=config.train_cfg.val_interval,
            scaling=config.auto_scale_lr,
            hooks=config.custom_hooks,
            kept=(hooks.checkpoint.interval, hooks.checkpoint.get('max_keep_ckpts', -1)),
            logged=hooks.logger.interval,
        )

    def plain_step(step: Any) -> tuple[Any, ...] | None:
        """One step of the training pipeline in the common form."""
        match step.type:
            case 'LoadAnnotations':
                return 'annotations', step.with_bbox, step.get('with_mask', False)
            case 'RandomFlip':
                return 'flip', step.prob, step.get('direction', 'horizontal')
            case 'Resize':
                return 'resize', [step.scale], step.keep_ratio
            case 'RandomChoiceResize':
                return 'resize', step.scales, step.keep_ratio
            case 'RandomChoice':
                return 'one of', [[plain_step(s) for s in policy] for policy in step.transforms]
            case 'RandomCrop':
                return 'crop', {k: v for k, v in step.items() if k != 'type'}
        return None

    def policies(step: Any) -> list[list[Any]] | None:
        """What a step chooses from, if it does."""
        return step.get('transforms')

    def with_data(config: Config, data: Path) -> Config:
        """Use a small data set and small test images."""
        dataset = config.train_dataloader.dataset
        dataset.ann_file, dataset.data_prefix.img = str(data / 'annotations.json'), f'{data}/'
        config.test_dataloader.dataset.pipeline[1].scale = (192, 160)
        return config

    def training_set(config: Config) -> Any:
        """The training data set without its pipeline."""
        config.train_dataloader.dataset.pipeline = []
        return DATASETS.build(config.train_dataloader.dataset)

    def first_of(dataset: Any, index: int) -> dict[str, Any]:
        """What the pipeline gets of an image."""
        return dataset.get_data_info(index)

    def batch_of(samples: list[Any], model: nn.Module) -> dict[str, Any]:
        """What the model trains on."""
        batch = {key: [sample[key] for sample in samples] for key in samples[0]}
        return model.data_preprocessor(batch, training=True)

    def contents(batch: dict[str, Any]) -> dict[str, Any]:
        """Image and annotations of a batch of one, as tensors."""
        truth = batch['data_samples'][0].gt_instances
        found = dict(image=batch['inputs'], boxes=truth.bboxes, labels=truth.labels)
        return found | (dict(masks=torch.from_numpy(truth.masks.to_ndarray())) if 'masks' in truth else {})

    def losses_of(model: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
        """Its losses."""
        return model(**batch, mode='loss')

    def detections(model: nn.Module, image: Path) -> list[Any]:
        """Boxes with scores, labels, and masks or None, best first."""
        found = inference_detector(model, str(image)).pred_instances
        order = torch.argsort(found.scores, descending=True, stable=True)
        boxes = torch.cat([found.bboxes, found.scores[:, None]], 1)[order]
        return [boxes, found.labels[order], found.masks[order] if 'masks' in found else None]

    def save(model: nn.Module, path: Path) -> None:
        """Write a checkpoint, with logs and a numpy value in it as training leaves them."""
        hub = MessageHub.get_instance('forms')
        hub.update_scalar('train/loss', 1.5)
        hub.update_info('best_score', np.float64(0.5))
        meta = dict(epoch=1, iter=3, dataset_meta=dict(classes=('a',)))
        checkpoint = dict(meta=meta, state_dict=get_state_dict(model), message_hub=hub.state_dict())
        save_checkpoint(checkpoint, str(path))


def description(config: Config) -> dict[str, Any]:
    """What a config says; the detector is built without memory."""
    with torch.device('meta'):
        model = build_detector(config.model)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = {}
    for group in optimizer_of(model, config).param_groups:
        values = {key: value for key, value in group.items() if key not in ('params', 'param_names', 'foreach')}
        groups |= {names[id(p)]: values for p in group['params'] if p.requires_grad}
    return dict(
        state={name: tuple(value.shape) for name, value in model.state_dict().items()},
        frozen=sorted(name for name, p in model.named_parameters() if not p.requires_grad),
        groups=groups,
        settings=plain(settings(config)),
        test_cfg=plain(config.model.test_cfg),
    )


def plain(value: Any) -> Any:
    """The same in plain dicts and lists, for configs keep some sequences as tuples."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def behaviour(config: Config, data: Path, checkpoint: Path, saved: Path) -> dict[str, Any]:
    """What a config does with data and a checkpoint by MMDetection 2."""
    config = with_data(config, data)
    model: Any = build_detector(config.model)
    load_checkpoint(model, str(checkpoint), map_location='cpu', strict=True)
    pipeline = config.data.train.pipeline if GENERATION == 2 else config.train_dataloader.dataset.pipeline
    dataset = training_set(config)
    choices = next((len(policies(step)) for step in pipeline if policies(step)), 1)
    samples, seen = [], []
    for index, choice, seed in itertools.product(range(len(dataset)), range(choices), range(SEEDS)):
        sample = first_of(dataset, index)
        for i, step in enumerate(chosen(pipeline, choice)):
            random.seed(1000 * seed + i)
            np.random.seed(1000 * seed + i)
            sample = TRANSFORMS.build(step)(sample)
        samples.append(sample)
        seen.append(contents(batch_of([sample], model)))
    save(model, saved)
    model.train()
    torch.manual_seed(0)
    smallest = sorted(range(len(seen)), key=lambda i: seen[i]['image'].numel())[:2]
    with torch.no_grad():
        losses = losses_of(model, batch_of([samples[i] for i in smallest], model))
    losses = {key: sum(value) if isinstance(value, list) else value for key, value in losses.items()}
    model.eval()
    model.cfg = config
    return dict(
        length=len(dataset),
        seen=seen,
        losses=losses,
        detections=detections(model, min(data.glob('*.png'))),
    )


def chosen(pipeline: list[Any], choice: int) -> Iterator[Any]:
    """Steps of a pipeline, with what a step would choose by chance chosen."""
    for step in pipeline:
        yield from policies(step)[choice] if policies(step) else [step]


def main(configs: Path, data: Path, checkpoints: Path, out: Path) -> dict[str, Any]:
    """Write all that is to be compared."""
    found: dict[str, Any] = dict(generation=GENERATION, described={}, rates={}, tried={})
    known: dict[str, list[float]] = {}
    for name in all_configs(configs):
        config = Config.fromfile(str(configs / f'{name}.py'))
        found['described'][name] = description(config)
        schedule = str(config.get('lr_config') or config.get('param_scheduler'))
        if schedule not in known:
            with tempfile.TemporaryDirectory() as folder:
                known[schedule] = learning_rates(config, folder)
        found['rates'][name] = known[schedule]
    for name in TRIED:
        config = Config.fromfile(str(configs / f'{name}.py'))
        stem = Path(name).name
        saved = out.parent / f'{stem}_by_{GENERATION}.pth'
        found['tried'][name] = behaviour(config, data, checkpoints / f'{stem}.pth', saved)
    torch.save(found, out)
    return found


if __name__ == '__main__':
    main(*map(Path, sys.argv[1:]))
