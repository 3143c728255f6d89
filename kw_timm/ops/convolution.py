"""Convolving every sample with its own kernel, and the gradients: the fastest of torch's operations for each case.

* Pointwise kernels (1x1, one group) are a batched matrix product: as fast as the static convolution.
* On a CPU other kernels of one group take one call per sample: as one grouped convolution they can be several times
  slower, because its kernels are reordered for the machine one group at a time.
* On a GPU, and for depthwise kernels, one grouped convolution is fastest.
"""

import torch

from .spec import ConvSpec
from .straightforward import CONV, add_bias, conv_per_sample

__all__ = ['conv_pointwise', 'convolve', 'convolve_backward']


def prefers_loop(x: torch.Tensor, spec: ConvSpec) -> bool:
    """Return whether one call per sample beats one call for the batch."""
    return x.shape[0] == 1 or (x.device.type == 'cpu' and spec.groups == 1)


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
    pointwise = spec.is_pointwise
    one = x.shape[0] == 1 and out is None
    if one and not pointwise:
        return _convolve_one(x, kernels[0], bias, spec)
    size = (x.shape[0], kernels.shape[1], *spec.output_size(x))
    if one and bias is not None:
        return torch.addmm(bias[:, None], kernels.view(size[1], -1), _columns(x, spec)[0]).view(size)
    if pointwise:
        flat = None if out is None else out.flatten(2)
        y = torch.bmm(kernels.flatten(2).squeeze(-1), _columns(x, spec), out=flat).view(size)
    elif prefers_loop(x, spec):
        y = x.new_empty(size) if out is None else out
        for i in range(x.shape[0]):
            y[i] = _convolve_one(x[i : i + 1], kernels[i], None, spec)[0]
    else:
        y = conv_per_sample(x, kernels, None, spec)
        y = y if out is None else out.copy_(y)
    return y if bias is None else y.add_(bias.view(-1, *(1,) * (y.dim() - 2)))


def conv_pointwise(x: torch.Tensor, kernels: torch.Tensor, bias: torch.Tensor | None, spec: ConvSpec) -> torch.Tensor:
    """Convolve each sample with its own pointwise kernel, by torch's differentiable operations alone."""
    y = torch.bmm(kernels.flatten(2).squeeze(-1), _columns(x, spec))
    return add_bias(y.view(x.shape[0], kernels.shape[1], *spec.output_size(x)), bias)


def _convolve_one(x: torch.Tensor, kernel: torch.Tensor, bias: torch.Tensor | None, spec: ConvSpec) -> torch.Tensor:
    return CONV[x.dim() - 2](x, kernel, bias, spec.stride, spec.padding, spec.dilation, spec.groups)


def convolve_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    kernels: torch.Tensor,
    spec: ConvSpec,
    need_input: bool = True,
    need_kernels: bool = True,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
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
    if spec.is_pointwise:
        flat = grad.flatten(2)
        grad_kernels = grad_input = None
        if need_kernels:
            grad_kernels = torch.bmm(flat, _columns(x, spec).transpose(1, 2)).view(kernels.shape)
        if need_input:
            grad_columns = torch.bmm(kernels.flatten(2).squeeze(-1).transpose(1, 2), flat)
            grad_input = _columns_backward(grad_columns, grad, x, spec)
        return grad_input, grad_kernels
    if not prefers_loop(x, spec):
        batch = x.shape[0]
        wide_grad, wide_x = (t.reshape(1, batch * t.shape[1], *t.shape[2:]) for t in (grad, x))
        input_grad, kernel_grad = _backward(
            wide_grad, wide_x, kernels.flatten(0, 1), spec, batch, need_input, need_kernels
        )
        return (
            input_grad.view(x.shape) if need_input else None,
            kernel_grad.view(kernels.shape) if need_kernels else None,
        )
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
