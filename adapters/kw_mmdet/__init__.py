"""KernelWarehouse backbones for MMDetection.

``custom_imports = dict(imports=['kw_mmdet'])`` in a config registers ``KWBackbone``.
"""

from .operators import use_torchvision_ops  # isort: skip  (what follows imports mmcv.ops)

from .backbone import KWBackbone
from .checks import check_config, check_neck
from .configs import configs_path
from .features import PyramidFeatures
from .flops import count_kw_layers
from .fusing import protect_timm_networks
from .generation import apply_bridges, trust_checkpoints
from .hooks import TemperatureHook
from .optim import ConvNeXtLayerDecay

trust_checkpoints()
apply_bridges()
protect_timm_networks()
count_kw_layers()

__all__ = [
    'ConvNeXtLayerDecay',
    'KWBackbone',
    'PyramidFeatures',
    'TemperatureHook',
    'check_config',
    'check_neck',
    'configs_path',
    'use_torchvision_ops',
]
