"""Convolving every sample with its own kernel, and the gradients: the fastest of torch's operations for each case.

* Pointwise kernels (1x1, one group) are a batched matrix product: as fast as the static convolution.
* On a CPU other kernels of one group take one call per sample: as one grouped convolution they can be several times
  slower, because its kernels are reordered for the machine one group at a time.
* On a GPU, and for depthwise kernels, one grouped convolution is fastest.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .functional import CONV, conv_per_sample
from .mixing import is_making_graph

__all__ = ['Convolution', 'convolve', 'convolve_backward']


@dataclass(frozen=True)
class Convolution:
    """Arguments of a convolution.

    Attributes:
        stride: Stride per spatial axis.
        padding: Zero padding per spatial axis, on both sides.
        dilation: Dilation per spatial axis.
        groups: Groups.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def is_pointwise(self, kernels: torch.Tensor) -> bool:
        """Return whether ``kernels`` only mix channels."""
        return self.groups == 1 and all(window == 1 for window in kernels.shape[3:]) and not any(self.padding)

    def prefers_loop(self, x: torch.Tensor) -> bool:
        """Return whether one call per sample beats one call for the batch."""
        if is_making_graph():
            return False
        return x.shape[0] == 1 or (x.device.type == 'cpu' and self.groups == 1)

    def output_size(self, x: torch.Tensor, kernel_size: Sequence[int]) -> tuple[int, ...]:
        """Return the spatial size of the output."""
        return tuple(
            (size + 2 * padding - dilation * (window - 1) - 1) // stride + 1
            for size, window, stride, padding, dilation in zip(
                x.shape[2:], kernel_size, self.stride, self.padding, self.dilation, strict=True
            )
        )


def convolve(
    x: torch.Tensor,
    kernels: torch.Tensor,
    conv: Convolution,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Convolve each sample with its own kernel. Not differentiable.

    Args:
        x: ``(B, C, *spatial)``.
        kernels: ``(B, O, C / groups, *k)``, contiguous.
        conv: The other arguments of the convolution.
        bias: ``(O,)`` or None, the same for all samples.
        out: ``(B, O, *spatial')``, contiguous, to be overwritten; allocated where not given.

    Returns:
        ``(B, O, *spatial')``.
    """
    pointwise = conv.is_pointwise(kernels)
    one = x.shape[0] == 1 and out is None and not is_making_graph()
    if one and not pointwise:
        return _convolve_one(x, kernels[0], bias, conv)
    size = (x.shape[0], kernels.shape[1], *conv.output_size(x, kernels.shape[3:]))
    if one and bias is not None:
        return torch.addmm(bias[:, None], kernels.view(size[1], -1), _columns(x, conv)[0]).view(size)
    if pointwise:
        flat = None if out is None else out.flatten(2)
        y = torch.bmm(kernels.flatten(2).squeeze(-1), _columns(x, conv), out=flat).view(size)
    elif conv.prefers_loop(x):
        y = x.new_empty(size) if out is None else out
        for i in range(x.shape[0]):
            y[i] = _convolve_one(x[i : i + 1], kernels[i], None, conv)[0]
    else:
        y = conv_per_sample(x, kernels, None, conv.stride, conv.padding, conv.dilation, conv.groups)
        y = y if out is None else out.copy_(y)
    return y if bias is None else y.add_(bias.view(-1, *(1,) * (y.dim() - 2)))


def _convolve_one(x: torch.Tensor, kernel: torch.Tensor, bias: torch.Tensor | None, conv: Convolution) -> torch.Tensor:
    return CONV[x.dim() - 2](x, kernel, bias, conv.stride, conv.padding, conv.dilation, conv.groups)


def convolve_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    kernels: torch.Tensor,
    conv: Convolution,
    need_input: bool = True,
    need_kernels: bool = True,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Gradients of :func:`convolve`.

    Args:
        grad: Gradient of the output, ``(B, O, *spatial')``.
        x: As of :func:`convolve`.
        kernels: As of :func:`convolve`; their values matter only with ``need_input``.
        conv: As of :func:`convolve`.
        need_input: Return the gradient of ``x``.
        need_kernels: Return the gradient of ``kernels``.

    Returns:
        Gradients of ``x`` and ``kernels``, each None where not needed.
    """
    if conv.is_pointwise(kernels):
        flat = grad.flatten(2)
        grad_kernels = grad_input = None
        if need_kernels:
            grad_kernels = torch.bmm(flat, _columns(x, conv).transpose(1, 2)).view(kernels.shape)
        if need_input:
            grad_columns = torch.bmm(kernels.flatten(2).squeeze(-1).transpose(1, 2), flat)
            grad_input = _columns_backward(grad_columns, grad, x, conv)
        return grad_input, grad_kernels
    if not conv.prefers_loop(x):
        batch = x.shape[0]
        wide_grad, wide_x = (t.reshape(1, batch * t.shape[1], *t.shape[2:]) for t in (grad, x))
        input_grad, kernel_grad = _backward(
            wide_grad, wide_x, kernels.flatten(0, 1), conv, batch, need_input, need_kernels
        )
        return (
            input_grad.view(x.shape) if need_input else None,
            kernel_grad.view(kernels.shape) if need_kernels else None,
        )
    grad_input = torch.empty_like(x, memory_format=torch.contiguous_format) if need_input else None
    grad_kernels = torch.empty_like(kernels) if need_kernels else None
    for i in range(x.shape[0]):
        one = slice(i, i + 1)
        input_i, kernel_i = _backward(grad[one], x[one], kernels[i], conv, 1, need_input, need_kernels)
        if grad_input is not None:
            grad_input[i] = input_i[0]
        if grad_kernels is not None:
            grad_kernels[i] = kernel_i
    return grad_input, grad_kernels


def _columns(x: torch.Tensor, conv: Convolution) -> torch.Tensor:
    """Return the pixels that a pointwise convolution looks at, ``(B, C, pixels)``."""
    if any(step != 1 for step in conv.stride):
        x = x[_every(conv.stride)]
    return x.flatten(2)


def _columns_backward(
    grad_columns: torch.Tensor, grad: torch.Tensor, x: torch.Tensor, conv: Convolution
) -> torch.Tensor:
    pixels = grad_columns.view(*x.shape[:2], *grad.shape[2:])
    if all(step == 1 for step in conv.stride):
        return pixels
    grad_input = torch.zeros_like(x, memory_format=torch.contiguous_format)
    grad_input[_every(conv.stride)] = pixels
    return grad_input


def _every(stride: tuple[int, ...]) -> tuple[slice, ...]:
    return (slice(None), slice(None), *(slice(None, None, step) for step in stride))


def _backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    kernel: torch.Tensor,
    conv: Convolution,
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
        conv.stride,
        conv.padding,
        conv.dilation,
        False,
        [0] * axes,
        conv.groups * batch,
        [need_input, need_kernel, False],
    )
    return grad_input, grad_kernel
