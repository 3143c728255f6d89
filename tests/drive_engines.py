"""Take one training step of KW networks in this process of several; ``test_training_engines.py`` runs it.

Arguments: a file to write. Environment: as torchrun sets it. Each process takes its share of four fixed images, by
every engine of :data:`ENGINES`. Norms are at fixed statistics, so that the mean over processes is the joined batch's.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import timm
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import kw_timm
from kw_timm.ops import buffers
from kw_timm.random_weights import settle

# By every engine the network that is quick, though it has depthwise layers and a KW classifier.
NAMES = ('kw1d2x_mobilenetv2_050', 'kw1d4x_resnet18')
FEW = ('ddp', 'fsdp2, blocks')  # for the second network
IMAGES, SIZE, CLASSES = 4, 32, 10
Wrap = Callable[[nn.Module], nn.Module]


def make_network(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=CLASSES, drop_rate=0.0, drop_path_rate=0.0)
    settle(model, 2 * SIZE).double().train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    return model


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(IMAGES, 3, SIZE, SIZE, dtype=torch.float64, generator=generator)
    return images, torch.randint(CLASSES, (IMAGES,), generator=generator)


def blocks(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the networks' blocks, innermost first, as people shard them."""
    for name, module in model.named_modules():
        if name.count('.') == 1 and name.split('.')[0] in ('layer1', 'layer2', 'layer3', 'layer4', 'blocks'):
            yield module


def ddp(model: nn.Module, **options: bool) -> nn.Module:
    return DistributedDataParallel(model, **options)


def checkpointed(model: nn.Module, reentrant: bool) -> nn.Module:
    model.set_grad_checkpointing()
    timm.layers.set_reentrant_ckpt(reentrant)
    return DistributedDataParallel(model, static_graph=reentrant)


def sharded(model: nn.Module, parts: Callable[[nn.Module], Iterator[nn.Module]] | None = None) -> nn.Module:
    mesh = init_device_mesh('cpu', (dist.get_world_size(),))
    for part in parts(model) if parts else ():
        # A warehouse serves layers after its own forward is over.
        fully_shard(part, mesh=mesh, reshard_after_forward=not isinstance(part, kw_timm.layers.Warehouse))
    return fully_shard(model, mesh=mesh)


ENGINES: dict[str, Wrap] = {
    'ddp': ddp,
    'ddp, unused parameters looked for': partial(ddp, find_unused_parameters=True),
    'ddp, static graph': partial(ddp, static_graph=True),
    'ddp, gradients as views': partial(ddp, gradient_as_bucket_view=True),
    'ddp, two batches': ddp,
    'ddp, checkpoints': partial(checkpointed, reentrant=False),
    'ddp, reentrant checkpoints': partial(checkpointed, reentrant=True),
    'fsdp2, whole': sharded,
    'fsdp2, blocks': partial(sharded, parts=blocks),
    'fsdp2, warehouses': partial(sharded, parts=lambda model: iter(model.warehouses.values())),
}


def gradients(model: nn.Module, wrap: Wrap, accumulate: bool) -> dict[str, torch.Tensor]:
    """Return the gradients of a step, by the network's own names."""
    wrapped = wrap(model)
    images, labels = (t.chunk(dist.get_world_size())[dist.get_rank()] for t in data())
    parts = list(zip(images.split(1), labels.split(1), strict=True)) if accumulate else [(images, labels)]
    for i, (x, y) in enumerate(parts):
        last = i == len(parts) - 1
        with nullcontext() if last else wrapped.no_sync():  # type: ignore[operator]
            (nn.functional.cross_entropy(wrapped(x), y) / len(parts)).backward()
    grads = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        assert grad is not None, name
        grads[name] = grad.full_tensor() if isinstance(grad, DTensor) else grad
    return grads


@contextmanager
def one_process() -> Iterator[None]:
    """A group of this process alone."""
    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def main() -> None:
    torch.set_num_threads(1)
    buffers._LARGE = 1  # as in larger networks, whose layers add their gradients up in one buffer
    dist.init_process_group('gloo')
    found = {
        (name, engine): gradients(make_network(name), wrap, accumulate='two batches' in engine)
        for name in NAMES
        for engine, wrap in ENGINES.items()
        if name == NAMES[0] or engine in FEW
    }
    torch.save(found, Path(sys.argv[1]).with_suffix(f'.{os.environ["RANK"]}'))
    dist.destroy_process_group()


if __name__ == '__main__':
    main()
