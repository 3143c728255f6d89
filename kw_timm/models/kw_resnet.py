"""KernelWarehouse ResNet-18 and ResNet-50 (v1.5), over timm's ResNet.

Paper: arXiv 2406.07879, table 1 and 2. One warehouse per stage; the first layers of a stage belong to the stage before.
"""

from typing import Any

from timm.layers import DropPath
from timm.models import ResNet, register_model
from timm.models.resnet import BasicBlock, Bottleneck

from ..kernelize import WarehousePlan, kernelize
from ._network import KWNetwork, build_kw_model, kw_cfg, kw_default_cfgs

__all__ = ['KWResNet', 'resnet_plan']

STAGES = ('layer1', 'layer2', 'layer3', 'layer4')


def resnet_plan(model: ResNet, **ratios: Any) -> dict[str, WarehousePlan]:
    """Say which convolution of a timm ResNet joins which warehouse.

    Args:
        model: ResNet-18 or ResNet-50 shaped network.
        **ratios: Ratios of every warehouse, as :class:`~kw_timm.kernelize.WarehousePlan` takes them.

    Returns:
        A warehouse per stage, named like the stage.
    """
    layers: dict[str, list[str]] = {stage: [] for stage in STAGES}
    for s, stage in enumerate(STAGES):
        for i, block in enumerate(getattr(model, stage)):
            before = STAGES[s - 1] if i == 0 and s > 0 else stage
            prefix = f'{stage}.{i}'
            if s > 0 or i > 0 or isinstance(block, BasicBlock):
                layers[before].append(f'{prefix}.conv1')
            layers[stage].append(f'{prefix}.conv2')
            if isinstance(block, Bottleneck):
                layers[stage].append(f'{prefix}.conv3')
            # Stage 0 does not downsample: ResNet-50's 1x1 shortcut there stays static.
            if block.downsample is not None and s > 0:
                layers[before].append(f'{prefix}.downsample.0')
    return {stage: WarehousePlan(names, **ratios) for stage, names in layers.items()}


class KWResNet(KWNetwork, ResNet):
    """timm's ResNet with KernelWarehouse convolutions.

    Args:
        cell_num_ratio: Cells per mixture, the budget ``b``.
        cell_inplane_ratio: Cell input channels relative to the layers' greatest common divisor.
        cell_outplane_ratio: Cell output channels, likewise.
        reduction: Hidden width of the attention relative to a layer's input channels.
        nonlocal_basis_ratio: Below 1, saves attention parameters by a non-local basis.
        init: How KW layers begin, ``'live'`` or ``'published'``; see :func:`~kw_timm.kernelize`.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth rate, the same in every block.
        **kwargs: As timm's ResNet takes them.
    """

    family = 'resnet'

    def __init__(
        self,
        *args: Any,
        cell_num_ratio: float = 1.0,
        cell_inplane_ratio: float = 1.0,
        cell_outplane_ratio: float = 1.0,
        reduction: float = 1 / 16,
        nonlocal_basis_ratio: float = 1.0,
        init: str = 'live',
        drop_rate: float = 0.1,
        drop_path_rate: float = 0.0,
        zero_init_last: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, drop_rate=drop_rate, zero_init_last=zero_init_last, **kwargs)
        for stage in STAGES:
            for block in getattr(self, stage):
                block.drop_path = DropPath(drop_path_rate) if drop_path_rate > 0 else None
        plan = resnet_plan(
            self,
            cell_num_ratio=cell_num_ratio,
            cell_inplane_ratio=cell_inplane_ratio,
            cell_outplane_ratio=cell_outplane_ratio,
            reduction=reduction,
            nonlocal_basis_ratio=nonlocal_basis_ratio,
        )
        kernelize(self, plan, init=init)


_CFG = kw_cfg(first_conv='conv1', classifier='fc')

default_cfgs = kw_default_cfgs(
    {
        'kw1d4x_resnet18.osvai_in1k': _CFG,
        'kw1d2x_resnet18.osvai_in1k': _CFG,
        'kw1x_resnet18.osvai_in1k': _CFG,
        'kw2x_resnet18.osvai_in1k': _CFG,
        'kw4x_resnet18.osvai_in1k': _CFG,
        'kw1d2x_resnet50.osvai_in1k': _CFG,
        'kw1x_resnet50.osvai_in1k': _CFG,
        'kw4x_resnet50.osvai_in1k': _CFG,
    }
)


def _resnet18(variant: str, pretrained: bool, kwargs: dict[str, Any], **ratios: float) -> KWResNet:
    model_args: dict[str, Any] = dict(block=BasicBlock, layers=(2, 2, 2, 2), **ratios)
    return build_kw_model(KWResNet, variant, pretrained, (0, 1, 2, 3, 4), **dict(model_args, **kwargs))  # type: ignore[return-value]


def _resnet50(variant: str, pretrained: bool, kwargs: dict[str, Any], **ratios: float) -> KWResNet:
    model_args: dict[str, Any] = dict(block=Bottleneck, layers=(3, 4, 6, 3), **ratios)
    return build_kw_model(KWResNet, variant, pretrained, (0, 1, 2, 3, 4), **dict(model_args, **kwargs))  # type: ignore[return-value]


_HALF_CELLS = dict(cell_inplane_ratio=0.5, cell_outplane_ratio=0.5)


@register_model
def kw1d4x_resnet18(pretrained: bool = False, **kwargs: Any) -> KWResNet:
    """ResNet-18 with a quarter of the cells per mixture: 4.03 M parameters."""
    return _resnet18('kw1d4x_resnet18', pretrained, kwargs, cell_num_ratio=0.25, **_HALF_CELLS)


@register_model
def kw1d2x_resnet18(pretrained: bool = False, **kwargs: Any) -> KWResNet:
    """ResNet-18 with half a cell per mixture: 7.43 M parameters."""
    return _resnet18('kw1d2x_resnet18', pretrained, kwargs, cell_num_ratio=0.5, **_HALF_CELLS)


@register_model
def kw1x_resnet18(pretrained: bool = False, **kwargs: Any) -> KWResNet:
    """ResNet-18 with one cell per mixture: 11.93 M parameters."""
    return _resnet18('kw1x_resnet18', pretrained, kwargs)


@register_model
def kw2x_resnet18(pretrained: bool = False, **kwargs: Any) -> KWResNet:
    """ResNet-18 with two cells per mixture: 23.24 M parameters."""
    return _resnet18('kw2x_resnet18', pretrained, kwargs, cell_num_ratio=2.0)


@register_model
def kw4x_resnet18(pretrained: bool = False, **kwargs: Any) -> KWResNet:
    """ResNet-18 with four cells per mixture: 45.86 M parameters."""
    return _resnet18('kw4x_resnet18', pretrained, kwargs, cell_num_ratio=4.0)


@register_model
def kw1d2x_resnet50(pretrained: bool = False, **kwargs: Any) -> KWResNet:
    """ResNet-50 with half a cell per mixture and a non-local basis: 17.64 M parameters."""
    return _resnet50(
        'kw1d2x_resnet50', pretrained, kwargs, cell_num_ratio=0.5, nonlocal_basis_ratio=0.0625, **_HALF_CELLS
    )


@register_model
def kw1x_resnet50(pretrained: bool = False, **kwargs: Any) -> KWResNet:
    """ResNet-50 with one cell per mixture: 28.05 M parameters."""
    return _resnet50('kw1x_resnet50', pretrained, kwargs)


@register_model
def kw4x_resnet50(pretrained: bool = False, **kwargs: Any) -> KWResNet:
    """ResNet-50 with four cells per mixture: 102.02 M parameters."""
    return _resnet50('kw4x_resnet50', pretrained, kwargs, cell_num_ratio=4.0)
