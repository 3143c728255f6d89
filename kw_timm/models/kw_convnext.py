"""KernelWarehouse ConvNeXt-Tiny, over timm's ConvNeXt.

Paper: arXiv 2406.07879, table 2. Every convolution is KW and has a bias; the attention's norm is a LayerNorm.
"""

from typing import Any

from timm.models import ConvNeXt, register_model
from torch import nn

from ..kernelize import WarehousePlan, kernelize
from ._network import KWNetwork, build_kw_model, kw_cfg, kw_default_cfgs

__all__ = ['KWConvNeXt', 'convnext_plan']


def convnext_plan(model: ConvNeXt, **ratios: Any) -> dict[str, WarehousePlan]:
    """Say which convolution of a timm ConvNeXt (with ``conv_mlp``) joins which warehouse.

    Args:
        model: ConvNeXt shaped network.
        **ratios: Ratios of every warehouse, as :class:`~kw_timm.kernelize.WarehousePlan` takes them.

    Returns:
        Warehouses of the stem and the downsample layers, then per stage of the depthwise and of the pointwise layers.
    """
    stages = range(len(model.stages))
    layers = {'stem': ['stem.0']}
    layers |= {f'downsample{s}': [f'stages.{s}.downsample.1'] for s in stages if s > 0}
    for s in stages:
        blocks = [f'stages.{s}.blocks.{i}' for i in range(len(model.stages[s].blocks))]
        layers[f'stage{s}_dw'] = [f'{block}.conv_dw' for block in blocks]
        layers[f'stage{s}_pw'] = [f'{block}.mlp.{fc}' for block in blocks for fc in ('fc1', 'fc2')]
    return {name: WarehousePlan(names, **ratios) for name, names in layers.items()}


class KWConvNeXt(KWNetwork, ConvNeXt):
    """timm's ConvNeXt with KernelWarehouse convolutions.

    Args:
        cell_num_ratio: Cells per mixture, the budget ``b``.
        reduction: Hidden width of the attention relative to a layer's input channels.
        init: How KW layers begin, ``'live'`` or ``'published'``; see :func:`~kw_timm.kernelize`.
        **kwargs: As timm's ConvNeXt takes them; ``conv_mlp`` is fixed.
    """

    family = 'convnext'
    # The stem's channels are those of its warehouse; `checkpoint_filter_fn` fits them.
    _traits = {'first_conv': None}

    def __init__(
        self,
        *args: Any,
        cell_num_ratio: float = 1.0,
        reduction: float = 1 / 16,
        init: str = 'live',
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, conv_mlp=True, **kwargs)
        kernelize(
            self,
            convnext_plan(self, cell_num_ratio=cell_num_ratio, reduction=reduction),
            norm_layer=nn.LayerNorm,
            init=init,
        )


default_cfgs = kw_default_cfgs(
    {'kw1x_convnext_tiny.osvai_in1k': kw_cfg(first_conv='warehouses.stem', classifier='head.fc')}
)


@register_model
def kw1x_convnext_tiny(pretrained: bool = False, **kwargs: Any) -> KWConvNeXt:
    """ConvNeXt-Tiny with one cell per mixture: 39.37 M parameters."""
    model_args: dict[str, Any] = dict(depths=(3, 3, 9, 3), dims=(96, 192, 384, 768))
    return build_kw_model(KWConvNeXt, 'kw1x_convnext_tiny', pretrained, (0, 1, 2, 3), **dict(model_args, **kwargs))  # type: ignore[return-value]
