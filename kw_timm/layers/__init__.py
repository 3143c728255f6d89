"""The KernelWarehouse method; depends on torch alone."""

from .attention import KWAttention
from .dynamic_conv import kernel_warehouse_conv, straightforward
from .functional import assemble_kernels, conv_per_sample, straightforward_conv
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
    'assemble_kernels',
    'assign_cells',
    'conv_per_sample',
    'kernel_warehouse_conv',
    'partition_kernels',
    'straightforward',
    'straightforward_conv',
]
