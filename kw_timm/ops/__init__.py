"""How kernels are made of cells and used: the straightforward path, the default one, and what both stand on.

Depends on torch alone. One entry for layers that may learn, :func:`kernel_warehouse_conv`, and one for layers at fixed
weights, :func:`convolve_fixed`; everything else is behind them.
"""

from . import flops  # noqa: F401  (registers what operators cost)
from .dynamic_conv import convolve_fixed, kernel_warehouse_conv
from .mixing import mix_cells
from .spec import ConvSpec, Padding
from .straightforward import assemble_kernels, conv_per_sample, straightforward_conv

__all__ = [
    'ConvSpec',
    'Padding',
    'assemble_kernels',
    'conv_per_sample',
    'convolve_fixed',
    'kernel_warehouse_conv',
    'mix_cells',
    'straightforward_conv',
]
