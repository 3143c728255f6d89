"""The attention of a KW layer at fixed weights, from the input to the coefficients, in one compiled call.

As separate operations these small products take longer to start than to compute.
"""

import torch

from . import native
from .modes import is_plain, is_recording

__all__ = ['attend', 'can_attend']


def can_attend(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Return whether :func:`attend` takes inputs ``x`` with maps of the type of ``weight``."""
    return (
        native.module is not None
        and x.device.type == 'cpu'
        and x.dtype == weight.dtype == torch.float32
        and not (is_recording() or torch.is_autocast_enabled('cpu'))
    )


def attend(
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
    """Return the coefficients of cells ``(B, m, n)``, or of bases ``(B, m, hidden + 1)``. Not differentiable.

    Args:
        x: ``(B, C, *spatial)``, contiguous.
        first: First map, ``(C, hidden)``.
        first_bias: ``(hidden,)``.
        norm_weight: Weight of a LayerNorm behind it ``(hidden,)``, or None.
        norm_bias: Its bias, or None.
        epsilon: The LayerNorm's.
        second: Second map, ``(hidden, m * (n + 1))``.
        second_bias: ``(m * (n + 1),)``.
        mixtures: Mixtures, ``m``.
        bases: Return coefficients of bases.
    """
    compute = _attend if is_plain(x) else torch.ops.kw_timm.attend
    return compute(x, first, first_bias, norm_weight, norm_bias, epsilon, second, second_bias, mixtures, bases)


def _attend(  # type: ignore[no-untyped-def]
    x, first, first_bias, norm_weight, norm_bias, epsilon, second, second_bias, mixtures, bases
) -> torch.Tensor:
    out = _attend_fake(x, first, first_bias, norm_weight, norm_bias, epsilon, second, second_bias, mixtures, bases)
    native.attend(out, x, (first, first_bias, norm_weight, norm_bias, second, second_bias), epsilon, bases)
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
