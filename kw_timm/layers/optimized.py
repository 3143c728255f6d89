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

from .attention import KWAttention, pool
from .dynamic_conv import as_convolution, convolve_in_chunks
from .functional import check_input, conv_per_sample
from .kw_layers import KWLayer, KWLinear
from .mixing import mix_cells

__all__ = ['CellStore', 'MixingWork', 'OptimizedKWLayer', 'fold_attention', 'make_bases', 'store_cells']

# What a processor can compute while it reads one byte; only which contraction is chosen depends on it.
_FLOPS_PER_BYTE = 6.0
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

    def __add__(self, other: 'MixingWork') -> 'MixingWork':
        return MixingWork(self.flops + other.flops, self.bytes + other.bytes)

    @property
    def cost(self) -> float:
        """Time on an idealized machine, in the time it takes to read a byte."""
        return max(self.bytes, self.flops / _FLOPS_PER_BYTE)


class CellStore(nn.Module):
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


class OptimizedKWLayer(nn.Module):
    """A KW layer with its attention folded into two matrices; made by :func:`kw_timm.optimize_for_inference`.

    Args:
        layer: The layer. It is copied, not kept.
        store: The cells, referred to, not registered; or None if ``bases`` are all that is used.
        bases: Whether to make bases.
        storage: How bases are stored.

    Shape:
        As of the layer.
    """

    hidden_weight: torch.Tensor
    hidden_bias: torch.Tensor
    logit_weight: torch.Tensor
    logit_bias: torch.Tensor
    bias: torch.Tensor | None
    assignment: torch.Tensor | None
    bases: torch.Tensor | None
    base_scales: torch.Tensor | None

    def __init__(
        self, layer: KWLayer, store: CellStore | None, bases: bool, storage: torch.dtype | None = None
    ) -> None:
        super().__init__()
        if not bases and store is None:
            raise ValueError('The layer needs cells or bases.')
        attention = layer.attention
        self.tokens = isinstance(layer, KWLinear)
        self.in_channels, self.out_channels = layer.in_channels, layer.out_channels
        self.grid, self.kernel_size, self.groups = layer.grid, layer.kernel_size, layer.groups
        self.stride, self.padding, self.dilation = layer.stride, layer.padding, layer.dilation
        self.num_mixtures, self.num_cells = attention.num_mixtures, attention.num_cells
        self.num_bases = attention.fc2.in_features + 1
        self.cell_size = layer.__dict__['warehouse'].weight[0].numel()
        self.temperature = attention.temperature
        self.__dict__['store'] = store
        hidden_weight, hidden_bias, norm, logit_weight, logit_bias = fold_attention(attention)
        self.register_buffer('hidden_weight', hidden_weight)
        self.register_buffer('hidden_bias', hidden_bias)
        self.norm = norm
        self.register_buffer('logit_weight', logit_weight)
        self.register_buffer('logit_bias', logit_bias)
        self.register_buffer('bias', None if layer.bias is None else layer.bias.detach().clone())
        assignment = attention.assignment[:, :-1].clone() if self.temperature else None
        self.register_buffer('assignment', assignment, persistent=False)
        made, scales, self.error = make_bases(layer, storage) if bases else (None, None, 0.0)
        self.register_buffer('bases', made)
        self.register_buffer('base_scales', scales)

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
        if not self.tokens:
            return self._convolve(x)
        y = self._convolve(x.reshape(x.shape[0], -1, self.in_channels).transpose(1, 2)).transpose(1, 2)
        return y.reshape(x.shape[:-1] + (self.out_channels,))  # noqa: RUF005

    def extra_repr(self) -> str:
        """Return the arguments of the static layer, and the contractions there are."""
        ways = [way for way, there in (('cells', self.__dict__['store']), ('bases', self.bases)) if there is not None]
        return (
            f'{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, '
            f'padding={self.padding}, dilation={self.dilation}, groups={self.groups}, '
            f'bias={self.bias is not None}, from={" or ".join(ways)}'
        )

    def _convolve(self, x: torch.Tensor) -> torch.Tensor:
        check_input(x, self.kernel_size, self.padding, self.dilation)
        hidden = torch.addmm(self.hidden_bias, pool(x, self.in_channels), self.hidden_weight)
        if self.norm is not None:
            hidden = self.norm(hidden)
        hidden = torch.relu(hidden)
        logits = torch.addmm(self.logit_bias, hidden, self.logit_weight)
        logits = logits.view(-1, self.num_mixtures, self.num_cells + 1)
        norms = torch.linalg.vector_norm(logits, 1, -1, keepdim=True) + 1e-3
        source, scales = self._source(self._uses_bases(x.shape[0]))
        if source is self.bases:
            coefficients = torch.cat([hidden, torch.ones_like(hidden[:, :1])], 1)[:, None] / norms
        else:
            coefficients = (logits / norms)[..., :-1]
            if self.assignment is not None:
                coefficients = (1 - self.temperature) * coefficients + self.temperature * self.assignment
        if scales is not None:
            coefficients = coefficients * scales
        conv = as_convolution(self.kernel_size, self.stride, self.padding, self.dilation, self.groups)
        if conv is not None and x.shape[0] > 0:
            return convolve_in_chunks(x, coefficients, source, self.bias, self.grid, self.kernel_size, conv)
        kernels = mix_cells(coefficients, source, self.grid, self.kernel_size)
        return conv_per_sample(x, kernels, self.bias, self.stride, self.padding, self.dilation, self.groups)

    def _uses_bases(self, batch_size: int) -> bool:
        if self.bases is None or self.__dict__['store'] is None:
            return self.bases is not None
        return self._work(batch_size, True).cost <= self._work(batch_size, False).cost

    def _source(self, bases: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        if bases and self.bases is not None:
            return self.bases, self.base_scales
        store = self.__dict__['store']
        return store.cells, store.scales

    def _work(self, batch_size: int, bases: bool) -> MixingWork:
        source, _ = self._source(bases)
        terms = self.num_bases if bases else self.num_cells
        return MixingWork(
            2.0 * batch_size * self.num_mixtures * terms * self.cell_size, source.numel() * source.element_size()
        )


@torch.no_grad()
def fold_attention(
    attention: KWAttention,
) -> tuple[torch.Tensor, torch.Tensor, nn.Module | None, torch.Tensor, torch.Tensor]:
    """Write an attention as two affine maps with a ReLU between them.

    Args:
        attention: The attention; the statistics of its BatchNorm are taken as they are.

    Returns:
        ``(C, hidden)`` and ``(hidden,)`` of the first map; the norm behind it, None where it could be folded;
        ``(hidden, m * (n + 1))`` and ``(m * (n + 1),)`` of the second, a non-local basis multiplied out.
    """
    weight: torch.Tensor = attention.fc1.weight
    bias: torch.Tensor = weight.new_zeros(len(weight)) if attention.fc1.bias is None else attention.fc1.bias
    norm: nn.Module | None = attention.norm1
    if isinstance(norm, nn.BatchNorm1d) and norm.running_mean is not None and norm.running_var is not None:
        factor = torch.rsqrt(norm.running_var + norm.eps)
        shift = -norm.running_mean * factor
        if norm.weight is not None:
            factor, shift = factor * norm.weight, shift * norm.weight + norm.bias
        weight, bias, norm = weight * factor[:, None], bias * factor + shift, None
    size = attention.fc2.in_features
    points = torch.cat([weight.new_zeros(1, size), torch.eye(size, device=weight.device, dtype=weight.dtype)])
    origin, *rows = attention.logits(points).flatten(1)
    slopes = attention.fc2.weight.t() if not attention.nonlocal_basis else torch.stack(rows) - origin
    return weight.t().contiguous(), bias.clone(), norm, slopes.contiguous(), origin.clone()


@torch.no_grad()
def make_bases(layer: KWLayer, storage: torch.dtype | None = None) -> tuple[torch.Tensor, torch.Tensor | None, float]:
    """Multiply a layer's second affine map with the cells.

    Args:
        layer: A KW layer.
        storage: See :func:`store_cells`.

    Returns:
        Bases ``(m, hidden + 1, co, ci, *window)``; for int8 their scales ``(m, hidden + 1)``; their relative error.
    """
    *_, slopes, origin = fold_attention(layer.attention)
    cells = layer.__dict__['warehouse'].weight
    maps = torch.cat([slopes, origin[None]]).unflatten(1, (-1, len(cells) + 1))[..., :-1].transpose(0, 1)
    bases = (maps.flatten(0, 1) @ cells.flatten(1)).view(*maps.shape[:2], *cells.shape[1:])
    return store_cells(bases, 2, storage)


def bases_bytes(layer: KWLayer, storage: torch.dtype | None = None) -> int:
    """Return the memory that a layer's bases would take."""
    cells = layer.__dict__['warehouse'].weight
    size = (storage or cells.dtype).itemsize
    return layer.attention.num_mixtures * (layer.attention.fc2.in_features + 1) * math.prod(cells.shape[1:]) * size
