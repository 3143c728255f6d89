"""KernelWarehouse backbones for MMDetection.

``custom_imports = dict(imports=['kw_mmdet'])`` in a config registers ``KWBackbone``.
"""

from .operators import use_torchvision_ops  # isort: skip  (what follows imports mmcv.ops)

from .backbone import KWBackbone
from .checks import check_config, check_neck
from .features import PyramidFeatures
from .hooks import TemperatureHook
from .optim import ConvNeXtLayerDecay

__all__ = [
    'ConvNeXtLayerDecay',
    'KWBackbone',
    'PyramidFeatures',
    'TemperatureHook',
    'check_config',
    'check_neck',
    'use_torchvision_ops',
]
