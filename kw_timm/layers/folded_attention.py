"""The attention of a KW layer for inference: two affine maps, all that lies between them folded."""

import copy
import math

import torch
from torch import nn

from .attention import KWAttention, pool
from .mixing import compiled_module, is_exporting, is_plain

__all__ = ['FoldedAttention', 'as_affine']


class FoldedAttention(nn.Module):
    """Coefficients of a layer's mixtures at fixed weights.

    A BatchNorm's statistics are multiplied into the first map, a non-local basis into the second.

    Attributes:
        num_mixtures: Mixtures, ``m``.
        num_cells: Cells, ``n``.
        temperature: The attention's, at the time.
        hidden_weight: ``(C, hidden)``.
        hidden_bias: ``(hidden,)``.
        norm: The LayerNorm behind it, or None.
        logit_weight: ``(hidden, m * (n + 1))``.
        logit_bias: ``(m * (n + 1),)``.

    Args:
        attention: The attention. It is copied, not kept.

    Shape:
        input ``(B, C, *spatial)``; output ``(B, m, n)`` to mix cells by, or ``(B, m, hidden + 1)`` to mix bases by.
    """

    hidden_weight: torch.Tensor
    hidden_bias: torch.Tensor
    logit_weight: torch.Tensor
    logit_bias: torch.Tensor
    assignment: torch.Tensor | None

    @torch.no_grad()
    def __init__(self, attention: KWAttention) -> None:
        super().__init__()
        self.num_mixtures, self.num_cells = attention.num_mixtures, attention.num_cells
        self.temperature = attention.temperature
        weight: torch.Tensor = attention.fc1.weight
        bias: torch.Tensor = weight.new_zeros(len(weight)) if attention.fc1.bias is None else attention.fc1.bias
        norm: nn.Module | None = attention.norm1
        if isinstance(norm, nn.BatchNorm1d) and norm.running_mean is not None:
            factor, shift = as_affine(norm)
            weight, bias, norm = weight * factor[:, None], bias * factor + shift, None
        self.norm = copy.deepcopy(norm)
        self.register_buffer('hidden_weight', weight.t().clone(memory_format=torch.contiguous_format))
        self.register_buffer('hidden_bias', bias.clone())
        size = attention.fc2.in_features
        points = torch.cat([weight.new_zeros(1, size), torch.eye(size, device=weight.device, dtype=weight.dtype)])
        origin, *rows = attention.logits(points).flatten(1)
        slopes = torch.stack(rows) - origin if attention.nonlocal_basis else attention.fc2.weight.t()
        self.register_buffer('logit_weight', slopes.clone(memory_format=torch.contiguous_format))
        self.register_buffer('logit_bias', origin.clone())
        assignment = attention.assignment[:, :-1].clone() if self.temperature else None
        self.register_buffer('assignment', assignment, persistent=False)

    @property
    def num_bases(self) -> int:
        """Terms of a mixture made from bases: ``hidden + 1``."""
        return len(self.logit_weight) + 1

    def maps(self) -> torch.Tensor:
        """Return the second map by mixture, ``(m, hidden + 1, n)``: what the cells are multiplied by to get bases."""
        both = torch.cat([self.logit_weight, self.logit_bias[None]])
        return both.unflatten(1, (self.num_mixtures, -1))[..., :-1].transpose(0, 1)

    def forward(self, x: torch.Tensor, bases: bool = False) -> torch.Tensor:
        """Return the coefficients of cells, or of bases."""
        if x.dim() < 3 or x.shape[1] != len(self.hidden_weight) or not self._fits(x):
            return self._with_torch(x, bases)
        attend = _attend if is_plain(x) else torch.ops.kw_timm.attend
        coefficients = attend(
            x if x.is_contiguous() else pool(x, len(self.hidden_weight)),
            self.hidden_weight,
            self.hidden_bias,
            getattr(self.norm, 'weight', None),
            getattr(self.norm, 'bias', None),
            getattr(self.norm, 'eps', 0.0),
            self.logit_weight,
            self.logit_bias,
            self.num_mixtures,
            bases,
        )
        return coefficients if bases else self._warm(coefficients)

    def _fits(self, x: torch.Tensor) -> bool:
        norm = self.norm
        return (
            compiled_module() is not None
            and x.device.type == 'cpu'
            and x.dtype == self.hidden_weight.dtype == torch.float32
            and not (is_exporting() or torch.jit.is_tracing() or torch.is_autocast_enabled('cpu'))
            and (norm is None or (isinstance(norm, nn.LayerNorm) and norm.weight is not None and norm.bias is not None))
        )

    def _warm(self, coefficients: torch.Tensor) -> torch.Tensor:
        if self.assignment is None:
            return coefficients
        return (1 - self.temperature) * coefficients + self.temperature * self.assignment

    def _with_torch(self, x: torch.Tensor, bases: bool) -> torch.Tensor:
        hidden = torch.addmm(self.hidden_bias, pool(x, len(self.hidden_weight)), self.hidden_weight)
        if self.norm is not None:
            hidden = self.norm(hidden)
        hidden = torch.relu(hidden)
        logits = torch.addmm(self.logit_bias, hidden, self.logit_weight).unflatten(1, (self.num_mixtures, -1))
        norms = torch.linalg.vector_norm(logits, 1, -1, keepdim=True) + 1e-3
        if bases:
            return torch.cat([hidden, torch.ones_like(hidden[:, :1])], 1)[:, None] / norms
        return self._warm((logits / norms)[..., :-1])


def as_affine(norm: nn.BatchNorm1d | nn.BatchNorm2d) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the factors and shifts ``(C,)`` that a BatchNorm with running statistics amounts to in eval mode."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    factor = torch.rsqrt(norm.running_var + norm.eps)
    shift = -norm.running_mean * factor
    return (factor, shift) if norm.weight is None else (factor * norm.weight, shift * norm.weight + norm.bias)


def _attend(
    x: torch.Tensor,
    first: torch.Tensor,
    first_bias: torch.Tensor,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    epsilon: float,
    second: torch.Tensor,
    second_bias: torch.Tensor,
    mixtures: int,
    bases: bool,
) -> torch.Tensor:
    batch, (channels, width) = x.shape[0], first.shape
    logits = second.shape[1] // mixtures
    work = x.new_empty(batch * (channels + width))
    out = x.new_empty(batch, mixtures, width + 1 if bases else logits - 1)
    module = compiled_module()
    assert module is not None
    module.attend(
        x.data_ptr(),
        first.data_ptr(),
        first_bias.data_ptr(),
        0 if norm_weight is None else norm_weight.data_ptr(),
        0 if norm_bias is None else norm_bias.data_ptr(),
        second.data_ptr(),
        second_bias.data_ptr(),
        work.data_ptr(),
        out.data_ptr(),
        batch,
        channels,
        math.prod(x.shape[2:]),
        width,
        mixtures,
        logits,
        epsilon,
        bases,
    )
    return out


def _attend_fake(  # type: ignore[no-untyped-def]
    x, first, first_bias, norm_weight, norm_bias, epsilon, second, second_bias, mixtures, bases
) -> torch.Tensor:
    terms = first.shape[1] + 1 if bases else second.shape[1] // mixtures - 1
    return x.new_empty(x.shape[0], mixtures, terms)


_library = torch.library.Library('kw_timm', 'FRAGMENT')
_library.define(
    'attend(Tensor x, Tensor first, Tensor first_bias, Tensor? norm_weight, Tensor? norm_bias, float epsilon, '
    'Tensor second, Tensor second_bias, int mixtures, bool bases) -> Tensor'
)
_library.impl('attend', _attend, 'CPU')
torch.library.register_fake('kw_timm::attend', _attend_fake, lib=_library)
