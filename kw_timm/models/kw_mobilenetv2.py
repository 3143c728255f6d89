"""KernelWarehouse MobileNetV2, over timm's EfficientNet (which is what timm's MobileNetV2 is).

Paper: arXiv 2406.07879, table 3. Every convolution is KW (in ``kw1d2x`` only some, but the classifier too).
"""

from functools import partial
from typing import Any

from timm.models import EfficientNet, register_model
from timm.models._efficientnet_blocks import DepthwiseSeparableConv
from timm.models._efficientnet_builder import decode_arch_def, round_channels
from torch import nn

from ..kernelize import WarehousePlan, drop_unused_warehouses, kernelize
from ._network import KWNetwork, build_kw_model, kw_cfg, kw_default_cfgs

__all__ = ['KWMobileNetV2', 'mobilenetv2_plan']

ARCH = (
    ('ds_r1_k3_s1_c16',),
    ('ir_r2_k3_s2_e6_c24',),
    ('ir_r3_k3_s2_e6_c32',),
    ('ir_r4_k3_s2_e6_c64',),
    ('ir_r3_k3_s1_e6_c96',),
    ('ir_r3_k3_s2_e6_c160',),
    ('ir_r1_k3_s1_e6_c320',),
)
KW_STAGES = (1, 2, 3, 4, 5, 6, 6)
LAST_STAGE = KW_STAGES[-1]


def mobilenetv2_plan(
    model: EfficientNet, pointwise: str = 'shared', cell_num_ratio: float = 1.0, reduction: float = 1 / 16
) -> dict[str, WarehousePlan]:
    """Say which convolution of a timm MobileNetV2 joins which warehouse.

    Args:
        model: MobileNetV2 shaped network.
        pointwise: ``'shared'``: expand and project convolutions of a KW stage share a warehouse (``kw1x``);
            ``'apart'``: one each (``kw4x``); ``'last'``: one each, in the last KW stage only, with half-sized cells and
            half a cell per mixture (``kw1d2x``).
        cell_num_ratio: Cells per mixture.
        reduction: Hidden width of the attention relative to a layer's input channels.

    Returns:
        Warehouses in the order in which their first layer is built.
    """
    layers: dict[str, list[str]] = {'stem': ['conv_stem']}

    def add(stage: int, kind: str, name: str) -> None:
        if pointwise == 'last' and kind != 'dw' and stage != LAST_STAGE:
            return
        key = 'pw' if pointwise == 'shared' and kind != 'dw' else kind
        layers.setdefault(f'stage{stage}_{key}', []).append(name)

    for s, blocks in enumerate(model.blocks):
        for i, block in enumerate(blocks):
            # A setting's first block belongs, whole, to the KW stage before.
            stage = KW_STAGES[max(s - 1, 0)] if i == 0 else KW_STAGES[s]
            prefix = f'blocks.{s}.{i}'
            if isinstance(block, DepthwiseSeparableConv):
                add(stage, 'dw', f'{prefix}.conv_dw')
                add(stage, 'project', f'{prefix}.conv_pw')
            else:
                add(stage, 'expand', f'{prefix}.conv_pw')
                add(stage, 'dw', f'{prefix}.conv_dw')
                add(stage, 'project', f'{prefix}.conv_pwl')
    add(LAST_STAGE, 'project', 'conv_head')

    half: dict[str, Any] = (
        dict(cell_num_ratio=0.5, cell_inplane_ratio=0.5, cell_outplane_ratio=0.5) if pointwise == 'last' else {}
    )
    return {
        name: WarehousePlan(
            names,
            **{
                'cell_num_ratio': cell_num_ratio,
                'reduction': reduction,
                **(half if name.endswith(('expand', 'project')) else {}),
            },
        )
        for name, names in layers.items()
    }


class KWMobileNetV2(KWNetwork, EfficientNet):
    """timm's MobileNetV2 with KernelWarehouse layers.

    Args:
        pointwise: See :func:`mobilenetv2_plan`.
        cell_num_ratio: Cells per mixture, the budget ``b``.
        reduction: Hidden width of the attention relative to a layer's input channels.
        kw_classifier: Make the classifier a KW linear layer with a warehouse of its own.
        init: How KW layers begin, ``'live'`` or ``'published'``; see :func:`~kw_timm.kernelize`.
        **kwargs: As timm's EfficientNet takes them.
    """

    family = 'mobilenetv2'
    # The stem's channels are those of its warehouse; `checkpoint_filter_fn` fits them.
    _traits = {'first_conv': None}

    def __init__(
        self,
        *args: Any,
        pointwise: str = 'shared',
        cell_num_ratio: float = 1.0,
        reduction: float = 1 / 16,
        kw_classifier: bool = False,
        init: str = 'live',
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.classifier_plan = (
            WarehousePlan(['classifier'], cell_num_ratio=0.5, cell_inplane_ratio=0.025, reduction=reduction)
            if kw_classifier
            else None
        )
        if isinstance(self.classifier, nn.Linear):
            nn.init.normal_(self.classifier.weight, std=0.01)
        self.kw_init = init
        kernelize(self, mobilenetv2_plan(self, pointwise, cell_num_ratio, reduction), init=init)
        self._kernelize_classifier()

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one, KW where the variant's is.

        Args:
            num_classes: Classes of the new classifier; 0 for none.
            global_pool: Pooling type; None keeps the current one.
        """
        super().reset_classifier(num_classes, global_pool)
        drop_unused_warehouses(self)
        self._kernelize_classifier()

    def _kernelize_classifier(self) -> None:
        if self.classifier_plan is not None and isinstance(self.classifier, nn.Linear):
            kernelize(self, {'classifier': self.classifier_plan}, init=self.kw_init)


_CFG = kw_cfg(interpolation='bilinear', first_conv='warehouses.stem', classifier='classifier')
_CFG_KW_CLASSIFIER = {**_CFG, 'classifier': 'warehouses.classifier'}

default_cfgs = kw_default_cfgs(
    {
        'kw1d2x_mobilenetv2_050.osvai_in1k': _CFG_KW_CLASSIFIER,
        'kw1x_mobilenetv2_050.osvai_in1k': _CFG,
        'kw4x_mobilenetv2_050.osvai_in1k': _CFG,
        'kw1d2x_mobilenetv2_100.osvai_in1k': _CFG_KW_CLASSIFIER,
        'kw1x_mobilenetv2_100.osvai_in1k': _CFG,
        'kw4x_mobilenetv2_100.osvai_in1k': _CFG,
    }
)


def _mobilenetv2(
    variant: str, width: float, pretrained: bool, kwargs: dict[str, Any], **plan_args: Any
) -> KWMobileNetV2:
    round_chs_fn = partial(round_channels, multiplier=width)
    model_args: dict[str, Any] = dict(
        block_args=decode_arch_def([list(blocks) for blocks in ARCH]),
        num_features=max(1280, round_chs_fn(1280)),
        stem_size=32,
        round_chs_fn=round_chs_fn,
        act_layer=nn.ReLU6,
        **plan_args,
    )
    return build_kw_model(KWMobileNetV2, variant, pretrained, (0, 1, 2, 3, 4), **dict(model_args, **kwargs))  # type: ignore[return-value]


_1D2X: dict[str, Any] = dict(pointwise='last', reduction=1 / 32, kw_classifier=True, drop_rate=0.1)
_4X: dict[str, Any] = dict(pointwise='apart', cell_num_ratio=4.0)


@register_model
def kw1d2x_mobilenetv2_050(pretrained: bool = False, **kwargs: Any) -> KWMobileNetV2:
    """MobileNetV2, width 0.5, with half a cell per mixture: 1.47 M parameters."""
    return _mobilenetv2('kw1d2x_mobilenetv2_050', 0.5, pretrained, kwargs, **_1D2X)


@register_model
def kw1x_mobilenetv2_050(pretrained: bool = False, **kwargs: Any) -> KWMobileNetV2:
    """MobileNetV2, width 0.5, with one cell per mixture: 2.85 M parameters."""
    return _mobilenetv2('kw1x_mobilenetv2_050', 0.5, pretrained, kwargs)


@register_model
def kw4x_mobilenetv2_050(pretrained: bool = False, **kwargs: Any) -> KWMobileNetV2:
    """MobileNetV2, width 0.5, with four cells per mixture: 4.65 M parameters."""
    return _mobilenetv2('kw4x_mobilenetv2_050', 0.5, pretrained, kwargs, **_4X)


@register_model
def kw1d2x_mobilenetv2_100(pretrained: bool = False, **kwargs: Any) -> KWMobileNetV2:
    """MobileNetV2, width 1.0, with half a cell per mixture: 2.65 M parameters."""
    return _mobilenetv2('kw1d2x_mobilenetv2_100', 1.0, pretrained, kwargs, **_1D2X)


@register_model
def kw1x_mobilenetv2_100(pretrained: bool = False, **kwargs: Any) -> KWMobileNetV2:
    """MobileNetV2, width 1.0, with one cell per mixture: 5.17 M parameters."""
    return _mobilenetv2('kw1x_mobilenetv2_100', 1.0, pretrained, kwargs)


@register_model
def kw4x_mobilenetv2_100(pretrained: bool = False, **kwargs: Any) -> KWMobileNetV2:
    """MobileNetV2, width 1.0, with four cells per mixture: 11.38 M parameters."""
    return _mobilenetv2('kw4x_mobilenetv2_100', 1.0, pretrained, kwargs, **_4X)
