"""KernelWarehouse backbones for MMDetection.

``custom_imports = dict(imports=['kw_mmdet'])`` in a config registers ``KWBackbone``.
"""

from .backbone import KWBackbone
from .checks import check_config, check_neck
from .features import PyramidFeatures
from .fusing import protect_timm_networks
from .hooks import TemperatureHook
from .optim import ConvNeXtLayerDecay

protect_timm_networks()

__all__ = ['ConvNeXtLayerDecay', 'KWBackbone', 'PyramidFeatures', 'TemperatureHook', 'check_config', 'check_neck']
