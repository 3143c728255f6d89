"""The KernelWarehouse method: partition, warehouse, attention, layers. How it is computed is in :mod:`kw_timm.ops`."""

from ..ops import buffers
from ..ops.choice import measured
from ..ops.modes import straightforward
from .attention import KWAttention
from .kw_layers import KWConv1d, KWConv2d, KWConv3d, KWLayer, KWLinear
from .partition import LayerPartition, Partition, assign_cells, partition_kernels
from .warehouse import Warehouse

__all__ = [
    'KWAttention',
    'KWConv1d',
    'KWConv2d',
    'KWConv3d',
    'KWLayer',
    'KWLinear',
    'LayerPartition',
    'Partition',
    'Warehouse',
    'assign_cells',
    'buffers',
    'measured',
    'partition_kernels',
    'straightforward',
]
