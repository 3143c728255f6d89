"""KW layers for inference: constants folded, kernels made by whichever contraction is cheaper.

The logits of the attention are linear in its hidden vector ``h``. With ``g = [h, 1]`` and the mixture's norm ``s``, a
mixture is ``s * sum_j (F g)_j E_j``: either the cells ``E`` are mixed by ``s * F g``, or the products ``F^T E``, the
*bases* of the mixture, are made once and mixed by ``s * g``. Bases are fewer than cells where the hidden vector is
short and the warehouse large, but every layer has its own.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

from ..layers import KWLayer, KWLinear
from ..layers.kw_layers import describe, map_tokens
from ..layers.shared import SharedModule, SharingLayer
from ..ops import convolve_fixed
from ..ops.modes import is_recording
from .attention import FoldedAttention, as_affine

__all__ = ['CellStore', 'MixingWork', 'OptimizedKWLayer', 'bases_bytes', 'store_cells']

# What a processor can compute while it reads one byte; only which contraction is chosen depends on it.
_FLOPS_PER_BYTE = 6.0
_LARGEST_BATCH = 64  # beyond, what is cheaper no longer changes
# Elements between cells: at distances of a power of two, cells contend for the same few lines of a cache.
_PADDING = 16


@dataclass(frozen=True)
class MixingWork:
    """What making the kernels of a batch costs.

    Attributes:
        flops: Floating point operations (a multiply-add is two).
        bytes: Bytes of cells, or of bases, that are read.
    """

    flops: float
    bytes: float

    @classmethod
    def of(cls, batch_size: int, mixtures: int, terms: int, cell_size: int, read: float) -> 'MixingWork':
        """Return the cost of mixtures that are sums of ``terms`` cells or bases, of which ``read`` bytes are read."""
        return cls(2.0 * batch_size * mixtures * terms * cell_size, read)

    def __add__(self, other: 'MixingWork') -> 'MixingWork':
        return MixingWork(self.flops + other.flops, self.bytes + other.bytes)

    @property
    def cost(self) -> float:
        """Time on an idealized machine, in the time it takes to read a byte."""
        return max(self.bytes, self.flops / _FLOPS_PER_BYTE)


class CellStore(SharedModule):
    """A warehouse's cells as inference reads them.

    Attributes:
        cells: ``(n, co, ci, *window)``, float32, bfloat16 or int8.
        scales: For int8 ``(n,)``, what a cell is to be multiplied by; else None.
        error: Relative error of the cells, in the Frobenius norm.
    """

    cells: torch.Tensor
    scales: torch.Tensor | None

    def __init__(self, cells: torch.Tensor, storage: torch.dtype | None = None) -> None:
        super().__init__()
        stored, scales, self.error = store_cells(cells.detach(), 1, storage)
        self.register_buffer('cells', stored)
        self.register_buffer('scales', scales)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Pass the input on, as the warehouses of a sequential network do."""
        return x


def store_cells(
    cells: torch.Tensor, lead: int, storage: torch.dtype | None
) -> tuple[torch.Tensor, torch.Tensor | None, float]:
    """Copy cells the way they are read fastest.

    Args:
        cells: Cells or bases; the first ``lead`` axes count them.
        lead: Number of those axes.
        storage: ``torch.bfloat16``, ``torch.int8`` (symmetric, one scale per cell) or None for the type they have.

    Returns:
        The cells; for int8 their scales; the relative error in the Frobenius norm.
    """
    flat = cells.flatten(lead)
    scales = None
    if storage == torch.int8:
        scales = flat.abs().amax(-1) / 127
        divisor = scales.clamp(min=torch.finfo(scales.dtype).tiny)[..., None]
        rounded = (flat / divisor).round_()
        error = _relative_error(rounded * divisor, flat)
    else:
        rounded = flat if storage is None else flat.to(storage)
        error = 0.0 if storage is None else _relative_error(rounded.to(flat.dtype), flat)
    padded = cells.new_zeros(*flat.shape[:-1], flat.shape[-1] + _PADDING, dtype=storage or cells.dtype)
    padded[..., : flat.shape[-1]] = rounded
    return padded[..., : flat.shape[-1]].unflatten(-1, cells.shape[lead:]), scales, error


def _relative_error(approximate: torch.Tensor, exact: torch.Tensor) -> float:
    norm = exact.norm()
    return float((approximate - exact).norm() / norm) if norm > 0 else 0.0


class OptimizedKWLayer(SharingLayer):
    """A KW layer at fixed weights; made by :func:`kw_timm.optimize_for_inference`.

    Args:
        layer: The layer. It is copied, not kept.
        store: The cells, referred to, not registered; or None if bases are all that is used.
        bases: Whether to make bases.
        norm: A BatchNorm right behind the layer, to be folded into it.
        storage: How bases are stored.

    Shape:
        As of the layer.
    """

    shares = 'store'
    bias: torch.Tensor | None
    factors: torch.Tensor | None
    bases: torch.Tensor | None
    base_scales: torch.Tensor | None

    @torch.no_grad()
    def __init__(
        self,
        layer: KWLayer,
        store: CellStore | None,
        bases: bool,
        norm: nn.BatchNorm2d | None = None,
        storage: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not bases and store is None:
            raise ValueError('The layer needs cells or bases.')
        self.tokens = isinstance(layer, KWLinear)
        self.in_channels, self.out_channels = layer.in_channels, layer.out_channels
        self.spec, self.description = layer.spec, describe(layer)
        self.__dict__['store'] = store
        self.attention = FoldedAttention(layer.attention)
        factors, bias = _affine(norm, layer.bias)
        self.register_buffer('factors', factors)
        self.register_buffer('bias', bias)
        made: tuple[torch.Tensor | None, torch.Tensor | None, float] = (None, None, 0.0)
        if bases:
            made = store_cells(_make_bases(layer, self.attention, factors), 2, storage)
        self.register_buffer('bases', made[0])
        self.register_buffer('base_scales', made[1])
        self.error = made[2]
        self.bases_from = self._first_batch_for_bases()

    def work(self, batch_size: int) -> MixingWork:
        """Return what the kernels of a batch cost by the contraction that is used for it."""
        return self._work(batch_size, self._uses_bases(batch_size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Convolve each sample of ``x: (B, C, *spatial)``, or tokens ``(B, *tokens, C)``, with its own kernel."""
        if self.training:
            raise RuntimeError(
                'A network that was optimized for inference cannot be trained; call .eval(), or train the network '
                'that it was made from and optimize again.'
            )
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                'A network that was optimized for inference has no gradients, also not of its input; '
                'take them from the network that it was made from.'
            )
        if not self.tokens:
            return self._convolve(x)
        return map_tokens(x, self.in_channels, self.out_channels, self._convolve)

    def extra_repr(self) -> str:
        """Return the arguments of the static layer, and the contractions there are."""
        ways = [way for way, there in (('cells', self.__dict__['store']), ('bases', self.bases)) if there is not None]
        return f'{self.description}, from={" or ".join(ways)}'

    def _convolve(self, x: torch.Tensor) -> torch.Tensor:
        source, scales, factors = self._source(self._uses_bases(x.shape[0]))
        coefficients = self.attention(x, bases=source is self.bases)
        if scales is not None:
            coefficients = coefficients * scales
        return convolve_fixed(x, coefficients, source, self.bias, self.spec, factors)

    def _uses_bases(self, batch_size: int) -> bool:
        if is_recording():  # One way for every batch: the one that was planned.
            return self.bases is not None
        return batch_size >= self.bases_from

    def _first_batch_for_bases(self) -> float:
        """Return the batch size from which on bases are cheaper: their costs grow more slowly, or never catch up."""
        if self.bases is None:
            return math.inf
        if self.__dict__['store'] is None:
            return 0
        sizes = range(1, _LARGEST_BATCH + 1)
        cheaper = (b for b in sizes if self._work(b, True).cost <= self._work(b, False).cost)
        return next(cheaper, math.inf)

    def _source(self, bases: bool) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Return what is mixed, what its coefficients and the kernels' output channels are multiplied by."""
        if bases and self.bases is not None:
            return self.bases, self.base_scales, None
        store = self.__dict__['store']
        return store.cells, store.scales, self.factors

    def _work(self, batch_size: int, bases: bool) -> MixingWork:
        source = self._source(bases)[0]
        terms = self.attention.num_bases if bases else self.attention.num_cells
        read = source.numel() * source.element_size()
        return MixingWork.of(batch_size, self.attention.num_mixtures, terms, math.prod(self.spec.cell_shape), read)


def _affine(norm: nn.BatchNorm2d | None, bias: torch.Tensor | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return factors and bias of a layer's output channels, given a BatchNorm behind the layer."""
    if norm is None:
        return None, None if bias is None else bias.detach().clone()
    factors, shift = as_affine(norm)
    return factors, shift if bias is None else shift + bias * factors


def _make_bases(layer: KWLayer, attention: FoldedAttention, factors: torch.Tensor | None) -> torch.Tensor:
    """Multiply a layer's second affine map with the cells: ``(m, hidden + 1, co, ci, *window)``."""
    cells = layer.__dict__['warehouse'].weight
    maps = attention.maps()
    bases = (maps.flatten(0, 1) @ cells.flatten(1)).view(*maps.shape[:2], *cells.shape[1:])
    if factors is None:
        return bases
    positions, out_groups, in_groups = layer.spec.grid
    by_mixture = factors.view(1, out_groups, 1, -1).expand(positions, out_groups, in_groups, cells.shape[1])
    return bases.mul_(by_mixture.reshape(len(maps), 1, -1, *(1,) * (cells.dim() - 2)))


def bases_bytes(layer: KWLayer, storage: torch.dtype | None = None) -> int:
    """Return the memory that a layer's bases would take."""
    cells = layer.__dict__['warehouse'].weight
    size = (storage or cells.dtype).itemsize
    return (
        layer.attention.num_mixtures
        * (layer.attention.fc2.in_features + 1)
        * (math.prod(cells.shape[1:]) + _PADDING)
        * size
    )
