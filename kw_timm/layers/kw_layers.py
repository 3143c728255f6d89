"""KernelWarehouse layers: drop-in replacements for ``nn.Conv1d/2d/3d`` and ``nn.Linear``."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.fx
from torch import nn

from ..ops import ConvSpec, Padding, kernel_warehouse_conv
from ..ops.bases import bases_from_batch, conv_from_bases, conv_from_bases_or_cells, takes_bases
from ..ops.casts import cast_once
from ..ops.choice import is_measured
from ..ops.modes import autocast_dtype, is_recording
from .attention import KWAttention, NormLayer
from .shared import SharingLayer, is_summed_up, known_to_trace
from .warehouse import Warehouse

__all__ = ['KWConv1d', 'KWConv2d', 'KWConv3d', 'KWLayer', 'KWLinear']

# One node in an fx graph: its checks and its branches on shapes are run, not traced.
torch.fx.wrap('kernel_warehouse_conv')


class KWLayer(SharingLayer):
    """Base of the KernelWarehouse layers; use one of the subclasses.

    Args:
        in_channels: Input channels.
        out_channels: Output channels.
        kernel_size: Kernel window, one number or one per spatial axis.
        stride: Stride, likewise.
        padding: Zero padding, likewise, or ``'same'`` (stride 1 only) or ``'valid'``.
        dilation: Dilation, likewise.
        groups: Groups.
        bias: Learn a bias, which does not depend on the sample.
        warehouse: Cells that the layer's kernel is made of. It is referred to, not registered: the network owns it, and
            registers it before its layers.
        index: The layer's position among the kernel shapes that the warehouse was made for.
        reduction: Hidden width of the attention relative to ``in_channels``.
        nonlocal_basis_ratio: See :class:`~kw_timm.layers.KWAttention`.
        norm_layer: Norm within the attention.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Attributes:
        spec: All that never changes: how the kernel is cut into cells, and how it is convolved.

    Shape:
        As of the static layer. Kernels are computed per sample, so a batch axis is required.

    Raises:
        ValueError: If the warehouse was not made for this kernel.

    Source: arXiv 2406.07879.

    Example:
        >>> warehouse = Warehouse([(8, 4, 3, 3)])
        >>> KWConv2d(4, 8, 3, padding=1, warehouse=warehouse)(torch.ones(2, 4, 5, 5)).shape
        torch.Size([2, 8, 5, 5])
    """

    shares = 'warehouse'
    spatial_axes: int

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: int | Padding = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        warehouse: Warehouse,
        index: int = 0,
        reduction: float = 1 / 16,
        nonlocal_basis_ratio: float = 1.0,
        norm_layer: NormLayer = nn.BatchNorm1d,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if in_channels % groups or out_channels % groups:
            raise ValueError(f'groups={groups} must divide in_channels={in_channels} and out_channels={out_channels}.')
        self.in_channels = in_channels
        self.out_channels = out_channels
        self._padding: Padding = padding if isinstance(padding, str) else self._per_axis(padding)
        partition = warehouse.partition
        if not 0 <= index < len(partition.layers):
            raise ValueError(f'index {index} is out of range: the warehouse serves {len(partition.layers)} layers.')
        self.spec = ConvSpec.of(
            partition.layers[index].grid,
            partition.cell_shape,
            self._per_axis(kernel_size),
            self._per_axis(stride),
            self._padding,
            self._per_axis(dilation),
            groups,
        )
        self._check_kernel()
        # Bypasses module registration; deepcopy and pickle still keep layer and network on one warehouse.
        self.__dict__['warehouse'] = warehouse
        self.attention = KWAttention(
            in_channels, partition, index, reduction, nonlocal_basis_ratio, norm_layer, warehouse.init, device, dtype
        )
        self.bias = nn.Parameter(torch.zeros(out_channels, device=device, dtype=dtype)) if bias else None

    @property
    def kernel_size(self) -> tuple[int, ...]:
        """Kernel window."""
        return self.spec.kernel_size

    @property
    def stride(self) -> tuple[int, ...]:
        """Stride per spatial axis."""
        return self.spec.stride

    @property
    def padding(self) -> Padding:
        """Zero padding per spatial axis, or ``'same'`` or ``'valid'``, as it was given."""
        return self._padding

    @property
    def dilation(self) -> tuple[int, ...]:
        """Dilation per spatial axis."""
        return self.spec.dilation

    @property
    def groups(self) -> int:
        """Groups."""
        return self.spec.groups

    def __getattr__(self, name: str) -> Any:
        # For tools that look for a static layer's weight; `hasattr` is false all the same.
        if name == 'weight':
            raise AttributeError(
                f'{type(self).__name__}({self.extra_repr()}) has no weight, because its kernel is made anew for every '
                f'sample: call the layer instead of reading its weight, or read the cells in layer.warehouse.weight; '
                f'what needs a static layer here (such as test-time pooling of a KW classifier) cannot be used.'
            )
        return super().__getattr__(name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Convolve each sample of ``x: (B, C, *spatial)`` with its own kernel."""
        if takes_bases(x):
            convolve = None
            if is_measured(x) and x.shape[0] != 0 and self._has_bases:
                convolve = conv_from_bases_or_cells
            elif self.uses_bases(x.shape[0]):
                convolve = conv_from_bases
            if convolve is not None:
                return convolve(x, *self.attention.of_bases(x), self._cells_for(x), self.bias, self.spec)
        return kernel_warehouse_conv(x, self.attention(x), self._cells_for(x), self.bias, self.spec)

    def uses_bases(self, batch_size: int) -> bool:
        """Return whether kernels of so many samples are made from bases, where torch just computes."""
        attention = self.attention
        return batch_size >= bases_from_batch(attention.num_terms, attention.num_cells) and self._has_bases

    @property
    def _has_bases(self) -> bool:
        return self.spec.groups == 1 and self.attention.is_affine  # Depthwise kernels are small.

    def _cells_for(self, x: torch.Tensor) -> torch.Tensor:
        cells = self._cells()
        if isinstance(x, torch.fx.Proxy) or is_recording():
            return cells
        return cast_once(cells, autocast_dtype(x), id(self))

    def _cells(self) -> torch.Tensor:
        warehouse = self.__dict__['warehouse']
        if torch.jit.is_tracing():
            return known_to_trace(warehouse, warehouse.weight)
        if is_summed_up(warehouse):
            cells: torch.Tensor = warehouse.weight
            return cells
        cells = warehouse()
        if hasattr(warehouse, 'set_reshard_after_forward') and not cells.untyped_storage().size():
            raise RuntimeError(
                'The cells of a warehouse that is sharded by itself were freed before the layer used them; shard it by '
                'fully_shard(warehouse, reshard_after_forward=False), or leave it to the network that holds it.'
            )
        return cells

    def extra_repr(self) -> str:
        """Return the arguments of the static layer."""
        return describe(self)

    def _per_axis(self, value: int | tuple[int, ...]) -> tuple[int, ...]:
        values = (value,) * self.spatial_axes if isinstance(value, int) else tuple(value)
        if len(values) != self.spatial_axes:
            raise ValueError(f'Expected one number or {self.spatial_axes}, got {value!r}.')
        return values

    def _check_kernel(self) -> None:
        made_for, positions = self.spec.kernel_shape[:2], self.spec.grid[0] * math.prod(self.spec.cell_shape[2:])
        kernel = (self.out_channels, self.in_channels // self.groups, *self.kernel_size)
        if made_for != kernel[:2] or positions != math.prod(self.kernel_size):
            raise ValueError(
                f'The warehouse was made for a kernel of {made_for[0]} x {made_for[1]} channels and {positions} window '
                f'positions at this index, but the layer has a kernel of shape {kernel}. '
                f'Make the warehouse from the kernel shapes of the layers that use it, in their order.'
            )


def describe(layer: KWLayer) -> str:
    """Return the arguments of a KW layer's static layer, for ``extra_repr``."""
    return (
        f'{layer.in_channels}, {layer.out_channels}, kernel_size={layer.kernel_size}, stride={layer.stride}, '
        f'padding={layer.padding}, dilation={layer.dilation}, groups={layer.groups}, bias={layer.bias is not None}'
    )


def map_tokens(
    x: torch.Tensor, in_channels: int, out_channels: int, convolve: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Give tokens ``(B, *tokens, in_channels)`` to a 1x1 convolution ``(B, in, N) -> (B, out, N)``; return tokens."""
    if is_recording() and x.dim() == 2:
        return convolve(x.unsqueeze(-1)).squeeze(-1)  # No size of the batch gets into the graph.
    y = convolve(x.reshape(x.shape[0], -1, in_channels).transpose(1, 2)).transpose(1, 2)
    # A sum, since a traced shape cannot be unpacked.
    return y.reshape(x.shape[:-1] + (out_channels,))  # noqa: RUF005


class KWConv1d(KWLayer):
    """KernelWarehouse counterpart of ``nn.Conv1d``; arguments as :class:`KWLayer`."""

    spatial_axes = 1


class KWConv2d(KWLayer):
    """KernelWarehouse counterpart of ``nn.Conv2d``; arguments as :class:`KWLayer`."""

    spatial_axes = 2


class KWConv3d(KWLayer):
    """KernelWarehouse counterpart of ``nn.Conv3d``; arguments as :class:`KWLayer`."""

    spatial_axes = 3


class KWLinear(KWLayer):
    """KernelWarehouse counterpart of ``nn.Linear``: a 1x1 convolution over the tokens, pooled over the tokens.

    Args:
        in_features: Input features.
        out_features: Output features.
        bias: Learn a bias.
        **kwargs: ``warehouse``, ``index`` and the other keyword arguments of :class:`KWLayer`. The warehouse's
            kernel shape is ``(out_features, in_features, 1)``.

    Shape:
        input ``(B, *tokens, in_features)``, output ``(B, *tokens, out_features)``.
    """

    spatial_axes = 1

    def __init__(self, in_features: int, out_features: int, bias: bool = True, **kwargs: Any) -> None:
        super().__init__(in_features, out_features, 1, bias=bias, **kwargs)

    @property
    def in_features(self) -> int:
        """Input features, as ``nn.Linear`` names them."""
        return self.in_channels

    @property
    def out_features(self) -> int:
        """Output features, as ``nn.Linear`` names them."""
        return self.out_channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map each sample's tokens ``(B, *tokens, in_features)`` with the sample's own matrix."""
        return map_tokens(x, self.in_channels, self.out_channels, super().forward)

    def extra_repr(self) -> str:
        """Return the arguments of the static layer."""
        return f'in_features={self.in_channels}, out_features={self.out_channels}, bias={self.bias is not None}'
