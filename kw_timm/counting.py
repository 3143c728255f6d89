"""What KW layers cost, for tools that count by the types of modules.

These are ptflops, torchinfo, and mmcv's ``get_model_complexity_info``.

Tools that count operations need nothing: FlopCounterMode has formulas of the operators (``kw_timm.ops.flops``), fvcore
and mmengine trace the network and find the mixing as matrix products.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .layers import KWConv1d, KWConv2d, KWConv3d, KWLayer, KWLinear, Warehouse

__all__ = ['count_mult_adds', 'flop_hooks', 'layer_macs']

Hook = Callable[[nn.Module, Any, Any], None]


def layer_macs(layer: KWLayer, output: torch.Tensor) -> int:
    """Return the multiply-adds of a KW layer: convolving, and mixing cells; without its attention's linear layers.

    Args:
        layer: The layer.
        output: What it returned for a batch, ``(B, O, *spatial)`` or tokens ``(B, *tokens, O)``.
    """
    kernel, mixtures = math.prod(layer.spec.kernel_shape), math.prod(layer.spec.grid)
    mixing = mixtures * layer.attention.num_cells * math.prod(layer.spec.cell_shape)
    return kernel * (output.numel() // layer.out_channels) + mixing * output.shape[0]


def flop_hooks() -> dict[type[nn.Module], Hook]:
    """Return a hook per type of module, which adds what a call cost to ``module.__flops__``.

    Example:
        >>> ptflops.get_model_complexity_info(model, (3, 224, 224), custom_modules_hooks=kw_timm.flop_hooks())
    """
    hooks: dict[type[nn.Module], Hook] = dict.fromkeys((KWConv1d, KWConv2d, KWConv3d, KWLinear), _count)
    # So that the table has the cells' parameters in the line of the warehouse; layers only use them.
    return hooks | {Warehouse: lambda module, inputs, output: None}


def count_mult_adds(statistics: Any) -> Any:
    """Add KW layers to torchinfo's Mult-Adds, which knows layers without children alone.

    Args:
        statistics: What ``torchinfo.summary`` returned; its total is changed, once however often this is called.

    Returns:
        The same.

    Example:
        >>> print(kw_timm.count_mult_adds(torchinfo.summary(model, (1, 3, 224, 224), verbose=0)))
    """
    calls = [info for info in statistics.summary_list if isinstance(info.module, KWLayer) and info.output_size]
    of_kw = sum(layer_macs(info.module, torch.empty(info.output_size, device='meta')) for info in calls)
    of_others = sum(info.macs for info in statistics.summary_list if info.is_leaf_layer)
    statistics.total_mult_adds = of_others + of_kw
    return statistics


def _count(module: Any, inputs: Any, output: torch.Tensor) -> None:
    module.__flops__ += layer_macs(module, output)
    cells = {id(p) for p in module.__dict__['warehouse'].parameters()}
    module.__params__ = sum(p.numel() for p in module.parameters() if p.requires_grad and id(p) not in cells)
