"""Convolving every sample with its own kernel, and the gradients: a table of ways, and which one is taken.

==============  ======================================================================================================
product         Pointwise kernels (1x1, one group) as a batched matrix product: as fast as the static convolution.
loop            One call per sample. On a CPU one grouped convolution of kernels of one group can be several times
                slower, because its kernels are reordered for the machine one group at a time.
grouped         One call for the batch, whose samples are groups: the rule on a GPU, and for depthwise kernels.
channels_last   The same, with the pixels' channels side by side.
unfold          What a window sees is gathered, and multiplied with the kernels.
==============  ======================================================================================================

Every way computes the same, and is held against the straightforward one by the tests. Which is taken, a rule says, or
measuring: see :mod:`~kw_timm.ops.choice`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from .choice import fastest, is_measured
from .spec import ConvSpec
from .straightforward import CONV, add_bias, conv_per_sample

__all__ = ['WAYS', 'conv_pointwise', 'convolve', 'convolve_backward']

Gradients = tuple[torch.Tensor | None, torch.Tensor | None]


@dataclass(frozen=True)
class Way:
    """A way to convolve: arguments and results of both directions are those of :func:`convolve`, without the bias."""

    takes: Callable[[torch.Tensor, ConvSpec], bool]
    forward: Callable[..., torch.Tensor]
    backward: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, ConvSpec, bool, bool], Gradients]


def by_rule(x: torch.Tensor, spec: ConvSpec) -> str:
    """Return the way that is fastest as a rule."""
    if spec.is_pointwise:
        return 'product'
    return 'loop' if x.shape[0] == 1 or (x.device.type == 'cpu' and spec.groups == 1) else 'grouped'


def convolve(
    x: torch.Tensor,
    kernels: torch.Tensor,
    spec: ConvSpec,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Convolve each sample with its own kernel. Not differentiable.

    Args:
        x: ``(B, C, *spatial)``.
        kernels: ``(B, O, C / groups, *k)``, contiguous.
        spec: The layer's constants; padding that only ends get is there already.
        bias: ``(O,)`` or None, the same for all samples.
        out: ``(B, O, *spatial')``, contiguous, to be overwritten; allocated where not given.

    Returns:
        ``(B, O, *spatial')``.
    """
    way = by_rule(x, spec)
    if is_measured(x):
        ways = {name: partial(way.forward, x, kernels, spec, out) for name, way in WAYS.items() if way.takes(x, spec)}
        way = fastest(('convolve', x.shape, spec), ways, x)
    if x.shape[0] == 1 and out is None:  # Adds the bias by the way.
        if way == 'loop':
            return _convolve_one(x, kernels[0], bias, spec)
        if way == 'product' and bias is not None:
            size = (1, kernels.shape[1], *spec.output_size(x))
            return torch.addmm(bias[:, None], kernels.view(size[1], -1), _columns(x, spec)[0]).view(size)
    y = WAYS[way].forward(x, kernels, spec, out)
    return y if bias is None else y.add_(bias.view(-1, *(1,) * (y.dim() - 2)))


def convolve_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    kernels: torch.Tensor,
    spec: ConvSpec,
    need_input: bool = True,
    need_kernels: bool = True,
) -> Gradients:
    """Gradients of :func:`convolve`.

    Args:
        grad: Gradient of the output, ``(B, O, *spatial')``.
        x: As of :func:`convolve`.
        kernels: As of :func:`convolve`; their values matter only with ``need_input``.
        spec: As of :func:`convolve`.
        need_input: Return the gradient of ``x``.
        need_kernels: Return the gradient of ``kernels``.

    Returns:
        Gradients of ``x`` and ``kernels``, each None where not needed.
    """
    given = (grad, x, kernels, spec, need_input, need_kernels)
    way = by_rule(x, spec)
    if is_measured(x):
        ways = {name: partial(way.backward, *given) for name, way in WAYS.items() if way.takes(x, spec)}
        way = fastest(('convolve_backward', x.shape, spec, need_input, need_kernels), ways, x)
    return WAYS[way].backward(*given)


def _product(x: torch.Tensor, kernels: torch.Tensor, spec: ConvSpec, out: torch.Tensor | None = None) -> torch.Tensor:
    flat = None if out is None else out.flatten(2)
    y = torch.bmm(kernels.flatten(2).squeeze(-1), _columns(x, spec), out=flat)
    return y.view(x.shape[0], kernels.shape[1], *spec.output_size(x))


def _product_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    kernels: torch.Tensor,
    spec: ConvSpec,
    need_input: bool,
    need_kernels: bool,
) -> Gradients:
    flat = grad.flatten(2)
    grad_kernels = grad_input = None
    if need_kernels:
        grad_kernels = torch.bmm(flat, _columns(x, spec).transpose(1, 2)).view(kernels.shape)
    if need_input:
        grad_columns = torch.bmm(kernels.flatten(2).squeeze(-1).transpose(1, 2), flat)
        grad_input = _columns_backward(grad_columns, grad, x, spec)
    return grad_input, grad_kernels


def _loop(x: torch.Tensor, kernels: torch.Tensor, spec: ConvSpec, out: torch.Tensor | None = None) -> torch.Tensor:
    y = x.new_empty(x.shape[0], kernels.shape[1], *spec.output_size(x)) if out is None else out
    for i in range(x.shape[0]):
        y[i] = _convolve_one(x[i : i + 1], kernels[i], None, spec)[0]
    return y


def _loop_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    kernels: torch.Tensor,
    spec: ConvSpec,
    need_input: bool,
    need_kernels: bool,
) -> Gradients:
    grad_input = torch.empty_like(x, memory_format=torch.contiguous_format) if need_input else None
    grad_kernels = torch.empty_like(kernels) if need_kernels else None
    for i in range(x.shape[0]):
        one = slice(i, i + 1)
        input_i, kernel_i = _backward(grad[one], x[one], kernels[i], spec, 1, need_input, need_kernels)
        if grad_input is not None:
            grad_input[i] = input_i[0]
        if grad_kernels is not None:
            grad_kernels[i] = kernel_i
    return grad_input, grad_kernels


def _grouped(x: torch.Tensor, kernels: torch.Tensor, spec: ConvSpec, out: torch.Tensor | None = None) -> torch.Tensor:
    y = conv_per_sample(x, kernels, None, spec)
    return y if out is None else out.copy_(y)


def _grouped_last(
    x: torch.Tensor, kernels: torch.Tensor, spec: ConvSpec, out: torch.Tensor | None = None
) -> torch.Tensor:
    batch, wide = x.shape[0], _channels_last(x.reshape(1, -1, *x.shape[2:]))
    y = CONV[x.dim() - 2](
        wide, kernels.flatten(0, 1), None, spec.stride, spec.padding, spec.dilation, batch * spec.groups
    )
    y = y.reshape(batch, kernels.shape[1], *y.shape[2:])
    return y if out is None else out.copy_(y)


def _grouped_backward(
    last: bool,
    grad: torch.Tensor,
    x: torch.Tensor,
    kernels: torch.Tensor,
    spec: ConvSpec,
    need_input: bool,
    need_kernels: bool,
) -> Gradients:
    wide = [t.reshape(1, -1, *t.shape[2:]) for t in (grad, x)]
    wide_grad, wide_x = map(_channels_last, wide) if last else wide
    needs = (need_input, need_kernels)
    grad_input, grad_kernels = _backward(wide_grad, wide_x, kernels.flatten(0, 1), spec, x.shape[0], *needs)
    return (
        grad_input.reshape(x.shape) if need_input else None,
        grad_kernels.reshape(kernels.shape) if need_kernels else None,
    )


def _unfold(x: torch.Tensor, kernels: torch.Tensor, spec: ConvSpec, out: torch.Tensor | None = None) -> torch.Tensor:
    flat = None if out is None else out.flatten(2).unflatten(1, (spec.groups, -1))
    y = torch.matmul(_by_group(kernels, spec), _seen(x, spec), out=flat)
    return y.view(x.shape[0], kernels.shape[1], *spec.output_size(x))


def _unfold_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    kernels: torch.Tensor,
    spec: ConvSpec,
    need_input: bool,
    need_kernels: bool,
) -> Gradients:
    by_group = grad.flatten(2).unflatten(1, (spec.groups, -1))
    grad_input = grad_kernels = None
    if need_kernels:
        grad_kernels = (by_group @ _seen(x, spec).transpose(2, 3)).view(kernels.shape)
    if need_input:
        grad_seen = (_by_group(kernels, spec).transpose(2, 3) @ by_group).flatten(1, 2)
        window = (spec.kernel_size, spec.dilation, spec.padding, spec.stride)
        grad_input = F.fold(grad_seen, x.shape[2:], *window)
    return grad_input, grad_kernels


def _by_group(kernels: torch.Tensor, spec: ConvSpec) -> torch.Tensor:
    return kernels.view(len(kernels), spec.groups, kernels.shape[1] // spec.groups, -1)


def _seen(x: torch.Tensor, spec: ConvSpec) -> torch.Tensor:
    """Return what windows see, ``(B, groups, C / groups * window, pixels)``."""
    seen = F.unfold(x, spec.kernel_size, spec.dilation, spec.padding, spec.stride)
    return seen.unflatten(1, (spec.groups, -1))


def _channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format={4: torch.channels_last, 5: torch.channels_last_3d}[x.dim()])


WAYS: dict[str, Way] = {
    'product': Way(lambda _, spec: spec.is_pointwise, _product, _product_backward),
    'loop': Way(lambda _, spec: not spec.is_pointwise, _loop, _loop_backward),
    'grouped': Way(lambda _, spec: not spec.is_pointwise, _grouped, partial(_grouped_backward, False)),
    'channels_last': Way(
        lambda x, spec: not spec.is_pointwise and x.dim() > 3, _grouped_last, partial(_grouped_backward, True)
    ),
    'unfold': Way(lambda x, spec: not spec.is_pointwise and x.dim() == 4, _unfold, _unfold_backward),
}


def conv_pointwise(x: torch.Tensor, kernels: torch.Tensor, bias: torch.Tensor | None, spec: ConvSpec) -> torch.Tensor:
    """Convolve each sample with its own pointwise kernel, by torch's differentiable operations alone."""
    return add_bias(_product(x, kernels, spec), bias)


def _convolve_one(x: torch.Tensor, kernel: torch.Tensor, bias: torch.Tensor | None, spec: ConvSpec) -> torch.Tensor:
    return CONV[x.dim() - 2](x, kernel, bias, spec.stride, spec.padding, spec.dilation, spec.groups)


def _columns(x: torch.Tensor, spec: ConvSpec) -> torch.Tensor:
    """Return the pixels that a pointwise convolution looks at, ``(B, C, pixels)``."""
    if any(step != 1 for step in spec.stride):
        x = x[_every(spec.stride)]
    return x.flatten(2)


def _columns_backward(grad_columns: torch.Tensor, grad: torch.Tensor, x: torch.Tensor, spec: ConvSpec) -> torch.Tensor:
    pixels = grad_columns.view(*x.shape[:2], *grad.shape[2:])
    if all(step == 1 for step in spec.stride):
        return pixels
    grad_input = torch.zeros_like(x, memory_format=torch.contiguous_format)
    grad_input[_every(spec.stride)] = pixels
    return grad_input


def _every(stride: tuple[int, ...]) -> tuple[slice, ...]:
    return (slice(None), slice(None), *(slice(None, None, step) for step in stride))


def _backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    kernel: torch.Tensor,
    spec: ConvSpec,
    batch: int,
    need_input: bool,
    need_kernel: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    axes = x.dim() - 2
    grad_input, grad_kernel, _ = torch.ops.aten.convolution_backward(
        grad,
        x,
        kernel,
        None,
        spec.stride,
        spec.padding,
        spec.dilation,
        False,
        [0] * axes,
        spec.groups * batch,
        [need_input, need_kernel, False],
    )
    return grad_input, grad_kernel
