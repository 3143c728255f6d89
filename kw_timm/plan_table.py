"""What a plan costs, layer by layer, before anything is made."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from .derive import fitting_norm
from .layers import KWLayer
from .layers.attention import NormLayer, hidden_width
from .layers.partition import partition_kernels
from .plans import WarehousePlan, attention_weights, kernel_shape, naming, plan_sizes
from .tables import aligned

__all__ = ['LayerCosts', 'PlanTable', 'plan_table']


@dataclass(frozen=True)
class LayerCosts:
    """What one layer costs, static and as the plan makes it.

    Attributes:
        layer: Its name.
        warehouse: Its warehouse.
        mixtures: Mixtures that make up its kernel.
        cells: Cells that it brings into the warehouse.
        all_cells: Cells of the warehouse.
        attention_weights: Weights of its attention.
        cell_weights: Weights of the cells that it brings.
        flops_before: Floating point operations for an image, a multiplication and an addition being two.
        flops_after: Likewise, with attention and mixing.
        bytes_before: Bytes moved for an image: input, output and weights once.
        bytes_after: Likewise: weights of attention and cells are read, the image's kernel is written and read.
    """

    layer: str
    warehouse: str
    mixtures: int
    cells: int
    all_cells: int
    attention_weights: int
    cell_weights: int
    flops_before: int
    flops_after: int
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class PlanTable:
    """The costs of a plan; as text, a table.

    Attributes:
        rows: One entry per planned layer, in the order of the network.
        static: Layer that stays static -> reason, as far as the plan tells.
    """

    rows: tuple[LayerCosts, ...]
    static: Mapping[str, str]

    def __str__(self) -> str:
        head = [
            *('layer', 'warehouse', 'mixtures', 'cells', 'of', 'in attention', 'in cells'),
            *('MFLOPs before', 'after', 'kB before', 'after'),
        ]
        numbers = [[getattr(row, name) for name in LayerCosts.__annotations__] for row in self.rows]
        totals = [sum(column) for column in list(zip(*numbers, strict=True))[2:]] or [0] * 9
        lines = [_texts(row) for row in [*numbers, ['all', '', *totals]]]
        lines[-1][4] = ''
        notes = [f'{layer}: {reason}' for layer, reason in self.static.items()]
        return '\n'.join([aligned([head, *lines], left=2), *(['', 'static:', *notes] if notes else [])])


def _texts(row: Sequence[Any]) -> list[str]:
    counts = [f'{value:,}' if isinstance(value, int) else value for value in row[:7]]
    return [*counts, *(f'{value / 1e6:,.1f}' for value in row[7:9]), *(f'{value / 1e3:,.0f}' for value in row[9:])]


def plan_table(
    model: nn.Module,
    plan: Mapping[str, WarehousePlan],
    inputs: torch.Tensor | None = None,
    norm_layer: NormLayer | None = None,
) -> PlanTable:
    """Return what a plan costs, layer by layer, before and after; nothing is made or changed.

    Args:
        model: The network, not yet kernelized.
        plan: Warehouse name -> layers and ratios.
        inputs: A batch, whose sizes count, not its values; None for an image as timm's cfg of the network says.
        norm_layer: Norm within the attention, as for ``kernelize``; None for what fits the network's norms.

    Raises:
        ValueError: If the network is kernelized already, the plan does not fit it, or ``inputs`` is needed.

    Example:
        >>> print(plan_table(model, derive_plan(model, 4)))
    """
    modules = dict(model.named_modules())
    done = [layer for entry in plan.values() for layer in entry.layers if isinstance(modules.get(layer), KWLayer)]
    if done:
        raise ValueError(
            f"The layer '{done[0]}' is a KW layer already; make the table before you kernelize the network."
        )
    norm_layer = norm_layer or fitting_norm(model)
    plan_sizes(model, plan, norm_layer)  # Says what does not fit.
    layers = {layer: modules[layer] for entry in plan.values() for layer in entry.layers}
    work = _observe(model, layers, inputs)
    order = {name: i for i, name in enumerate(modules)}
    rows = []
    for name, entry in plan.items():
        own = sorted(entry.layers, key=order.__getitem__)
        with naming(name, own):
            partition = partition_kernels([kernel_shape(modules[layer]) for layer in own], *entry.ratios)
        cell = math.prod(partition.cell_shape)
        for layer, share in zip(own, partition.layers, strict=True):
            module = modules[layer]
            kernel, size = module.weight.numel(), module.weight.element_size()
            attention = attention_weights(entry, [module], [share.grid], partition.num_cells, norm_layer)
            channels = module.in_features if isinstance(module, nn.Linear) else module.in_channels
            hidden = hidden_width(channels, entry.reduction)
            mixing = share.num_mixtures * partition.num_cells * cell
            made = hidden * (channels + share.num_mixtures * (partition.num_cells + 1)) + mixing
            positions, kernels, moved = work[layer]
            rows.append(
                LayerCosts(
                    layer,
                    name,
                    share.num_mixtures,
                    share.stop - share.start,
                    partition.num_cells,
                    attention,
                    (share.stop - share.start) * cell,
                    round(2 * kernel * positions),
                    round(2 * (kernel * positions + made * kernels)),
                    round((moved + kernel) * size),
                    round((moved + attention + partition.num_cells * cell + 2 * kernel * kernels) * size),
                )
            )
    return PlanTable(tuple(sorted(rows, key=lambda row: order[row.layer])), getattr(plan, 'static', {}))


def _observe(
    model: nn.Module, layers: Mapping[str, nn.Module], inputs: torch.Tensor | None
) -> dict[str, tuple[float, float, float]]:
    """Return of every layer, for one image: output positions, kernels to be made, elements of input and output."""
    if inputs is None:
        cfg = getattr(model, 'pretrained_cfg', None)
        size = cfg.get('input_size') if isinstance(cfg, dict) else None
        if size is None:
            raise ValueError('Give inputs, a batch of what the network takes: it is none of timm, whose size is known.')
        first = next(model.parameters())
        inputs = torch.empty(1, getattr(model, 'in_chans', size[0]), *size[1:], dtype=first.dtype, device=first.device)
    batch = len(inputs)
    found = dict.fromkeys(layers, (0.0, 0.0, 0.0))

    def hook(name: str) -> Callable[..., None]:
        def note(module: Any, args: Any, output: torch.Tensor) -> None:
            positions, kernels, moved = found[name]
            found[name] = (
                positions + output.numel() / module.weight.shape[0] / batch,
                kernels + output.shape[0] / batch,
                moved + (args[0].numel() + output.numel()) / batch,
            )

        return note

    training = {module: module.training for module in model.modules()}
    handles = [module.register_forward_hook(hook(name)) for name, module in layers.items()]
    try:
        model.eval()
        with torch.no_grad():
            try:
                tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
                hollow = {name: tensor.to('meta') for name, tensor in tensors.items()}
                functional_call(model, hollow, (inputs.to('meta'),))
            except (RuntimeError, NotImplementedError, TypeError, ValueError):  # Not to be had without numbers.
                found.update(dict.fromkeys(layers, (0.0, 0.0, 0.0)))
                model(inputs)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in training.items():
            module.training = mode
    return found
