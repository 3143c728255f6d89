"""The released KernelWarehouse networks, registered with timm. One file per family."""

from ._network import KWNetwork
from .kw_convnext import *  # noqa: F403
from .kw_convnext import KWConvNeXt
from .kw_mobilenetv2 import *  # noqa: F403
from .kw_mobilenetv2 import KWMobileNetV2
from .kw_resnet import *  # noqa: F403
from .kw_resnet import KWResNet

__all__ = ['KWConvNeXt', 'KWMobileNetV2', 'KWNetwork', 'KWResNet']
