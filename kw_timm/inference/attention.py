"""The attention of a KW layer for inference: two affine maps, all that lies between them folded."""

import copy
from typing import Any

import torch
from torch import nn

from ..layers.attention import KWAttention, as_maps, pool, sum_of_magnitudes
from ..ops.attend import attend, can_attend

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
        norm: Any = attention.norm1
        # A BatchNorm, or what freezing or synchronizing has put in its place.
        if getattr(norm, 'running_mean', None) is not None:
            factor, shift = as_affine(norm)
            weight, bias, norm = weight * factor[:, None], bias * factor + shift, None
        self.norm = copy.deepcopy(norm)
        self.register_buffer('hidden_weight', weight.t().clone(memory_format=torch.contiguous_format))
        self.register_buffer('hidden_bias', bias.clone())
        slopes, origin = attention.affine()
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
        return as_maps(self.logit_weight, self.logit_bias, self.num_mixtures)

    def forward(self, x: torch.Tensor, bases: bool = False) -> torch.Tensor:
        """Return the coefficients of cells, or of bases."""
        if not self._fits(x) or x.dim() < 3 or x.shape[1] != len(self.hidden_weight):
            return self._with_torch(x, bases)
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
        plain = norm is None or (isinstance(norm, nn.LayerNorm) and norm.weight is not None and norm.bias is not None)
        return plain and can_attend(x, self.hidden_weight)

    def _warm(self, coefficients: torch.Tensor) -> torch.Tensor:
        if self.assignment is None:
            return coefficients
        return (1 - self.temperature) * coefficients + self.temperature * self.assignment

    def _with_torch(self, x: torch.Tensor, bases: bool) -> torch.Tensor:
        hidden = torch.addmm(self.hidden_bias, pool(x, self.hidden_weight.shape[0]), self.hidden_weight)
        if self.norm is not None:
            hidden = self.norm(hidden)
        hidden = torch.relu(hidden)
        logits = torch.addmm(self.logit_bias, hidden, self.logit_weight).unflatten(1, (self.num_mixtures, -1))
        norms = sum_of_magnitudes(logits) + 1e-3
        if bases:
            return (torch.cat([hidden, torch.ones_like(hidden[:, :1])], 1)[:, None] / norms).to(logits.dtype)
        return self._warm((logits / norms)[..., :-1]).to(logits.dtype)


def as_affine(norm: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the factors and shifts ``(C,)`` that a BatchNorm with running statistics amounts to in eval mode."""
    factor = torch.rsqrt(norm.running_var + norm.eps)
    shift = -norm.running_mean * factor
    return (factor, shift) if norm.weight is None else (factor * norm.weight, shift * norm.weight + norm.bias)
