"""ODConv, for comparison alone: one kernel per image, scaled along all of its axes.

Written from the paper: Li, Zhou, Yao, Omni-Dimensional Dynamic Convolution, ICLR 2022, section 3.2.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from ..layers.attention import hidden_width

__all__ = ['ODConv2d']


class ODConv2d(nn.Module):
    """Convolve each image by ``sum_i a_i * (filters x inputs x positions * W_i)``.

    The four attentions come from one hidden vector of the pooled input: a softmax over kernels (of temperature 1,
    where training ends), sigmoids for filters, input channels and window positions, which all kernels share. An axis of
    length 1 has none, and a depthwise convolution has none for filters, each of which has one input channel. Inputs and
    outputs are scaled instead of kernels, which is the same and less.

    Args:
        in_channels: Input channels.
        out_channels: Output channels.
        kernel_size: Window, as the following per axis.
        stride: Stride.
        padding: Zeros at both ends.
        dilation: Dilation.
        groups: Groups.
        bias: Learn a bias, the same for every image.
        num_experts: Kernels.
        reduction: Hidden width relative to ``in_channels``; 16 at least, as in KW layers.

    Shape:
        input ``(B, in_channels, H, W)``, output ``(B, out_channels, H', W')``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, ...],
        stride: tuple[int, ...] = (1, 1),
        padding: tuple[int, ...] = (0, 0),
        dilation: tuple[int, ...] = (1, 1),
        groups: int = 1,
        bias: bool = False,
        num_experts: int = 4,
        reduction: float = 1 / 16,
    ) -> None:
        super().__init__()
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups
        self.weight = nn.Parameter(torch.empty(num_experts, out_channels, in_channels // groups, *kernel_size))
        nn.init.normal_(self.weight, std=math.sqrt(2 * groups / (out_channels * math.prod(kernel_size))))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        hidden = hidden_width(in_channels, reduction)
        depthwise = groups == in_channels == out_channels
        lengths = dict(inputs=in_channels, filters=1 if depthwise else out_channels)
        lengths |= dict(positions=math.prod(kernel_size), kernels=num_experts)
        self.squeeze = nn.Linear(in_channels, hidden)
        self.heads = nn.ModuleDict({axis: nn.Linear(hidden, n) for axis, n in lengths.items() if n > 1})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Convolve each image with its own kernel."""
        hidden = self.squeeze(x.mean((2, 3))).relu()
        logits = {axis: head(hidden) for axis, head in self.heads.items()}
        kernels = self.weight
        if 'kernels' in logits:
            kernels = (logits['kernels'].softmax(1) @ kernels.flatten(1)).unflatten(1, kernels.shape[1:])
        if 'positions' in logits:
            kernels = kernels * logits['positions'].sigmoid().view(-1, 1, 1, *self.weight.shape[3:])
        if 'inputs' in logits:
            x = x * logits['inputs'].sigmoid()[:, :, None, None]
        y = self._convolve(x, kernels)
        if 'filters' in logits:
            y = y * logits['filters'].sigmoid()[:, :, None, None]
        return y if self.bias is None else y + self.bias[:, None, None]

    def _convolve(self, x: torch.Tensor, kernels: torch.Tensor) -> torch.Tensor:
        """Convolve with kernels ``(B, O, I / groups, *k)``, or ``(1, ...)`` for all, the faster way on each device."""
        rest = (None, self.stride, self.padding, self.dilation)
        if len(kernels) == 1:
            return F.conv2d(x, kernels[0], *rest, self.groups)
        if x.device.type == 'cpu' and self.groups == 1:
            return torch.cat([F.conv2d(one, own, *rest) for one, own in zip(x.split(1), kernels, strict=True)])
        y = F.conv2d(x.flatten(0, 1)[None], kernels.flatten(0, 1), *rest, len(x) * self.groups)
        return y.view(len(x), -1, *y.shape[2:])
