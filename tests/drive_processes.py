"""Take one training step of the demo's detector in this process of several; ``test_distributed.py`` runs it.

Arguments: a file to write. Environment: as torchrun sets it. Each process takes its share of two fixed images; then the
first one alone, as a group of one process, takes a step on all of them, and writes that too.

MMDetection divides losses by numbers that each process counts for itself (sampled anchors and boxes, positive boxes for
masks). So that the mean over processes is the joined batch's loss, every image has four objects and exactly as many
samples of each kind: 256 anchors, 128 boxes, of them 4 positive (the objects themselves are among the candidates).
Samples are candidates at equal distances instead of random ones. MMDetection adds 1.2e-7 to each of these numbers,
against division by zero; here it adds nothing, since a sum over two processes has it twice.
"""

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from kw_mmdet import configs_path
from kw_mmdet.generation import GENERATION, Config, build

SIZE, IMAGES = 96, 2
CORNERS = [[6.0, 6, 40, 34], [52, 8, 90, 44], [10, 50, 44, 88], [54, 56, 84, 90]]


def make_detector() -> Any:
    config = Config.fromfile(configs_path('shapes/mask_rcnn_kw1x_mobilenetv2_050_fpn_shapes.py'))
    options = {'rpn.sampler.num': 256, 'rcnn.sampler.num': 128, 'rcnn.sampler.pos_fraction': 4 / 128}
    options |= {'rpn_proposal.nms_pre': 500, 'rpn_proposal.max_per_img': 200}
    config.merge_from_dict({f'model.train_cfg.{key}': value for key, value in options.items()})
    torch.manual_seed(0)
    detector = build(config)
    # As initialized, but with weights large enough for every part to have a gradient.
    for parameter in detector.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    for sampler in (detector.rpn_head.sampler, detector.roi_head.bbox_sampler):
        assert type(sampler).__name__ == 'RandomSampler'
        sampler.random_choice = lambda gallery, num: gallery[:: max(1, len(gallery) // num)][:num]
    return detector.double()


def select_in_float32() -> None:
    """Let mmcv's NMS, compiled for float32 alone, choose among boxes in float64; values do not pass through it."""
    nms = importlib.import_module('mmcv.ops.nms')
    original = nms.ext_module.nms
    nms.ext_module = SimpleNamespace(nms=lambda boxes, scores, **how: original(boxes.float(), scores.float(), **how))


def compare_exactly() -> None:
    """Let torch compute losses of objectness and masks in the logits' type, not in the targets'."""
    original = torch.nn.functional.binary_cross_entropy_with_logits
    torch.nn.functional.binary_cross_entropy_with_logits = lambda logits, targets, *rest, **named: original(
        logits, targets.to(logits.dtype), *rest, **named
    )


def divide_exactly() -> None:
    """Let MMDetection's losses divide by the numbers that they count."""
    losses = importlib.import_module('mmdet.models.losses.utils')
    losses.torch = SimpleNamespace(float32=None, finfo=lambda _: SimpleNamespace(eps=0.0))


def losses_2(detector: Any, images: torch.Tensor, masks: np.ndarray) -> dict[str, Any]:
    """Return the losses, and the loss as it is logged, of MMDetection 2.x."""
    from mmcv.parallel import DataContainer
    from mmdet.core.mask import BitmapMasks
    from mmdet.utils import build_ddp

    count, shape = len(images), (SIZE, SIZE, 3)
    meta = dict(img_shape=shape, pad_shape=shape, ori_shape=shape, scale_factor=1.0, flip=False)
    data = dict(
        img=DataContainer([images], stack=True),
        img_metas=DataContainer([[meta] * count], cpu_only=True),
        gt_bboxes=DataContainer([[torch.tensor(CORNERS, dtype=torch.float64)] * count]),
        gt_labels=DataContainer([[torch.tensor([0, 1, 2, 0])] * count]),
        gt_masks=DataContainer([[BitmapMasks(masks, SIZE, SIZE)] * count], cpu_only=True),
    )
    ddp = build_ddp(detector, 'cpu', device_ids=[0], broadcast_buffers=False)
    step = ddp.train_step(data, None)
    step['loss'].backward()
    return step['log_vars']


def losses_3(detector: Any, images: torch.Tensor, masks: np.ndarray) -> dict[str, Any]:
    """Return the losses, and the loss as it is logged, of MMDetection 3.x."""
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks
    from mmengine.model import MMDistributedDataParallel
    from mmengine.structures import InstanceData

    truth = InstanceData(
        bboxes=torch.tensor(CORNERS, dtype=torch.float64),
        labels=torch.tensor([0, 1, 2, 0]),
        masks=BitmapMasks(masks, SIZE, SIZE),
    )
    meta = dict(img_shape=(SIZE, SIZE), pad_shape=(SIZE, SIZE), batch_input_shape=(SIZE, SIZE), ori_shape=(SIZE, SIZE))
    samples = [DetDataSample(gt_instances=truth, ignored_instances=truth[:0], metainfo=meta) for _ in images]
    ddp = MMDistributedDataParallel(module=detector, device_ids=[0], broadcast_buffers=False)
    loss, logged = detector.parse_losses(ddp(images, samples, mode='loss'))
    loss.backward()
    logged = {key: value.detach() for key, value in logged.items()}
    for value in logged.values():  # MMDetection 3.x logs each process's own
        dist.all_reduce(value.div_(dist.get_world_size()))
    return {key: value.item() for key, value in logged.items()}


def step() -> dict[str, dict[str, Any]]:
    """Return losses and gradients of a step of the group of processes that there is."""
    detector = make_detector().train()
    images = torch.randn(IMAGES, 3, SIZE, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    own = images.chunk(dist.get_world_size())[dist.get_rank()]
    masks = np.zeros((len(CORNERS), SIZE, SIZE), np.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, np.array(CORNERS).astype(int), strict=True):
        mask[y1:y2, x1:x2] = 1
    losses = (losses_2 if GENERATION == 2 else losses_3)(detector, own, masks)
    gradients = {name: p.grad for name, p in detector.named_parameters() if p.requires_grad}
    return dict(losses=dict(losses), gradients=gradients)


def main() -> None:
    if GENERATION == 2:
        from mmcv.runner import init_dist
    else:
        from mmengine.dist import init_dist
    torch.set_num_threads(1)
    select_in_float32()
    divide_exactly()
    compare_exactly()
    init_dist('pytorch', backend='nccl')
    assert dist.get_backend() == 'gloo'
    file, rank = Path(sys.argv[1]), dist.get_rank()
    torch.save(step(), file.with_suffix(f'.{rank}'))
    dist.destroy_process_group()
    if rank == 0:
        dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
        torch.save(step(), file.with_suffix('.joined'))
        dist.destroy_process_group()


if __name__ == '__main__':
    main()
