"""KernelWarehouse networks, registered with timm: the released ones, one file per family, and those of any plan."""

from ._network import KWNetwork
from .derived import *  # noqa: F403
from .kernelized import KernelizedNetwork, kernelized
from .kw_convnext import *  # noqa: F403
from .kw_convnext import KWConvNeXt
from .kw_mobilenetv2 import *  # noqa: F403
from .kw_mobilenetv2 import KWMobileNetV2
from .kw_resnet import *  # noqa: F403
from .kw_resnet import KWResNet

__all__ = ['KWConvNeXt', 'KWMobileNetV2', 'KWNetwork', 'KWResNet', 'KernelizedNetwork', 'kernelized']
