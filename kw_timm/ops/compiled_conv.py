"""Per-sample convolution as one operator of compiled graphs.

To a compiler the groups of a convolution are a constant: as a grouped convolution, every batch size would be compiled
anew. As an operator the batch is one of its sizes, and what runs is what is fastest without compiling.
"""

from collections.abc import Sequence
from typing import Any

import torch

from .convolution import convolve, convolve_backward
from .spec import ConvSpec
from .straightforward import add_bias

__all__ = ['conv_in_compiled_graph']


def conv_in_compiled_graph(
    x: torch.Tensor, kernels: torch.Tensor, bias: torch.Tensor | None, spec: ConvSpec
) -> torch.Tensor:
    """Convolve as :func:`~kw_timm.ops.conv_per_sample` does. Differentiable."""
    return add_bias(torch.ops.kw_timm.convolve(x, kernels, spec.stride, spec.padding, spec.dilation, spec.groups), bias)


def _spec(kernels: torch.Tensor, stride: Any, padding: Any, dilation: Any, groups: int) -> ConvSpec:
    _, channels, inputs, *window = kernels.shape
    cell = (channels, inputs, *window)
    return ConvSpec.of((1, 1, 1), cell, tuple(window), tuple(stride), tuple(padding), tuple(dilation), groups)


def _convolve(x: torch.Tensor, kernels: torch.Tensor, *rest: Any) -> torch.Tensor:
    return convolve(x, kernels.contiguous(), _spec(kernels, *rest)).contiguous()


def _convolve_fake(x: torch.Tensor, kernels: torch.Tensor, *rest: Any) -> torch.Tensor:
    return x.new_empty(x.shape[0], kernels.shape[1], *_spec(kernels, *rest).output_size(x))


def _gradients(
    grad: torch.Tensor, x: torch.Tensor, kernels: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    *spec, need_x, need_kernels = rest
    kernels = kernels.contiguous()
    found = convolve_backward(grad, x, kernels, _spec(kernels, *spec), need_x, need_kernels)
    first, second = (grad.new_empty(0) if g is None else g.contiguous() for g in found)
    return first, second


def _gradients_fake(
    grad: torch.Tensor, x: torch.Tensor, kernels: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    need_x, need_kernels = rest[-2:]
    return grad.new_empty(x.shape if need_x else (0,)), grad.new_empty(kernels.shape if need_kernels else (0,))


def _keep(ctx: Any, inputs: Sequence[Any], output: torch.Tensor) -> None:
    x, kernels, *ctx.rest = inputs
    ctx.save_for_backward(x, kernels)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    need = ctx.needs_input_grad[:2]
    found = torch.ops.kw_timm.convolve_backward(grad, *ctx.saved_tensors, *ctx.rest, *need)
    return (*(g if needed else None for g, needed in zip(found, need, strict=True)), *(None,) * len(ctx.rest))


_library = torch.library.Library('kw_timm', 'FRAGMENT')
_arguments = 'Tensor x, Tensor kernels, int[] stride, int[] padding, int[] dilation, int groups'
_library.define(f'convolve({_arguments}) -> Tensor')
_library.define(f'convolve_backward(Tensor grad, {_arguments}, bool need_input, bool need_kernels) -> (Tensor, Tensor)')
# By torch's operations, so for every backend.
_library.impl('convolve', _convolve, 'CompositeExplicitAutograd')
_library.impl('convolve_backward', _gradients, 'CompositeExplicitAutograd')
torch.library.register_fake('kw_timm::convolve', _convolve_fake, lib=_library)
torch.library.register_fake('kw_timm::convolve_backward', _gradients_fake, lib=_library)
torch.library.register_autograd('kw_timm::convolve', _backward, setup_context=_keep, lib=_library)
